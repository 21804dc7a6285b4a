"""Weights alone as .safetensors: what comes back, what commands make of it, and what is refused."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
import train
from generation.loading import read_model
from tests.builders import one_line
from utils import checkpoint, checkpoint_info


@pytest.fixture(scope="module")
def averaged(tiny_flags, tmp_path_factory):
    """A checkpoint with averaged weights, whose layers have two kinds of attention."""
    folder = tmp_path_factory.mktemp("averaged")
    flags = ["--checkpoint-output-dir", str(folder), "--ema-decay", "0.5", "--attn-types", "full,axial_row"]
    train.main([*tiny_flags, *flags])
    return folder / "dalle_0.pt"


@pytest.fixture
def export(command, averaged, tmp_path):
    def run(*flags):
        out = tmp_path / "new" / "weights.safetensors"
        ended = command(checkpoint_info.main, averaged, "--export", out, *flags).ok()
        assert str(out) in ended.out and [*out.parent.iterdir()] == [out]
        return out

    return run


def grid(command, path, out):
    flags = ["--text", "a red circle", "--num_images", 4, "--seed", 5, "--precision", "fp32", "--outputs_dir", out]
    command(generate.main, "--dalle_path", path, *flags).ok()
    return np.array(Image.open(out / "a_red_circle" / "grid.png"))


def test_the_same_pictures_for_the_same_seed(command, averaged, export, tmp_path):
    pictures = grid(command, averaged, tmp_path / "pt")
    assert np.array_equal(pictures, grid(command, export(), tmp_path / "st"))
    assert len(np.unique(pictures)) > 10
    halved = read_model(export("--half"))[0]  # the VQGAN is whole
    whole = read_model(averaged)[0]
    assert halved.vae.fingerprint() == whole.vae.fingerprint()
    assert torch.equal(halved.text_emb.weight, whole.text_emb.weight.half().float())


def test_any_reader_finds_weights_and_header(averaged, export):
    path, saved = export(), checkpoint.read(averaged)
    tensors = load_file(path)
    assert tensors.keys() - saved["weights"].keys() == {"tokenizer.vocabulary"}
    assert torch.equal(tensors["model.text_emb.weight"], saved["ema_weights"]["model.text_emb.weight"])
    assert not torch.equal(tensors["model.text_emb.weight"], saved["weights"]["model.text_emb.weight"])
    with safe_open(str(path), framework="pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items() if key not in ("format", "crc32")}
    assert header["hparams"]["attn_types"] == ["full", "axial_row"] and header["step"] == 3
    assert header["vqgan"] == saved["vqgan"] and header["tokenizer"]["sha256"] == saved["tokenizer"]["sha256"]
    back = checkpoint.read(path)
    assert torch.equal(back["tokenizer"]["vocabulary"], saved["tokenizer"]["vocabulary"])
    assert back["exported"] == {"averaged": True, "half": False} and "opt_state" not in back


def test_training_begins_anew_from_the_weights(command, tiny_flags, export, tmp_path):
    path, place = export(), ["--checkpoint-output-dir", tmp_path / "run"]
    flags = [*tiny_flags, "--attn-types", "full,axial_row", "--learning-rate", 1e-30, *place, "--pretrained-checkpoint"]
    ended = command(train.main, *flags, path).ok()
    (told,) = [line for line in ended.out.splitlines() if "loaded the weights" in line]
    assert str(path) in told and "of step 3; new optimizer, from step 0" in told
    after = checkpoint.read(tmp_path / "run" / "dalle_0.pt")
    assert after["step"] == 3
    assert torch.equal(after["weights"]["model.text_emb.weight"], load_file(path)["model.text_emb.weight"])
    command(train.main, *flags, path).refused("of an earlier run")
    command(train.main, *flags, path.rename(tmp_path / "run" / path.name)).refused("of an earlier run")


def test_a_damaged_file_is_refused_in_one_line(export, tmp_path):
    path = export()
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    flipped = bytearray(whole)
    flipped[header + 100000] ^= 1
    cases = [whole[:length] for length in (0, 5, 8, 200, header, header + 9, len(whole) // 2, len(whole) - 1)]
    cases += [bytes(flipped), whole[:100] + b"\xff\xfe" + whole[102:], b"\xff" * 300, b"# a readme\n" * 90]
    for content in cases:
        path.write_bytes(content)
        with one_line(f"^{path}: damaged") as told:
            checkpoint.read(path)
        assert len(str(told.value)) < len(str(path)) + 220


def test_a_foreign_file_is_refused_in_one_line(command, tmp_path):
    path, out = tmp_path / "other.safetensors", tmp_path / "out"
    for metadata, told in (
        (None, "it has no hparams"),
        ({"hparams": "{"}, "its header is not JSON"),
        ({"hparams": "3"}, "is not a dict"),
        ({"hparams": "{}", "crc32": "0"}, "checksum differs"),
    ):
        save_file({"a": torch.zeros(3)}, path, metadata)
        command(generate.main, "--dalle_path", path, "--text", "a", "--outputs_dir", out).refused(str(path), told)
        assert not out.exists()
