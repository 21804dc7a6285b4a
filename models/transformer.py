"""The transformer: attention with its patterns and its key/value cache, and the layers around it.

A pattern is a fixed boolean mask over one dense attention, not another class: each equals the sparse attention that it
stands for to 1e-7, and each can use the cache and the fast kernels. Module names follow the checkpoint layout
(`layers.<n>.<0|1>.fn.fn…`), which is why each block is wrapped twice.
"""

from itertools import cycle, islice
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# conv_up_left is the conv_like of dalle-pytorch 1.x, and of train.py's checkpoints before utils.checkpoint.LAYOUT 2.
PATTERNS = ("full", "axial_row", "axial_col", "conv_like", "conv_up_left")
CONV_KERNEL = 5  # side of the window of conv_like and conv_up_left, in codes


def pattern_mask(pattern: str, text_len: int, fmap_size: int) -> Tensor:
    """Return what each position may see: bool (N, N), N = text_len + fmap_size² − 1; True if the row sees the column.

    Codes follow the text row by row; the last code is never an input, hence the − 1. Text sees earlier text. A code
    sees all text and, of the codes up to itself: all (full), its row (axial_row), its column (axial_col), the 5×5
    window around it (conv_like), or the 5×5 window whose lower right corner it is (conv_up_left).

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
        "conv_like": (up <= CONV_KERNEL // 2) & (left.abs() <= CONV_KERNEL // 2),
        "conv_up_left": (up < CONV_KERNEL) & (left >= 0) & (left < CONV_KERNEL),
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
    """Multi-head attention of one pattern.

    Attributes:
        attend: the attention of a pass without a cache; models/pipeline_dalle.py sets equivalents that fit an IPU.
    """

    mask: Tensor  # bool (N, N)
    attend = staticmethod(attend)

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
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            out = self.attend(query, keys, values, self.mask[:length, :length], dropout)
        else:
            keys, values, mask = cache.append(keys, values, self.mask, start)
            out = attend(query, keys, values, mask, dropout)
        return self.to_out(out.transpose(1, 2).reshape(batch, length, self.heads * self.dim_head))


class LayerScale(nn.Module):
    """Multiplies a block's output by a trained scale for each channel (CaiT, arXiv 2103.17239).

    Args:
        depth: number of the layer, from 1; the initial scale is small, and smaller in deeper layers.
    """

    fn: Any

    def __init__(self, dim: int, depth: int, fn: nn.Module):
        super().__init__()
        init = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        self.scale = nn.Parameter(init * torch.ones(1, 1, dim))
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(x, **kwargs) * self.scale


class PreNorm(nn.Module):
    """Normalizes a block's input and, with `sandwich`, its output, too (CogView, arXiv 2105.13290)."""

    fn: Any
    norm_out: nn.Module

    def __init__(self, dim: int, fn: nn.Module, sandwich: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.norm_out = nn.LayerNorm(dim) if sandwich else nn.Identity()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.norm_out(self.fn(self.norm(x), **kwargs))


class GEGLU(nn.Module):
    """Gates one half of the channels with the GELU of the other (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, 2·d) to (…, d)."""
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Linear to 8·dim channels, GEGLU, dropout, and linear back to dim."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 8 * dim), GEGLU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def compute_layer(layer: "Layer", x: Tensor, cache: Optional[Any] = None, start: int = 0) -> Tensor:
    """Add the attention's output to x, then the feed-forward's: (B, n, dim) in and out."""
    attention, feed_forward = layer
    x = x + attention(x, cache=cache, start=start)
    return x + feed_forward(x)


class Layer(nn.ModuleList):
    """Attention and feed-forward, as residual blocks.

    Attributes:
        compute: the operation of a pass without a cache, called as compute(layer, x). The default is compute_layer;
            backends/native/fast_layers.py sets a faster equivalent on the instances of a model that trains.
    """

    compute = staticmethod(compute_layer)

    def forward(self, x: Tensor, cache: Optional[Any] = None, start: int = 0) -> Tensor:
        """Apply the layer to x (B, n, dim), which stands at positions start … start + n."""
        if cache is not None:
            return compute_layer(self, x, cache, start)
        return self.compute(self, x)


class Transformer(nn.Module):
    """A stack of `depth` layers over (B, N, dim); the attention patterns of `attn_types` repeat over them."""

    layers: Any  # an nn.ModuleList of Layer

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        text_len: int,
        fmap_size: int,
        attn_types: Sequence[str],
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        sandwich_norm: bool = False,
    ):
        super().__init__()
        masks = {pattern: pattern_mask(pattern, text_len, fmap_size) for pattern in attn_types}
        self.layers = nn.ModuleList()
        for number, pattern in enumerate(islice(cycle(attn_types), depth), start=1):
            attention = Attention(dim, heads=heads, dim_head=dim_head, mask=masks[pattern], dropout=attn_dropout)
            blocks = attention, FeedForward(dim, ff_dropout)
            self.layers.append(Layer(LayerScale(dim, number, PreNorm(dim, block, sandwich_norm)) for block in blocks))

    def forward(self, x: Tensor, cache: Optional[List[Any]] = None, start: int = 0) -> Tensor:
        """Apply all layers to x (B, n, dim) at positions start … start + n; `cache` has one cache for each layer."""
        for number, layer in enumerate(self.layers):
            x = layer(x, cache=cache[number] if cache else None, start=start)
        return x
