"""Causal self-attention over `<bos>` + text + image codes, its four patterns, and the key/value cache.

A pattern is a fixed boolean mask over one dense attention, not a class of its own: the four equal the sparse
attentions of DALLE-pytorch to 1e-7, and each gets the cache and the fast kernels for nothing. What surrounds attention
in a layer (norms, LayerScale, feed-forward) is transformer.py's.
"""

import torch
from torch import nn
from torch.nn import functional as F

PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
CONV_KERNEL = 5  # side of the conv_like window, in codes


def pattern_mask(pattern, text_len, fmap_size):
    """What each position may look at: bool (N, N), True where query row may see key column, N = text_len + fmap_size²
    − 1.

    text_len counts `<bos>`. Codes follow the text row by row; the last code is never an input, hence the − 1. Text
    sees earlier text. A code sees all text and, up to and with itself: every code (full), its row (axial_row), its
    column (axial_col) or the 5×5 window that ends in it, up and to the left (conv_like, as dalle-pytorch 1.6 pads it).
    """
    if pattern not in PATTERNS:
        raise ValueError(f"unknown attention type '{pattern}'; known are {', '.join(PATTERNS)}")
    length = text_len + fmap_size**2
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    code = torch.arange(fmap_size**2)
    row, col = code // fmap_size, code % fmap_size
    up, left = row[:, None] - row[None, :], col[:, None] - col[None, :]  # how far the key lies up and left of the query
    window = (up >= 0) & (up < CONV_KERNEL) & (left >= 0) & (left < CONV_KERNEL)
    seen = {
        "full": torch.ones(len(code), len(code), dtype=torch.bool),
        "axial_row": row[:, None] == row[None, :],
        "axial_col": col[:, None] == col[None, :],
        "conv_like": window,
    }[pattern]
    mask = causal.clone()
    mask[text_len:, text_len:] &= seen
    return mask[:-1, :-1].contiguous()


class KeyValueCache:
    """Keys and values of one layer for the positions computed so far, in buffers of the final length (B, H, length,
    D).
    """

    def __init__(self, length):
        self.length = length
        self.keys = self.values = None

    def put(self, keys, values, mask, start):
        """Write (B, H, n, D) at position `start` → keys, values of everything up to there, (B, H, start + n, D) each,
        and what the new positions may see of it: bool (n, start + n) of the layer's mask (N, N).
        """
        batch, heads, count, dim_head = keys.shape
        if self.keys is None:  # only now is the dtype known: autocast decides it
            self.keys = keys.new_empty(batch, heads, self.length, dim_head)
            self.values = torch.empty_like(self.keys)
        stop = start + count
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop], mask[start:stop, :stop]


class PrefixCache:
    """A layer's cache for the first pass: it only remembers keys and values (B, H, n, D)."""

    def put(self, keys, values, mask, start):
        self.keys, self.values = keys, values
        length = keys.shape[2]
        return keys, values, mask[:length, :length]


def attend(query, keys, values, mask, dropout=0.0):
    """softmax(q·kᵀ/√D)·v with `mask` (n, m) bool, softmax in fp32; (B, H, n, D) in and out."""
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
    # On a CPU the backward pass of the fused kernel with a mask costs more than plain batched products.
    scores = query * query.shape[-1] ** -0.5 @ keys.transpose(-1, -2)  # (B, H, n, m)
    scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return F.dropout(weights, dropout) @ values if dropout else weights @ values


class Attention(nn.Module):
    """Multi-head attention of one pattern; accepts a cache, owns none."""

    def __init__(self, dim, *, heads, dim_head, mask, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.dropout = dropout
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        self.register_buffer("mask", mask, persistent=False)  # (N, N)

    def forward(self, x, cache=None, start=0):
        """x (B, n, dim) stands at positions start … start + n; what came before is in `cache` (see its put)."""
        batch, length, _ = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.heads, self.dim_head)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        mask = self.mask[:length, :length]
        if cache is not None:
            keys, values, mask = cache.put(keys, values, self.mask, start)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, keys, values, mask, dropout)
        return self.to_out(out.transpose(1, 2).reshape(batch, length, self.heads * self.dim_head))
