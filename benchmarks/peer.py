"""dalle-pytorch 1.6.6 and taming's VQGAN, which are measured here and compared with in tests, without what we need
nothing of.
"""

import contextlib
import importlib.util
import sys
import types

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import nn


def load():
    """The module dalle_pytorch.dalle_pytorch, or None where it is not installed (pip install --no-deps)."""
    wanted = ("dalle_pytorch", "axial_positional_embedding", "rotary_embedding_torch")
    if any(importlib.util.find_spec(name) is None for name in wanted):
        return None
    empty = {
        "pkg_resources": {"get_distribution": lambda name: types.SimpleNamespace(version="1.6.6")},
        "youtokentome": {},
        "transformers": {"BertTokenizer": None},
        "taming.models.vqgan": {"VQModel": None, "GumbelVQ": None},
        "omegaconf": {"OmegaConf": None},
        "requests": {},
    }
    kept = {name: sys.modules.get(name) for name in empty}
    for name, members in empty.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        return importlib.import_module("dalle_pytorch.dalle_pytorch")
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def model_like(module, vae, **sizes):
    """A dalle-pytorch DALLE of the sizes of ours; its image tokenizer is a small one that costs next to nothing."""
    small = module.DiscreteVAE(
        image_size=vae.image_size, num_layers=vae.num_layers, num_tokens=vae.num_tokens, codebook_dim=8, hidden_dim=8
    )
    return module.DALLE(vae=small, rotary_emb=False, shift_tokens=False, **sizes)


def loader():
    """dalle-pytorch's TextImageDataset; None where it or torchvision, which it needs, cannot be imported."""
    if load() is None:
        return None
    try:
        return importlib.import_module("dalle_pytorch.loader").TextImageDataset
    except (ImportError, RuntimeError):  # the latter: a torchvision for another torch
        return None


class TamingVQGAN(nn.Module):
    """taming's VQModel as its source puts it together, without Lightning and the loss, in fp32."""

    def __init__(self, params):
        super().__init__()
        ddconfig, self.width = params["ddconfig"], params["embed_dim"]
        with contextlib.redirect_stdout(None):  # the Decoder prints its shape
            self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quantize = VectorQuantizer2(params["n_embed"], self.width, beta=0.25, sane_index_shape=True)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], self.width, 1)
        self.post_quant_conv = nn.Conv2d(self.width, ddconfig["z_channels"], 1)
        self.eval().requires_grad_(False)

    def codes(self, pixels):
        """(B, 3, S, S) in [-1, 1] → (B, h, w)."""
        return self.quantize(self.quant_conv(self.encoder(pixels)))[2][2]

    def pixels(self, codes):
        """(B, h * h) → (B, 3, S, S) around [-1, 1]."""
        rows, side = len(codes), int(codes.shape[1] ** 0.5)
        latents = self.quantize.get_codebook_entry(codes.flatten(), (rows, side, side, self.width))
        return self.decoder(self.post_quant_conv(latents))


def taming_vqgan(params):
    torch.manual_seed(0)
    return TamingVQGAN(params)
