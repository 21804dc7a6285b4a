"""Import dalle-pytorch 1.6.6 and taming's VQGAN, without packages that only their scripts need."""

import contextlib
import importlib
import importlib.util
import sys
import types
from typing import Any, Dict, Optional

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn


def load() -> Optional[Any]:
    """Return the module dalle_pytorch.dalle_pytorch, or None if it is not installed (pip install --no-deps)."""
    needed = ("dalle_pytorch", "axial_positional_embedding", "rotary_embedding_torch")
    if any(importlib.util.find_spec(name) is None for name in needed):
        return None
    empty: Dict[str, Dict[str, Any]] = {
        "pkg_resources": {"get_distribution": lambda name: types.SimpleNamespace(version="1.6.6")},
        "youtokentome": {},
        "transformers": {"BertTokenizer": None},
        "taming.models.vqgan": {"VQModel": None, "GumbelVQ": None},
        "omegaconf": {"OmegaConf": None},
        "requests": {},
    }
    before = {name: sys.modules.get(name) for name in empty}
    for name, members in empty.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        return importlib.import_module("dalle_pytorch.dalle_pytorch")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def build_dalle(module: Any, vae: Any, **sizes: Any) -> Any:
    """Return a dalle-pytorch DALLE with the sizes of ours; its image tokenizer is small and costs next to nothing."""
    small = module.DiscreteVAE(
        image_size=vae.image_size, num_layers=vae.num_layers, num_tokens=vae.num_tokens, codebook_dim=8, hidden_dim=8
    )
    return module.DALLE(vae=small, rotary_emb=False, shift_tokens=False, **sizes)


class TamingVQGAN(nn.Module):
    """taming's VQModel from its own parts, untrained, in fp32, without Lightning and without the loss."""

    def __init__(self, params: Dict[str, Any]):
        super().__init__()
        torch.manual_seed(0)
        ddconfig, self.width = params["ddconfig"], params["embed_dim"]
        with contextlib.redirect_stdout(None):  # the Decoder prints its shape
            self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quantize = VectorQuantizer2(params["n_embed"], self.width, beta=0.25, sane_index_shape=True)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], self.width, 1)
        self.post_quant_conv = nn.Conv2d(self.width, ddconfig["z_channels"], 1)
        self.eval().requires_grad_(False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Convert pixels (B, 3, S, S) in [-1, 1] to codes (B, h, w)."""
        return self.quantize(self.quant_conv(self.encoder(pixels)))[2][2]

    def decode(self, codes: Tensor) -> Tensor:
        """Convert codes (B, h * h) to pixels (B, 3, S, S), roughly in [-1, 1]."""
        rows, side = len(codes), int(codes.shape[1] ** 0.5)
        latents = self.quantize.get_codebook_entry(codes.flatten(), (rows, side, side, self.width))
        return self.decoder(self.post_quant_conv(latents))
