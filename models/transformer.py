"""The blocks of the decoder, and the Transformer that stacks them.

Module names follow the checkpoint layout (`layers.<n>.<0|1>.fn.fn…`), which is why each block is wrapped twice.
"""

from itertools import cycle, islice
from typing import Any, List, Optional, Sequence

from torch import Tensor, nn, ones
from torch.nn import functional as F

from models.attention import Attention, pattern_mask


class LayerScale(nn.Module):
    """Multiplies a block's output by a trained scale for each channel (CaiT, arXiv 2103.17239).

    Args:
        depth: number of the layer, from 1; the initial scale is small, and smaller in deeper layers.
    """

    fn: Any

    def __init__(self, dim: int, depth: int, fn: nn.Module):
        super().__init__()
        init = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        self.scale = nn.Parameter(init * ones(1, 1, dim))
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
