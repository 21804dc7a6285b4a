"""Causal self-attention over `<bos>` + text + image codes, its four patterns, and the key/value cache.

A pattern is a fixed boolean mask over one dense attention, not another class: all four equal the sparse attentions
of DALLE-pytorch to 1e-7, and each can use the cache and the fast kernels.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
CONV_KERNEL = 5  # side of the conv_like window, in codes


def pattern_mask(pattern: str, text_len: int, fmap_size: int) -> Tensor:
    """Return what each position may see: bool (N, N), N = text_len + fmap_size² − 1; True if the row sees the column.

    Codes follow the text row by row; the last code is never an input, hence the − 1. Text sees earlier text. A code
    sees all text and, of the codes up to itself: all (full), its row (axial_row), its column (axial_col), or the 5×5
    window that ends in it, up and to the left (conv_like, with the padding of dalle-pytorch 1.6).

    Args:
        text_len: length of the text, `<bos>` included.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"unknown attention type '{pattern}'; choose from {', '.join(PATTERNS)}")
    length = text_len + fmap_size**2
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    code = torch.arange(fmap_size**2)
    row, col = code // fmap_size, code % fmap_size
    up, left = (
        row[:, None] - row[None, :],
        col[:, None] - col[None, :],
    )  # distance from the query to the key
    visible = {
        "full": torch.ones(len(code), len(code), dtype=torch.bool),
        "axial_row": up == 0,
        "axial_col": left == 0,
        "conv_like": (up >= 0) & (up < CONV_KERNEL) & (left >= 0) & (left < CONV_KERNEL),
    }[pattern]
    causal[text_len:, text_len:] &= visible
    return causal[:-1, :-1].contiguous()


class KeyValueCache:
    """Keys and values of one layer for the positions so far, in buffers of the final length (B, H, length, D)."""

    def __init__(self, length: int):
        self.length = length
        self.keys: Any = None
        self.values: Any = None

    def append(self, keys: Tensor, values: Tensor, mask: Tensor, start: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Write keys and values (B, H, n, D) at position `start`.

        Args:
            mask: the layer's mask, bool (N, N).

        Returns:
            Keys and values of all positions so far, (B, H, start + n, D) each, and the mask of the new positions, bool
            (n, start + n).
        """
        batch, heads, count, dim_head = keys.shape
        if self.keys is None:  # autocast decides the dtype, so it is known only now
            self.keys = keys.new_empty(batch, heads, self.length, dim_head)
            self.values = torch.empty_like(self.keys)
        stop = start + count
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop], mask[start:stop, :stop]


class PrefixCache:
    """A layer's cache for the first pass, which only remembers keys and values (B, H, n, D)."""

    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor, mask: Tensor, start: int) -> Tuple[Tensor, Tensor, Tensor]:
        """See KeyValueCache.append."""
        self.keys, self.values = keys, values
        length = keys.shape[2]
        return keys, values, mask[:length, :length]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute softmax(q·kᵀ/√D)·v with `mask` bool (n, m), softmax in fp32; (B, H, n, D) in and out."""
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
    # On a CPU the backward pass of the fused kernel with a mask costs more than plain batched products.
    scores = query * query.shape[-1] ** -0.5 @ keys.transpose(-1, -2)  # (B, H, n, m)
    scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return F.dropout(weights, dropout) @ values if dropout else weights @ values


class Attention(nn.Module):
    """Multi-head attention of one pattern."""

    mask: Tensor  # bool (N, N)

    def __init__(self, dim: int, *, heads: int, dim_head: int, mask: Tensor, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dim_head, self.dropout = heads, dim_head, dropout
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, cache: Optional[Any] = None, start: int = 0) -> Tensor:
        """Attend from x (B, n, dim) at positions start … start + n; earlier positions are in `cache`."""
        batch, length, _ = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.heads, self.dim_head)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        mask = self.mask[:length, :length]
        if cache is not None:
            keys, values, mask = cache.append(keys, values, self.mask, start)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, keys, values, mask, dropout)
        return self.to_out(out.transpose(1, 2).reshape(batch, length, self.heads * self.dim_head))
