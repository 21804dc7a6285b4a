"""Attention on GPUs in fused kernels: causal without a mask for text and `full`, with a bias for other patterns.

Blocks of flash attention, one for the text and one for rows or columns of codes, were slower on an H200: an update of
L16 took 1.25 times as long.
"""

from typing import Dict

import torch
from torch import Tensor
from torch.nn import functional as F

from models.dalle import DALLE
from models.transformer import attend, pattern_mask

ALIGNMENT = 16  # values between the rows of a bias, which kernels otherwise copy


def use_fused_attention(model: DALLE, dtype: torch.dtype) -> None:
    """Set how the layers of a DALLE on a GPU attend to earlier positions of the same pass.

    Args:
        dtype: of queries, keys and values; for another one the bias is converted in each pass.
    """
    patterns: Dict[bytes, FusedAttention] = {}
    for layer in model.transformer.layers:
        attention = layer[0].fn.fn
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


def aligned_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to scores (N, N): 0 if the mask is True, −inf if not. Kernels need not copy its rows."""
    count = len(mask)
    bias = torch.full((count, -(-count // ALIGNMENT) * ALIGNMENT), float("-inf"), dtype=dtype, device=mask.device)
    return bias[:, :count].masked_fill_(mask, 0)
