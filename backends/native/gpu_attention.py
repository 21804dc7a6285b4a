"""Attention on GPUs in fused kernels: causal without a mask for text and `full`, with a bias for other patterns.

Measured on an H200, 128 samples of L16, forward and backward pass of a layer: with a bias 3.1 ms by PyTorch's own
kernel, 1.6 by cuDNN's, 2.0 by FlexAttention; causal 1.3 by PyTorch's, 1.0 by cuDNN's. In blocks of flash attention, one
for the text and one for rows or columns of codes, an update took 1.25 times as long as with PyTorch's bias.
"""

import logging
from typing import Dict

import torch
from torch import Tensor
from torch.nn import functional as F

from models.dalle import DALLE
from models.transformer import attend, pattern_mask
from utils.errors import first_line

logger = logging.getLogger("minidalle")
ALIGNMENT = 16  # values between the rows of a bias, which kernels otherwise copy


def use_fused_attention(model: DALLE, dtype: torch.dtype) -> None:
    """Set how the layers of a DALLE on a GPU attend to earlier positions of the same pass.

    Args:
        dtype: of queries, keys and values; for another one the bias is converted in each pass.
    """
    patterns: Dict[bytes, FusedAttention] = {}
    for layer in model.transformer.layers:
        attention = layer.attention
        name = attention.mask.cpu().numpy().tobytes()
        if name not in patterns:  # layers of one pattern share its bias
            patterns[name] = FusedAttention(attention.mask, model.text_seq_len + 1, model.fmap_size, dtype)
        attention.attend = patterns[name]


class FusedAttention:
    """models.transformer.attend for one pattern.

    Args:
        mask: bool (N, N), on the GPU.
        text_len: length of the text, `<bos>` included.
    """

    def __init__(self, mask: Tensor, text_len: int, side: int, dtype: torch.dtype):
        self.text_len = text_len
        self.is_full = torch.equal(mask.cpu(), pattern_mask("full", text_len, side))
        self.bias = aligned_bias(mask, dtype)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
        """See models.transformer.attend."""
        length = query.shape[2]
        if not query.is_cuda or length != keys.shape[2]:
            return attend(query, keys, values, mask, dropout)
        if self.is_full or length <= self.text_len:
            return F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout, is_causal=True)
        bias = self.bias if query.dtype == self.bias.dtype else self.bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias[:length, :length], dropout_p=dropout)


def use_cudnn_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Let PyTorch take cuDNN's attention, if that gives here what other kernels give, the gradient included."""
    enable = getattr(torch.backends.cuda, "enable_cudnn_sdp", None)  # from torch 2.5 on
    if enable is None or dtype == torch.float32:
        return
    mask = pattern_mask("axial_col", 32, 6).to(device)  # (68, 68)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 2, len(mask), 64, generator=random).to(device, dtype)
    results = []
    try:
        for used in (False, True):
            enable(used)
            qkv = [x.clone().requires_grad_() for x in inputs]
            query, keys, values = qkv
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=aligned_bias(mask, dtype))
            gradient = torch.autograd.grad(out.float().square().sum(), qkv)
            results.append(torch.stack((out, *gradient)).detach().float())
        error = float((results[0] - results[1]).abs().max() / results[0].abs().max())
    except RuntimeError as reason:
        enable(False)
        logger.info("attention without cuDNN, which only costs speed: %s", first_line(reason))
        return
    if not error < 0.05:
        enable(False)
        logger.warning("cuDNN's attention differs from other kernels' by %.3f here; it is not used", error)


def aligned_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to scores (N, N): 0 if the mask is True, −inf if not. Kernels need not copy its rows."""
    count = len(mask)
    bias = torch.full((count, -(-count // ALIGNMENT) * ALIGNMENT), float("-inf"), dtype=dtype, device=mask.device)
    return bias[:, :count].masked_fill_(mask, 0)
