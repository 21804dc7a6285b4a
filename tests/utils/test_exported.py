"""Weights alone as .safetensors, what checkpoint_info says of files, and what commands make of them or refuse."""

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
from tests.conftest import ROOT
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


def test_a_file_of_train(command, tiny_checkpoint):
    ended = command(checkpoint_info.main, tiny_checkpoint).ok()
    text, saved = " ".join(ended.out.split()), checkpoint.read(tiny_checkpoint)
    weights = saved["weights"]
    trained = sum(tensor.numel() for name, tensor in weights.items() if not name.startswith("model.vae."))
    for wanted in (
        f"{tiny_checkpoint}: {tiny_checkpoint.stat().st_size / 1e6:.1f} MB",
        *(f"torch {torch.__version__}", "epoch 0", "step 3", "dim 32, depth 2"),
        f"DALL-E {trained:,} in float32; VQGAN {sum(t.numel() for t in weights.values()) - trained:,} in float32",
        f"vqgan {saved['vqgan']}",
        f"kind yttm, sha256 {saved['tokenizer']['sha256']}, vocabulary 1 tensor, 0.1 MB",
        saved["data"],
        *("learning_rate 0.003", "caption_dropout 0.1", "ff_dropout 0.0", "opt_state", "scheduler_state"),
    ):
        assert wanted in text, wanted
    assert "ema_weights" not in text and max(map(len, ended.out.splitlines())) <= 118


def test_a_file_of_the_reference(command, tmp_path):
    hparams = {"dim": 64, "attn_types": ("axial_row", "full"), "cls_ipu_id": None, "fp16": True}
    weights = {"model.text_emb.weight": torch.zeros(9, 2).half(), "model.vae.model.encoder.x": torch.zeros(5).half()}
    weights["model.vae.model.loss.discriminator.x"] = torch.zeros(99)
    adam = {"state": {0: {"step": 3, "exp_avg": torch.zeros(250000)}}, "param_groups": []}
    for vae_params in ({}, None, {"image_size": 256}):
        saved = {"hparams": hparams, "vae_params": vae_params, "epoch": 7, "weights": weights, "opt_state": adam}
        torch.save({**saved, "scheduler_state": {"last_epoch": 3}}, tmp_path / "dalle_7.pt")
        ended = command(checkpoint_info.main, tmp_path / "dalle_7.pt").ok()
        for wanted in ("epoch            7", "DALL-E 18 in float16; VQGAN 5 in float16", "attn_types axial_row,full"):
            assert wanted in ended.out, wanted
        assert "state 1 tensor, 1.0 MB" in ended.out and "tokenizer" not in ended.out + ended.err


def test_a_decoder_of_the_same_codes_is_exported(command, tiny_checkpoint, tmp_path):
    weights = checkpoint.read(tiny_checkpoint)["weights"]
    vqgan = {name[len("model.vae.model.") :]: x for name, x in weights.items() if name.startswith("model.vae.model.")}
    sharper = {name: x + 1 if name.startswith(("decoder.", "post_quant_conv.")) else x for name, x in vqgan.items()}
    out, folder = tmp_path / "out.safetensors", tmp_path / "vqgan"
    folder.mkdir()
    torch.save({"state_dict": sharper}, folder / "vqgan.ckpt")
    command(checkpoint_info.main, tiny_checkpoint, "--export", out, "--decoder", folder).ok()
    exported = checkpoint.read(out)["weights"]
    assert all(torch.equal(exported[f"model.vae.model.{name}"], x) for name, x in sharper.items())
    torch.save({"state_dict": {name: x + 1 for name, x in vqgan.items()}}, folder / "vqgan.ckpt")
    out.unlink()
    for place, reason in ((folder, "its VQGAN has other codes"), (tmp_path, "no such file")):
        command(checkpoint_info.main, tiny_checkpoint, "--export", out, "--decoder", place).refused(reason)
        assert not out.exists()
    for flags in (["--half"], ["--decoder", folder]):
        command(checkpoint_info.main, tiny_checkpoint, *flags).refused(f"{flags[0]}: needs --export")


@pytest.mark.parametrize("name", ["README.md", "missing", "."])
def test_what_is_no_checkpoint_is_told_in_one_line(command, name, tmp_path):
    for flags in ([], ["--export", tmp_path / "w.safetensors"]):
        assert command(checkpoint_info.main, ROOT / name, *flags).refused(str(ROOT / name)).out == ""
    assert not [*tmp_path.iterdir()]
