"""Fixtures that several tests share: small real models, and dalle-pytorch as an independent oracle."""

import importlib
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from benchmarks import peer
from data.shapes import make_sample
from tests.builders import ROOT

SHAPES = ROOT / "demo" / "shapes.safetensors"  # a small checkpoint that follows its prompts
YTTM = ROOT / "bpe" / "bpe_yttm_vocab.txt"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


class TinyTokenizer(nn.Module):
    """An image tokenizer in four lines: an image's codes are its mean brightness in each of fmap × fmap cells."""

    def __init__(self, fmap_size=4, num_tokens=32):
        super().__init__()
        self.image_size, self.num_layers, self.num_tokens = fmap_size * 8, 3, num_tokens

    def forward(self, pixels):
        return self.get_codebook_indices(pixels)

    def get_codebook_indices(self, pixels):
        means = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 8).flatten(1)
        return (means * self.num_tokens).long().clamp(0, self.num_tokens - 1)


tiny_vae = pytest.fixture(lambda: TinyTokenizer())


@pytest.fixture(scope="session")
def dalle_pytorch():
    """dalle-pytorch 1.6.6, an independent oracle."""
    return peer.load() or pytest.skip("dalle-pytorch is not installed")


@pytest.fixture(scope="session")
def drawn_pictures(tmp_path_factory):
    """A folder of twelve 32 × 32 images of two shapes and their captions, which tests must not change."""
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(12):
        pixels, captions = make_sample("train", number, size=32)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("\n".join(captions[:2]) + "\n")
    return folder


@pytest.fixture
def picture_folder(drawn_pictures, tmp_path):
    """A copy of drawn_pictures that a test may change."""
    return Path(shutil.copytree(drawn_pictures, tmp_path / "pictures"))


@pytest.fixture(scope="session")
def tiny_vqgan(tmp_path_factory, drawn_pictures):
    """A VQGAN for 32 × 32 images in 4 × 4 codes of 64, in taming's format: a folder of vqgan.ckpt and vqgan.yaml.

    Its weights are random; its entries are latents of drawn_pictures, so that different images have different codes.
    """
    ddconfig = {"double_z": False, "z_channels": 8, "resolution": 4, "in_channels": 192, "out_ch": 192, "ch": 32}
    ddconfig.update(ch_mult=[1], num_res_blocks=1, attn_resolutions=[], dropout=0.0)
    params = {"embed_dim": 8, "n_embed": 64, "patch_size": 8, "ddconfig": ddconfig}
    taming, folder = peer.TamingVQGAN(params), tmp_path_factory.mktemp("vqgan")
    images = [np.array(Image.open(path)) for path in sorted(drawn_pictures.glob("*.png"))]
    with torch.no_grad():
        cells = nn.functional.pixel_unshuffle(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, 8)
        latents = taming.quant_conv(taming.encoder(cells)).permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)
        taming.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:64]])
        taming.decoder.conv_out.weight.mul_(0.3)  # pale images, because stretching their contrast would change them
    loss = {"loss.discriminator.main.0.weight": torch.zeros(3)}  # taming's files hold the training loss as well
    torch.save({"state_dict": {**taming.state_dict(), **loss}, "global_step": 1}, folder / "vqgan.ckpt")
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def tiny_flags(drawn_pictures, tiny_vqgan, tmp_path_factory):
    """Flags with which train.py learns twelve images in seconds: three steps per epoch, with a codes cache.

    If a flag is repeated, the last one counts, so tests append theirs.
    """
    model = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --dim-head 16 --text-seq-len 16"
    run = "--batch-size 4 --dataloader-workers 0 --device cpu --precision fp32 --learning-rate 3e-3 --sample-steps 0"
    places = ["--input-folder", drawn_pictures, "--vae-path", tiny_vqgan, "--bpe-path", YTTM]
    places += ["--codes-cache", tmp_path_factory.mktemp("codes"), "--checkpoint-output-dir", ""]
    return [*model.split(), *run.split(), *map(str, places)]


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_flags, tmp_path_factory):
    """A checkpoint of train.py after one epoch with tiny_flags."""
    import train

    folder = tmp_path_factory.mktemp("checkpoint")
    train.main([*tiny_flags, "--checkpoint-output-dir", str(folder), "--caption-dropout", "0.1"])
    return folder / "dalle_0.pt"


IPU_PACKAGES = ("poptorch", "popart", "popdist", "horovod")
STANDIN = ROOT / "tests" / "poptorch_standin"


@pytest.fixture
def poptorch_standin(monkeypatch):
    """The stand-in for PopTorch as the module `poptorch`, in this test only, with the SDK marked as enabled."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in IPU_PACKAGES]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(str(STANDIN))
    monkeypatch.setenv("POPLAR_SDK_ENABLED", "/opt/poplar")
    yield importlib.import_module("poptorch")
    forget()


@pytest.fixture
def logged(caplog, monkeypatch):
    """Pytest's caplog with everything that the program logs, each line once."""
    logger = logging.getLogger("minidalle")
    caplog.set_level(logging.INFO, "minidalle")
    monkeypatch.setattr(logger, "propagate", False)  # the root logger has caplog's handler, too
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def drawing(loaded):
    """The sampler of a test's `loaded`, watched and held up; see tests/service/running.py."""
    from tests.service.running import Drawing

    drawing = Drawing(loaded)
    yield drawing
    drawing.remove()


class Ended(NamedTuple):
    """The exit status of a command and its output."""

    status: int
    out: str
    err: str

    def ok(self):
        """Assert that the command succeeded, without a word on stderr."""
        assert self.status == 0 and self.err == "", self
        return self

    def refused(self, *words):
        """Assert that the command ended with one line on stderr, which contains these words."""
        assert self.status == 2 and self.err.count("\n") == 1 and all(word in self.err for word in words), self
        return self


@pytest.fixture
def command(capsys):
    """command(main, *argv) runs a command in this process and returns Ended; only SystemExit may end it early."""

    def run(main, *argv):
        capsys.readouterr()
        try:
            main([*map(str, argv)])
            status = 0
        except SystemExit as end:
            status = end.code
        return Ended(status, *capsys.readouterr())

    return run
