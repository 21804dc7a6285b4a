"""Encode and decode images with a VQGAN, in the memory layout and precision that are fast on a CPU or GPU.

A copy of the network, with channels innermost and fused activations, computes what models/vae.py does. Codes are what
a DALL-E learns, so they are always computed in fp32: in bf16, one in two hundred changed for a trained VQGAN on
photographs.
"""

import copy
from typing import Callable, Optional

import torch
from taming.modules.diffusionmodules.model import ResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

from models.vae import VQGanVAE

CACHE_BYTES = 16 * 2**20  # a layer's output that fits a CPU's cache; larger batches are slower than one by one
GPU_BATCH = 32  # images; the widest layer of the official network then takes 0.5 GB in bf16


class FusedResnetBlock(ResnetBlock):
    """Taming's block for inference: x · sigmoid(x) in one pass over memory, sums in place."""

    def forward(self, x: Tensor, temb: Optional[Tensor]) -> Tensor:
        """Compute what ResnetBlock computes, without dropout; x (B, C, H, W) is overwritten."""
        out = self.conv1(F.silu(self.norm1(x), inplace=True))
        out = self.conv2(F.silu(self.norm2(out), inplace=True))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return out.add_(x)


def encoder(vae: VQGanVAE, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels to codes, see `Backend.encode`."""
    fast = fast_copy(vae, "decoder", torch.float32, device)
    channels, side = fast.model.encoder.ch, fast.model.encoder.resolution
    at_once = max(1, CACHE_BYTES // (4 * channels * side**2)) if device.type == "cpu" else GPU_BATCH

    def encode(pixels: Tensor) -> Tensor:
        return torch.cat([fast(part.to(device)).cpu() for part in pixels.split(at_once)])

    return encode


def decoder(vae: VQGanVAE, device: torch.device, precision: str) -> Callable[..., Tensor]:
    """Return a function from codes to pixels, see `Backend.decode`.

    On a CPU an image does not depend on the others in its batch. For a trained VQGAN, bf16 differs from fp32 by 0.2 of
    255 in the mean (60 dB). fp16 is not used because attention could overflow.
    """
    fast = fast_copy(vae, "encoder", torch.bfloat16 if precision == "bf16" else torch.float32, device)
    at_once = 1 if device.type == "cpu" else GPU_BATCH  # the rounding of convolutions depends on the batch size

    def decode(codes: Tensor, rows: Optional[int] = None) -> Tensor:
        return torch.cat([fast.decode(part.to(device), rows).cpu() for part in codes.split(at_once)])

    return decode


def fast_copy(vae: VQGanVAE, without: str, dtype: torch.dtype, device: torch.device) -> VQGanVAE:
    """Return a copy with fused blocks and channels-last weights; `without` names the half to omit."""
    left_out = {id(getattr(vae.model, without)): nn.Identity()}  # deepcopy believes that it has copied these
    fast = copy.deepcopy(vae, left_out).to(device, dtype).to(memory_format=torch.channels_last)
    for module in fast.modules():
        if type(module) is ResnetBlock:
            module.__class__ = FusedResnetBlock
    return fast
