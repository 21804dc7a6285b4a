"""`python -m utils.checkpoint_info FILE` as a user starts it."""

import pytest
import torch

from tests.conftest import ROOT
from utils import checkpoint, checkpoint_info


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


@pytest.mark.parametrize("name", ["README.md", "missing", "."])
def test_what_is_no_checkpoint_is_told_in_one_line(command, name, tmp_path):
    for flags in ([], ["--export", tmp_path / "w.safetensors"]):
        assert command(checkpoint_info.main, ROOT / name, *flags).refused(str(ROOT / name)).out == ""
    assert not [*tmp_path.iterdir()]
