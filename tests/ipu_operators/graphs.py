"""Our models as an IPU is given them, at reduced width: what a training step and what drawing runs.

Depth, patterns of attention, lengths and norms are a configuration's own; an operator depends on nothing else.
"""

from types import SimpleNamespace

import torch
from torch import nn

from args import train_arguments
from models.dalle import DALLE
from models.vae import VQGanVAE
from tests.ipu_operators.standins import standins

CODES = 64
GRIDS = {
    "demo": 8,
    "demo_long": 8,
}  # sides of the code grid; the others read 256 × 256 pictures with f = 16
BATCH = 2


def configuration(name):
    """The namespace that train.py has of an entry of configs.yaml."""
    return train_arguments(["--config", name, "--generated-data"])


def dalle(vae, settings, **changes):
    """The network of a configuration, 64 wide, in training mode."""
    hparams = {
        "depth": settings.num_hidden_layers,
        "text_seq_len": settings.text_seq_len,
        "num_text_tokens": 160 - settings.text_seq_len,  # 160 with padding: embedding and head are cut into eighths
        "attn_types": settings.attn_types,
        "sandwich_norm": settings.sandwich_norm,
        "loss_img_weight": settings.loss_img_weight,
        "ff_dropout": settings.ff_dropout,
        "attn_dropout": settings.attn_dropout,
        **changes,
    }
    torch.manual_seed(0)
    return DALLE(dim=64, heads=2, dim_head=16, vae=vae, **hparams).train()


def codes_only(grid):
    """In the place of a VQGAN where a step is given codes."""
    return SimpleNamespace(image_size=grid * 16, num_layers=4, num_tokens=CODES)


def small_dalle(vae, **changes):
    """Four layers of the four patterns."""
    sizes = {"depth": 4, "text_seq_len": 8, "num_text_tokens": 152, "sandwich_norm": True}
    patterns = ("full", "axial_row", "axial_col", "conv_like")
    return dalle(vae, configuration("unit_test"), **{**sizes, "attn_types": patterns, **changes})


def vqgan(gumbel, patch_size=1):
    """Three levels, with attention in one: 32·p × 32·p pixels in 8 × 8 codes."""
    channels = 3 * patch_size**2
    ddconfig = {"double_z": False, "z_channels": 16, "resolution": 32, "in_channels": channels, "out_ch": channels}
    ddconfig.update(ch=32, ch_mult=[1, 1, 2], num_res_blocks=1, attn_resolutions=[8], dropout=0.0)
    torch.manual_seed(0)
    return VQGanVAE({"ddconfig": ddconfig, "embed_dim": 16, "n_embed": CODES, "patch_size": patch_size}, gumbel)


class Step(nn.Module):
    """A plain DALLE with the loss as a training graph wants it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.identity_loss = model, standins().identity_loss

    def forward(self, text, image):
        return self.identity_loss(self.model(text, image, return_loss=True).total, reduction="none")


class Loss(nn.Module):
    """The same without an annotation, for who knows none."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text, image):
        return self.model(text, image, return_loss=True)


class Decode(nn.Module):
    """A VQGAN from codes to pixels."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, codes):
        return self.vae.decode(codes)


class Logits(nn.Module):
    """A full pass, of which the logits of codes are wanted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text, codes):
        model = self.model
        x = model.embed_text(model.number_padding(text))
        x = torch.cat((x, model.embed_codes(codes)), dim=1)
        return model.image_logits(model.transformer(x))


def text(model):
    return torch.zeros(BATCH, model.text_seq_len, dtype=torch.long)


def codes(model, count=None):
    return torch.zeros(BATCH, model.image_seq_len if count is None else count, dtype=torch.long)


def pixels(vae, dtype=torch.float32):
    return torch.zeros(BATCH, 3, vae.image_size, vae.image_size, dtype=dtype)


def unannotated():
    """{name: (module, inputs)} of graphs that need nothing of poptorch."""
    model = small_dalle(codes_only(8), attn_dropout=0.1, ff_dropout=0.1)
    half = small_dalle(codes_only(8)).half()
    found = {
        "training from codes": (Loss(model), (text(model), codes(model))),
        "training from codes, fp16": (Loss(half), (text(half), codes(half))),
        "logits of codes": (Logits(model).eval(), (text(model), codes(model, 10))),
        "logits of everything": (model, (text(model), codes(model, 10))),
    }
    for gumbel, patch_size, dtype in [(False, 1, torch.float32), (True, 2, torch.uint8)]:
        vae = vqgan(gumbel, patch_size)
        model = small_dalle(vae)
        found[f"training from {dtype}"] = (Loss(model), (text(model), pixels(vae, dtype)))
        found[f"decoding, gumbel {gumbel}"] = (Decode(vae), (codes(model),))
    return found
