"""The models as an IPU gets them, at reduced width: what a training step and what generation run.

Depth, attention patterns, lengths and norms are a configuration's own; an operator depends on nothing else.
"""

from types import SimpleNamespace

import torch
from torch import nn

from args import train_arguments
from models.vae import VQGanVAE
from tests import builders
from tests.ipu_operators.standins import standins

CODES = 64
GRIDS = {"demo": 8, "demo_long": 8}  # sides of the code grid; other configurations have 16
BATCH = 2


def configuration(name):
    """Parse train.py's flags for an entry of configs.yaml."""
    return train_arguments(["--config", name, "--generated-data"])


def dalle(vae, settings, **changes):
    """Build the model of a configuration, 64 wide, in training mode."""
    names = "text_seq_len attn_types sandwich_norm loss_img_weight ff_dropout attn_dropout"
    hparams = {name: getattr(settings, name) for name in names.split()}
    # 160 text tokens with padding, because embedding and head are cut into eighths.
    hparams.update(depth=settings.num_hidden_layers, num_text_tokens=160 - settings.text_seq_len, **changes)
    return builders.small_dalle(vae, **{"dim": 64, **hparams}).train()


def codes_only(grid):
    """Stand in for a VQGAN in a step that gets codes."""
    return SimpleNamespace(image_size=grid * 16, num_layers=4, num_tokens=CODES)


def small_dalle(vae, **changes):
    """Build a model of four layers with the four patterns."""
    sizes = {"dim": 64, "depth": 4, "text_seq_len": 8, "num_text_tokens": 152, "sandwich_norm": True}
    patterns = ("full", "axial_row", "axial_col", "conv_like")
    return builders.small_dalle(vae, **{**sizes, "attn_types": patterns, **changes}).train()


def vqgan(gumbel, patch_size=1):
    """Build a VQGAN of three levels, with attention in one: 32·p × 32·p pixels in 8 × 8 codes."""
    channels = 3 * patch_size**2
    ddconfig = {"double_z": False, "z_channels": 16, "resolution": 32, "in_channels": channels, "out_ch": channels}
    ddconfig.update(ch=32, ch_mult=[1, 1, 2], num_res_blocks=1, attn_resolutions=[8], dropout=0.0)
    torch.manual_seed(0)
    return VQGanVAE({"ddconfig": ddconfig, "embed_dim": 16, "n_embed": CODES, "patch_size": patch_size}, gumbel)


class Graph(nn.Module):
    """A module that calls a function of a model and its inputs."""

    def __init__(self, function, model):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *inputs):
        return self.function(self.model, *inputs)


def plain_losses(model):
    """Build a training step without annotations."""
    return Graph(lambda model, text, image: model(text, image, return_loss=True), model)


def annotated_loss(model):
    """Build a training step with the loss as a training graph must have it."""
    identity_loss = standins().identity_loss

    def step(model, text, image):
        return identity_loss(model(text, image, return_loss=True).total, reduction="none")

    return Graph(step, model)


def decoder(vae):
    """Build the step from codes to pixels."""
    return Graph(lambda vae, codes: vae.decode(codes), vae)


def image_logits(model):
    """Build a full pass that returns the logits of the codes."""

    def run(model, text, codes):
        x = torch.cat((model.embed_text(model.number_padding(text)), model.embed_codes(codes)), dim=1)
        return model.image_logits(model.transformer(x))

    return Graph(run, model)


def text(model):
    return torch.zeros(BATCH, model.text_seq_len, dtype=torch.long)


def codes(model, count=None):
    return torch.zeros(BATCH, model.image_seq_len if count is None else count, dtype=torch.long)


def pixels(vae, dtype=torch.float32):
    return torch.zeros(BATCH, 3, vae.image_size, vae.image_size, dtype=dtype)
