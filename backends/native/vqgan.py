"""A VQGAN on CPUs and CUDA GPUs: pixels → codes and codes → pixels, in the layout and precision that are fast there.

What models/vae.py computes, by a copy of the network whose channels lie innermost and whose activations are one
operation. The copy keeps its own weights; the VQGAN itself is left as it is. Codes are what a DALL-E learns, so they
are computed in fp32 whatever the precision: in bf16 one in two hundred changed for a trained VQGAN on photographs.
"""

import copy

import torch
from taming.modules.diffusionmodules.model import ResnetBlock
from torch import nn
from torch.nn import functional as F

CACHE_BYTES = 16 * 2**20  # a layer's output that a CPU's cache holds; two larger ones at once are slower than in turn
GPU_PICTURES = 32  # at once; the widest layer of the official network then holds 0.5 GB in bf16


class FusedResnetBlock(ResnetBlock):
    """taming's block for inference: x · sigmoid(x) in one pass over memory, sums in place."""

    def forward(self, x, temb):
        out = self.conv1(F.silu(self.norm1(x), inplace=True))
        out = self.conv2(F.silu(self.norm2(out), inplace=True))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return out.add_(x)


def encoder(vae, backend):
    """Backend.encode of a NativeBackend."""
    fast = fast_copy(vae, "decoder", torch.float32, backend.device)
    channels, side = fast.model.encoder.ch, fast.model.encoder.resolution
    at_once = max(1, CACHE_BYTES // (4 * channels * side**2)) if backend.device.type == "cpu" else GPU_PICTURES

    def encode(pixels):
        return torch.cat([fast(part.to(backend.device)).cpu() for part in pixels.split(at_once)])

    return encode


def decoder(vae, backend):
    """Backend.decode of a NativeBackend. On a CPU a picture does not depend on those that it is decoded with.

    bf16 differs from fp32 by 0.2 of 255 in the mean for a trained VQGAN (60 dB). In fp16 attention could overflow.
    """
    fast = fast_copy(vae, "encoder", torch.bfloat16 if backend.precision == "bf16" else torch.float32, backend.device)
    at_once = 1 if backend.device.type == "cpu" else GPU_PICTURES  # sums in convolutions differ with the batch

    def decode(codes, rows=None):
        return torch.cat([fast.decode(part.to(backend.device), rows).cpu() for part in codes.split(at_once)])

    return decode


def fast_copy(vae, without, dtype, device):
    """`vae` on `device` in `dtype`, its blocks fused and its weights channels-last; `without`: the half not needed."""
    left_out = {id(getattr(vae.model, without)): nn.Identity()}  # deepcopy takes these for copied already
    fast = copy.deepcopy(vae, left_out).to(device, dtype).to(memory_format=torch.channels_last)
    for module in fast.modules():
        if type(module) is ResnetBlock:
            module.__class__ = FusedResnetBlock
    return fast
