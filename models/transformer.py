"""The transformer: attention with its patterns and its key/value cache, and the layers around it.

A pattern is a fixed boolean mask over one dense attention, not another class: each equals the sparse attention that it
stands for to 1e-7, and each can use the cache and the fast kernels. Module names follow the checkpoint layout
(`layers.<n>.<0|1>.fn.fn…`), which is why each block is wrapped twice.
"""

import math
from itertools import cycle, islice
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple, Union, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# conv_up_left is the conv_like of dalle-pytorch from 1.5 on, and of our checkpoints before utils.checkpoint.LAYOUT 2.
PATTERNS = ("full", "axial_row", "axial_col", "conv_like", "conv_up_left")
CONV_KERNEL = 5  # side of the window of conv_like and conv_up_left, in codes
Rotation = Tuple[Tensor, Tensor]  # cosines and sines (n, R), see rotate
Start = Union[int, Tensor]  # the first of some positions; a tensor (1,) on IPUs


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
    up, left = (row[:, None] - row[None, :], col[:, None] - col[None, :])  # distance from the query to the key
    visible = {
        "full": torch.ones(len(code), len(code), dtype=torch.bool),
        "axial_row": up == 0,
        "axial_col": left == 0,
        "conv_like": (up <= CONV_KERNEL // 2) & (left.abs() <= CONV_KERNEL // 2),
        "conv_up_left": (up < CONV_KERNEL) & (left >= 0) & (left < CONV_KERNEL),
    }[pattern]
    causal[text_len:, text_len:] &= visible
    return causal[:-1, :-1].contiguous()


def rotary_angles(text_len: int, fmap_size: int, dim_head: int) -> Tensor:
    """Return the angles by which `rotate` turns pairs of channels: (1, text_len + fmap_size², R), R ≤ dim_head.

    A third of the channels each turn by the place in the text, the row and the column (arXiv 2104.09864). As in
    dalle-pytorch, codes stand at place 8192 of the text, and text at row and column −10 of an image from −1 to 1.
    """
    count = dim_head // 3 // 2
    by_place = 10000 ** (-2 * torch.arange(count) / (dim_head // 3))
    by_side = torch.linspace(1, 5, count) * math.pi
    grid = torch.linspace(-1, 1, fmap_size)
    outside = torch.full((text_len,), -10.0)
    places = torch.cat((torch.arange(float(text_len)), torch.full((fmap_size**2,), 8192.0)))
    rows = torch.cat((outside, grid.repeat_interleave(fmap_size)))
    cols = torch.cat((outside, grid.repeat(fmap_size)))
    angles = torch.cat((places[:, None] * by_place, rows[:, None] * by_side, cols[:, None] * by_side), dim=1)
    return angles.repeat_interleave(2, dim=1)[None]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first R channels of x (…, n, D), in pairs, by the cosines and sines (n, R) of rotary_angles, in fp32."""
    cos, sin = rotation
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = turned * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class LayerCache(Protocol):
    """Keys and values of one layer for the positions so far."""

    def append(self, keys: Tensor, values: Tensor, mask: Tensor, start: Any) -> Tuple[Tensor, Tensor, Tensor]:
        """Store keys and values (B, H, n, D) from position `start` on, a Start.

        Args:
            mask: the layer's mask, bool (N, N).

        Returns:
            Keys and values of all positions so far, (B, H, start + n, D) each, and the mask of the new positions, bool
            (n, start + n).
        """


class KeyValueCache:
    """A LayerCache with buffers of the final length (B, H, length, D).

    Attributes:
        shifted: what TokenShift needs of earlier positions, for the attention and the feed-forward.
    """

    def __init__(self, length: int):
        self.length = length
        self.shifted: Dict["TokenShift", Tensor] = {}
        self.keys: Any = None
        self.values: Any = None

    def append(self, keys: Tensor, values: Tensor, mask: Tensor, start: int) -> Tuple[Tensor, Tensor, Tensor]:
        """See LayerCache."""
        batch, heads, count, dim_head = keys.shape
        if self.keys is None:  # autocast decides the dtype, so it is known only now
            self.keys = keys.new_empty(batch, heads, self.length, dim_head)
            self.values = torch.empty_like(self.keys)
        stop = start + count
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop], mask[start:stop, :stop]


class PrefixCache:
    """A LayerCache for the first pass, which only remembers keys and values (B, H, n, D)."""

    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor, mask: Tensor, start: int) -> Tuple[Tensor, Tensor, Tensor]:
        """See LayerCache."""
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
        attend: the attention of a pass from the first position on. The default is attend; models/pipeline_dalle.py
            sets equivalents that fit an IPU, backends/native/gpu_attention.py those with a GPU's fused kernels.
    """

    mask: Tensor  # bool (N, N)
    attend = staticmethod(attend)

    def __init__(self, dim: int, *, heads: int, dim_head: int, mask: Tensor, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dim_head, self.dropout = heads, dim_head, dropout
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        self.register_buffer("mask", mask, persistent=False)

    def forward(
        self,
        x: Tensor,
        cache: Optional[LayerCache] = None,
        start: Start = 0,
        rotation: Optional[Rotation] = None,
    ) -> Tensor:
        """Attend from x (B, n, dim) at positions start … start + n; earlier positions are in `cache`.

        Args:
            rotation: cosines and sines (n, R) for `rotate`, which turns queries, keys and values.
        """
        batch, length, _ = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.heads, self.dim_head).permute(2, 0, 3, 1, 4)
        query, keys, values = qkv if rotation is None else rotate(qkv, rotation)  # (B, H, n, D) each
        dropout = self.dropout if self.training else 0.0
        mask = self.mask[:length, :length]
        if cache is not None:
            keys, values, mask = cache.append(keys, values, self.mask, start)
        is_first = cache is None or (isinstance(start, int) and start == 0)  # an IPU's `start` has no value yet
        out = (self.attend if is_first else attend)(query, keys, values, mask, dropout)
        return self.to_out(out.transpose(1, 2).reshape(batch, length, self.heads * self.dim_head))


class LayerScale(nn.Module):
    """Multiplies a block's output by a trained scale for each channel, small at first (CaiT, arXiv 2103.17239)."""

    fn: Any

    def __init__(self, dim: int, depth: int, fn: nn.Module):
        super().__init__()
        init = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        self.scale = nn.Parameter(init * torch.ones(1, 1, dim))
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(x, **kwargs) * self.scale


class TokenShift:
    """Replaces half of the channels by those of neighbors: the token before, or the codes above and to the left.

    Args:
        text_len: length of the text, `<bos>` included.
    """

    def __init__(self, text_len: int, fmap_size: int):
        self.text_len, self.side = text_len, fmap_size

    def __call__(self, x: Tensor, cache: Optional[KeyValueCache] = None, start: int = 0) -> Tensor:
        """Shift x (B, n, dim) at positions start … start + n; earlier positions are in `cache`."""
        batch, length, dim = x.shape
        earlier = x.new_zeros(batch, self.side, dim) if cache is None or not start else cache.shifted[self]
        seen = torch.cat((earlier, x), dim=1)  # (B, side + n, dim)
        if cache is not None:
            cache.shifted[self] = seen[:, -self.side :]
        above, before = seen[:, :length], seen[:, self.side - 1 : -1]
        place = torch.arange(start - self.text_len, start - self.text_len + length, device=x.device)[:, None]
        half, quarter = -(-dim // 2), -(-dim // 4)  # as torch.chunk divides an odd number of channels
        text = torch.cat((before[..., :half], x[..., half:]), dim=-1)
        above = above[..., :quarter].masked_fill(place < self.side, 0)
        left = before[..., quarter : 2 * quarter].masked_fill(place % self.side == 0, 0)
        return torch.where(place < 0, text, torch.cat((above, left, x[..., 2 * quarter :]), dim=-1))


class PreNorm(nn.Module):
    """Normalizes a block's input, shifts it and, with `sandwich`, normalizes its output (CogView, arXiv 2105.13290)."""

    fn: Any
    norm_out: nn.Module

    def __init__(self, dim: int, fn: nn.Module, sandwich: bool = False, shift: Optional[TokenShift] = None):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.norm_out = nn.LayerNorm(dim) if sandwich else nn.Identity()
        self.fn = fn
        self.shift = shift

    def prepare(self, x: Tensor, cache: Optional[LayerCache] = None, start: Start = 0) -> Tensor:
        """Return the block's input."""
        x = self.norm(x)
        # Only CachedStepper samples with shifted tokens.
        return x if self.shift is None else self.shift(x, cast(KeyValueCache, cache), cast(int, start))

    def forward(self, x: Tensor, cache: Optional[LayerCache] = None, start: Start = 0, **kwargs: Any) -> Tensor:
        return self.norm_out(self.fn(self.prepare(x, cache, start), cache=cache, start=start, **kwargs))


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

    def forward(self, x: Tensor, cache: Optional[LayerCache] = None, start: Start = 0) -> Tensor:
        """Compute (B, n, dim) from as much; positions do not matter to it."""
        return self.net(x)


def compute_layer(
    layer: "Layer",
    x: Tensor,
    rotation: Optional[Rotation] = None,
    cache: Optional[LayerCache] = None,
    start: Start = 0,
) -> Tensor:
    """Add the attention's output to x, then the feed-forward's: (B, n, dim) in and out.

    A reversible layer has two streams (2, B, n, dim), each of which is changed by a block of the other one (RevNet,
    arXiv 1707.04585).
    """
    attention, feed_forward = layer
    if layer.reversible:
        first, second = x
        first = first + attention(second, cache=cache, start=start, rotation=rotation)
        return torch.stack((first, second + feed_forward(first, cache=cache, start=start)))
    x = x + attention(x, cache=cache, start=start, rotation=rotation)
    return x + feed_forward(x, cache=cache, start=start)


class Layer(nn.ModuleList):
    """Attention and feed-forward, as residual blocks.

    Attributes:
        reversible: whether it has two streams, see compute_layer.
        compute: the operation of a pass without a cache, called as compute(layer, x, rotation). The default is
            compute_layer; backends/native/fast_layers.py sets a faster equivalent on the instances of a model that
            trains.
    """

    reversible = False
    compute = staticmethod(compute_layer)

    @property
    def attention(self) -> Attention:
        """The attention alone, without norm and scale."""
        return self[0].fn.fn  # type: ignore[union-attr, return-value]

    def forward(
        self, x: Tensor, rotation: Optional[Rotation] = None, cache: Optional[LayerCache] = None, start: Start = 0
    ) -> Tensor:
        """Apply the layer to x (B, n, dim), which stands at positions start … start + n."""
        if cache is not None:
            return compute_layer(self, x, rotation, cache, start)
        return self.compute(self, x, rotation)


class Transformer(nn.Module):
    """A stack of `depth` layers over (B, N, dim); the attention patterns of `attn_types` repeat over them.

    Args:
        rotary_emb: turn queries, keys and values by their positions, see rotary_angles.
        shift_tokens: give each position channels of its neighbors, see TokenShift.
        stable: divide the output by its largest channel, and pass a tenth of the gradient to the embeddings (CogView,
            arXiv 2105.13290).
        reversible: two streams, see compute_layer; the result is their mean.
        shared_attn_ids, shared_ff_ids: a number for each layer, repeated over them; layers of one number share the
            weights of their attention or feed-forward, but not the norms and scales around it.
    """

    layers: Any  # an nn.ModuleList of Layer
    pos_emb: Tensor  # a part of checkpoints, because dalle-pytorch trained with rounded angles in fp16

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        text_len: int,
        fmap_size: int,
        attn_types: Sequence[str] = ("full",),
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        sandwich_norm: bool = False,
        rotary_emb: bool = False,
        shift_tokens: bool = False,
        stable: bool = False,
        reversible: bool = False,
        shared_attn_ids: Optional[Sequence[int]] = None,
        shared_ff_ids: Optional[Sequence[int]] = None,
    ):
        super().__init__()
        self.stable, self.reversible, self.shift_tokens = stable, reversible, shift_tokens
        masks = {pattern: pattern_mask(pattern, text_len, fmap_size) for pattern in attn_types}
        attentions: Dict[int, Tuple[str, Attention]] = {}
        feed_forwards: Dict[int, FeedForward] = {}
        settings = attn_types, shared_attn_ids or range(depth), shared_ff_ids or range(depth)
        self.layers = nn.ModuleList()
        for number, (pattern, attn_id, ff_id) in enumerate(islice(zip(*map(cycle, settings)), depth), start=1):
            if attn_id not in attentions:
                attention = Attention(dim, heads=heads, dim_head=dim_head, mask=masks[pattern], dropout=attn_dropout)
                attentions[attn_id] = pattern, attention
            if ff_id not in feed_forwards:
                feed_forwards[ff_id] = FeedForward(dim, ff_dropout)
            first_pattern, attention = attentions[attn_id]
            if first_pattern != pattern:
                raise ValueError(f"layer {number} has {pattern} and shares the attention of one with {first_pattern}")
            layer = Layer()
            layer.reversible = reversible
            for block in (attention, feed_forwards[ff_id]):
                shift = TokenShift(text_len, fmap_size) if shift_tokens else None
                layer.append(LayerScale(dim, number, PreNorm(dim, block, sandwich_norm, shift)))
            self.layers.append(layer)
        self.register_buffer("pos_emb", rotary_angles(text_len, fmap_size, dim_head) if rotary_emb else None)

    @property
    def is_plain(self) -> bool:
        """Whether rotary_emb, stable, reversible and shift_tokens are off; with them, only CachedStepper samples."""
        return self.pos_emb is None and not (self.stable or self.reversible or self.shift_tokens)

    def rotation(self, start: int, length: int) -> Optional[Rotation]:
        """Return cosines and sines (length, R) for positions start … start + length; None without rotary_emb."""
        if self.pos_emb is None:
            return None
        angles = self.pos_emb[0, start : start + length]
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, cache: Optional[List[Any]] = None, start: int = 0) -> Tensor:
        """Apply all layers to x (B, n, dim) at positions start … start + n; `cache` has one cache for each layer."""
        rotation = self.rotation(start, x.shape[1])
        if self.stable:
            x = 0.1 * x + 0.9 * x.detach()
        if self.reversible:
            x = torch.stack((x, x))
        for number, layer in enumerate(self.layers):
            x = layer(x, rotation, cache=cache[number] if cache else None, start=start)
        if self.reversible:
            x = x.mean(0)
        return x / x.amax(-1, keepdim=True).detach() if self.stable else x
