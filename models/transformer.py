"""The decoder's blocks: LayerScale, PreNorm, GEGLU feed-forward, and the Transformer that stacks them.

Embeddings, the head and the loss are dalle.py's. Module names follow the checkpoint layout
(`layers.<n>.<0|1>.fn.fn…`), which is why a block is wrapped twice.
"""

from itertools import cycle, islice
from typing import Any, Optional

from torch import Tensor, nn, ones
from torch.nn import functional as F

from models.attention import Attention, pattern_mask


class LayerScale(nn.Module):
    """f(x)·scale with a learned scale a channel, small at first and smaller the deeper (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim, depth, fn):
        super().__init__()
        init = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6  # depth counts layers from 1
        self.scale = nn.Parameter(init * ones(1, 1, dim))
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) * self.scale


class PreNorm(nn.Module):
    """norm_out?(f(norm(x))); the second norm only with `sandwich` (CogView, arXiv 2105.13290)."""

    def __init__(self, dim, fn, sandwich=False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.norm_out = nn.LayerNorm(dim) if sandwich else nn.Identity()
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.norm_out(self.fn(self.norm(x), **kwargs))


class GEGLU(nn.Module):
    """Half of the channels, gated by the gelu of the other half (arXiv 2002.05202): (…, 2·d) → (…, d)."""

    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """dim → 8·dim → GEGLU → dropout → dim."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 8 * dim), GEGLU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x):
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
    """`depth` layers of attention and feed-forward over (B, N, dim), the patterns of `attn_types` cycled over them."""

    def __init__(
        self,
        *,
        dim,
        depth,
        heads,
        dim_head,
        text_len,
        fmap_size,
        attn_types,
        attn_dropout=0.0,
        ff_dropout=0.0,
        sandwich_norm=False,
    ):
        super().__init__()
        masks = {pattern: pattern_mask(pattern, text_len, fmap_size) for pattern in attn_types}
        self.layers = nn.ModuleList()
        for number, pattern in enumerate(islice(cycle(attn_types), depth), start=1):
            attention = Attention(dim, heads=heads, dim_head=dim_head, mask=masks[pattern], dropout=attn_dropout)
            blocks = attention, FeedForward(dim, ff_dropout)
            self.layers.append(Layer(LayerScale(dim, number, PreNorm(dim, block, sandwich_norm)) for block in blocks))

    def forward(self, x, cache=None, start=0):
        """Apply all layers to x (B, n, dim) at positions start …; `cache` holds a cache for each layer, if given."""
        for number, layer in enumerate(self.layers):
            x = layer(x, cache=cache[number] if cache else None, start=start)
        return x
