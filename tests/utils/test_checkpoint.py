"""Checkpoint files: whole or not there, opened without running what is in them, weights under their own names."""

import os
import re
from collections import OrderedDict

import pytest
import torch

from tests.builders import PickledCall, one_line
from tests.utils.test_files import files_in
from training import checkpoints
from utils import checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])  # torch.save's two file formats


def content():
    weights = OrderedDict([("model.a", torch.arange(300.0)), ("model.b", torch.ones(2, 3, dtype=torch.float16))])
    hparams = {"dim": 3, "attn_types": ("full", "axial_row"), "sandwich_norm": False, "cls_ipu_id": None}
    return {"hparams": hparams, "weights": weights, "opt_state": [{"state": {0: torch.zeros(2)}}], "epoch": 2}


def refusal(path):
    with one_line(f"^{path}: ") as told:
        checkpoint.read(path)
    assert len(str(told.value)) < len(str(path)) + 200
    return str(told.value)[len(f"{path}: ") :]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "folder" / "dalle_2.pt"
    checkpoints.write(path, content())
    back, expected = checkpoint.read(str(path)), content()
    assert back.keys() == expected.keys() and back["hparams"] == expected["hparams"] and back["epoch"] == 2
    assert list(back["weights"]) == ["model.a", "model.b"]
    torch.testing.assert_close(back["weights"], dict(expected["weights"]), rtol=0, atol=0)
    assert torch.equal(back["opt_state"][0]["state"][0], torch.zeros(2))
    assert files_in(path.parent) == ["dalle_2.pt"]
    checkpoints.write(path, {**content(), "epoch": 3})
    assert checkpoint.read(path)["epoch"] == 3 and files_in(path.parent) == ["dalle_2.pt"]


@FORMATS
def test_a_file_cut_short_at_any_length_is_refused(zipped, tmp_path):
    path = tmp_path / "c.pt"
    torch.save(content(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert checkpoint.read(path)["epoch"] == 2
    for length in [*range(0, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = refusal(path)
        if zipped:
            assert message.startswith("damaged, cut short or not a checkpoint")
        else:  # where a name is cut in two, its first half is named
            assert re.match("damaged, cut short or not a checkpoint|holds [a-z]", message), message


@FORMATS
@pytest.mark.parametrize("place", ["hparams", "weights", "opt_state", "unheard_of"])
def test_pickled_code_never_runs(place, zipped, tmp_path):
    marker, path = tmp_path / "it ran", tmp_path / "c.pt"
    evil = PickledCall(os.system, f"touch '{marker}'")
    torch.save({**content(), place: {"model.a": evil}}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert not marker.exists()
    assert re.search(r"holds \w+\.system, .* was not opened", message)  # os.system by the name it is pickled under
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def test_a_file_for_which_memory_does_not_suffice_is_not_called_damaged(tmp_path, monkeypatch):
    """Otherwise --resume would continue with an older file."""

    def allocate(*arguments, **keywords):
        torch.empty(1 << 60)

    for name, function in (("c.pt", "torch.load"), ("c.safetensors", "utils.checkpoint.safe_open")):
        path = tmp_path / name
        torch.save(content(), path)
        monkeypatch.setattr(function, allocate)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            checkpoint.read(path)


def test_something_else_than_a_dall_e_is_refused(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with one_line(f"^{path}: no such checkpoint", FileNotFoundError):
            checkpoint.read(path)
    for saved, told in (
        ({"hparams": {}}, "it has no weights"),
        (torch.zeros(3), "it has no hparams and no weights"),
        ({"hparams": [], "weights": {}}, "is not a dict"),
        ({"hparams": {}, "weights": {"a": 3}}, "not tensors under names"),
    ):
        checkpoints.write(tmp_path / "c.pt", saved)
        message = refusal(tmp_path / "c.pt")
        assert "not a DALL-E checkpoint" in message and message.endswith(told)


def test_split_embeddings_are_joined_in_the_order_of_their_numbers():
    rows = torch.arange(36.0).view(36, 1).repeat(1, 2)
    pieces = {f"model.text_emb.split_embeddings.{i}.weight": rows[3 * i : 3 * i + 3] for i in range(12)}
    as_text = dict(sorted(pieces.items()))  # …1, …10, …11, …2
    assert list(as_text) != list(pieces)
    for given in (pieces, as_text, dict(reversed(list(pieces.items())))):
        weights = checkpoint.model_weights({**given, "model.image_emb.weight": rows})
        assert weights.keys() == {"text_emb.weight", "image_emb.weight"}
        assert torch.equal(weights["text_emb.weight"], rows)
    pieces["model.text_emb.split_embeddings.3.weight"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="text_emb.split_embeddings: the pieces do not fit together"):
        checkpoint.model_weights(pieces)


def test_the_training_loss_of_the_vqgan_is_left_out_and_nothing_else():
    names = ["vae.model.loss.discriminator.main.0.weight", "vae.model.loss.logvar", "vae.model.encoder.conv_in.weight"]
    names += ["transformer.loss.weight", "model.text_emb.weight"]  # the last: only one prefix is ours
    weights = checkpoint.model_weights({f"model.{name}": torch.zeros(1) for name in names})
    assert list(weights) == names[2:]
    assert list(checkpoint.model_weights({"text_emb.weight": torch.zeros(1)})) == ["text_emb.weight"]


def test_words_are_counted_without_case_and_punctuation():
    captions = ["A red circle, above a Square!", "the artist's well-known red-ish dog…", "año 中文 \u0301"]
    entry = checkpoints.summarize_captions(captions, ["", *captions, captions[0], "x" * 200])
    once = "red circle above square the artist's well-known red-ish dog año 中文"
    assert entry["words"] == {"a": 2, **dict.fromkeys(once.split(), 1)}
    assert entry["examples"] == captions
    assert checkpoint.read_summary(entry) == (entry["words"], captions)
