"""A fast Stepper: a few positions of a DALLE at a time, with everything prepared that does not depend on the codes.

It computes what the model computes in a pass over everything, but reads less memory for each code:
- keys and values of earlier positions stay in a cache, which keeps only those that a pattern may still see;
- weights are in the form that the machine multiplies fastest (`pack`), with LayerScale folded in;
- each different caption passes through the model once.

CachedStepper is the plain one, for models with options that it lacks.
"""

import contextlib
import time
from itertools import accumulate
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dalle import DALLE
from models.sampling import Sampling, SamplingState, Stepper
from models.transformer import KeyValueCache, Layer, LayerScale, PrefixCache

MOST_ROWS = 256  # of a pass; the time of larger ones grows with their rows on any machine
Norm = Tuple[Tensor, Tensor]  # weight, bias
Product = Callable[[Tensor], Tensor]
# pack(weight (out, in), bias (out,) or None, geglu=None) returns a function of x (B, in) that computes (B, out), or
# (B, out / 2) with LayerKernels.geglu.
Pack = Callable[..., Product]


def plan_slots(mask: Tensor, window: int = 1) -> List[int]:
    """Return the slot of each code's key in a layer's cache; one is used again once no later code sees its key.

    Args:
        mask: bool (n, n), the part of transformer.pattern_mask for codes.
        window: the number of codes that a pass may write before the first of them reads.
    """
    last_needed = [int(column.nonzero().max()) + window - 1 for column in mask.T]
    slots: List[int] = []
    owners: List[int] = []  # the code whose key a slot has
    for place in range(len(mask)):
        free = [slot for slot, owner in enumerate(owners) if last_needed[owner] < place]
        slots.append(min(free, default=len(owners)))
        owners[slots[-1] : slots[-1] + 1] = [place]
    return slots


class SlotTable:
    """The slots of a pattern's caches, with a row for each place of an input.

    Inputs are the codes but the last; what a window has past them goes to a slot that nobody reads.

    Attributes:
        slots: int64 (L,).
        hidden: (L, T + slots), 0 for the text and the keys that an input sees, else −inf.
        ends: how many slots the inputs up to each place use; on the device int64 (L,).
    """

    def __init__(self, mask: Tensor, text_len: int, window: int, device: torch.device, dtype: torch.dtype):
        slots = plan_slots(mask, window)
        self.text_len, self.num_slots = text_len, max(slots) + 2
        self.ends = [end + 1 for end in accumulate([*slots, 0], max)]
        self.ends_on_device = torch.tensor(self.ends, device=device)
        self.slots = torch.tensor([*slots, self.num_slots - 1], device=device)
        hidden = torch.full((len(mask) + 1, text_len + self.num_slots), float("-inf"))
        hidden[:, :text_len] = 0
        query, key = mask.nonzero(as_tuple=True)
        hidden[query, text_len + torch.tensor(slots)[key]] = 0
        self.hidden = hidden.to(device, dtype)


class PlainProduct:
    """A matrix product by F.linear, with weights in `dtype`; given a dtype, the plain Pack."""

    def __init__(self, dtype: torch.dtype, weight: Tensor, bias: Optional[Tensor], geglu: Optional[Product] = None):
        self.weight, self.bias, self.geglu = weight.to(dtype), None if bias is None else bias.to(dtype), geglu

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return out if self.geglu is None else self.geglu(out)


class LayerKernels:
    """The operations of a PackedLayer around its packed products, by PyTorch's."""

    def multiply_normed(
        self, x: Tensor, added: Optional[Tensor], norm: Norm, product: Product
    ) -> Tuple[Tensor, Tensor]:
        """Return x float32 (R, dim) plus what is added, and the product of its layer norm."""
        x, normed = self.add_and_normalize(x, added, norm)
        return x, product(normed)

    def multiply_and_add(self, x: Tensor, inputs: Tensor, product: Product) -> Tuple[Tensor, Optional[Tensor]]:
        """Return x float32 (R, dim) and the product of inputs (R, …), to be added; or their sum and None."""
        return x, product(inputs)

    def add_and_normalize(self, x: Tensor, added: Optional[Tensor], norm: Norm) -> Tuple[Tensor, Tensor]:
        """Return x float32 (R, dim) plus what is added, and its layer norm as the input of a matrix product."""
        x = x if added is None else x + added
        return x, F.layer_norm(x, x.shape[-1:], *norm)

    def look_up(self, table: SlotTable, inputs: Tensor, last: int, sharers: Tensor) -> Any:
        """Return what `attend` needs for inputs at places (B, w), the last of them at `last`.

        Here these are slots (B, w) and the mask (B, 1, w, T + m) to be added to scores. Sharers: see PackedStepper.
        """
        return table.slots[inputs], table.hidden[inputs, : table.text_len + table.ends[last]][:, None]

    def attend(self, qkv: Tensor, cache: Tensor, images: Tensor, found: Any, text_len: int) -> Tensor:
        """Write keys and values to the cache and attend to it.

        Args:
            qkv: (B, w, 3, H, D), in the cache's dtype.
            cache: (2, B, H, T + slots, D).
            images: int64 (B, 1), 0 … B − 1.
            found: what look_up returned.

        Returns:
            (B·w, H·D).
        """
        slots, mask = found
        cache[:, :, :, text_len:][:, images, :, slots] = qkv[:, :, 1:]
        keys, values = cache[:, :, :, : mask.shape[-1]]  # (B, H, T + m, D) each
        out = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, attn_mask=mask)
        return out.transpose(1, 2).reshape(slots.numel(), -1)

    def geglu(self, wide: Tensor) -> Tensor:
        """Return the first half of each row (R, 2F) times the GELU of the second."""
        value, gate = wide.chunk(2, dim=-1)
        return value * F.gelu(gate)


class PackedLayer:
    """One layer at a few positions."""

    def __init__(
        self,
        layer: Layer,
        table: SlotTable,
        pack: Pack,
        cache_dtype: torch.dtype,
        kernels: LayerKernels,
    ):
        self.table, self.cache_dtype, self.kernels = table, cache_dtype, kernels
        attention, feed_forward = cast(List[LayerScale], layer)
        inner, wide, narrow = layer.attention, feed_forward.fn.fn.net[0], feed_forward.fn.fn.net[3]
        self.heads, self.dim_head = inner.heads, inner.dim_head
        self.norm, norm_after = fold_norms(attention)
        self.to_qkv = pack(inner.to_qkv.weight, None)
        self.to_out = normed_after(pack(*fold_scale(cast(nn.Linear, inner.to_out[0]), attention)), norm_after)
        self.ff_norm, norm_after = fold_norms(feed_forward)
        self.wide = pack(wide.weight, wide.bias, kernels.geglu)
        self.narrow = normed_after(pack(*fold_scale(narrow, feed_forward)), norm_after)

    def start(self, prefix: PrefixCache, rows: Tensor) -> None:
        """Fill the cache from a pass over captions and given codes.

        Args:
            prefix: keys and values (captions, H, T + n, D) of that pass.
            rows: int64 (B,), the caption index of each image.
        """
        seen = torch.stack((prefix.keys, prefix.values)).to(self.cache_dtype)[:, rows]  # (2, B, H, T + n, D)
        text_len = self.table.text_len
        shape = *seen.shape[:3], text_len + self.table.num_slots, self.dim_head
        if seen.is_cuda:
            self.cache = seen.new_zeros(shape)
        else:  # what a code adds lies together, because memory is slow at writing many small pieces
            kind, images, heads, positions, dim = shape
            self.cache = seen.new_zeros(images, positions, kind, heads, dim).permute(2, 0, 3, 1, 4)
        self.cache[:, :, :, :text_len] = seen[:, :, :, :text_len]
        slots = self.table.slots[: seen.shape[3] - text_len].tolist()
        owners = {text_len + slot: text_len + place for place, slot in enumerate(slots)}  # the last code of each slot
        self.cache[:, :, :, list(owners)] = seen[:, :, :, list(owners.values())]

    def __call__(
        self, x: Tensor, added: Optional[Tensor], images: Tensor, found: Any
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Compute the layer for a window of codes of each image, and add it to the cache.

        Args:
            x: float32 (B·w, dim).
            added: what is to be added to x, (B·w, dim), if there is something.
            images, found: see LayerKernels.attend.

        Returns:
            x, and what is to be added to it, if there is something.
        """
        kernels = self.kernels
        x, qkv = kernels.multiply_normed(x, added, self.norm, self.to_qkv)
        qkv = qkv.view(len(images), -1, 3, self.heads, self.dim_head).to(self.cache_dtype)
        out = kernels.attend(qkv, self.cache, images, found, self.table.text_len)
        x, added = kernels.multiply_and_add(x, out, self.to_out)
        x, wide = kernels.multiply_normed(x, added, self.ff_norm, self.wide)
        return kernels.multiply_and_add(x, wide, self.narrow)


def fold_norms(block: LayerScale) -> Tuple[Norm, Optional[Norm]]:
    """Return a block's norm, and its second norm, if it has one, with LayerScale folded in."""
    norms: Any = block.fn
    before = norms.norm.weight, norms.norm.bias
    if isinstance(norms.norm_out, nn.Identity):
        return before, None
    scale = block.scale.flatten()
    return before, (norms.norm_out.weight * scale, norms.norm_out.bias * scale)


def fold_scale(linear: nn.Linear, block: LayerScale) -> Tuple[Tensor, Tensor]:
    """Return weight and bias with LayerScale folded in, unless the block has a second norm, which takes it."""
    if not isinstance(block.fn.norm_out, nn.Identity):
        return linear.weight, linear.bias
    scale = block.scale.flatten()
    return linear.weight * scale[:, None], linear.bias * scale


def normed_after(product: Product, norm: Optional[Norm]) -> Product:
    """Return the product with a norm of its result, if there is one."""
    return product if norm is None else lambda x: F.layer_norm(product(x).float(), norm[0].shape, *norm)


def guide(x: Tensor, cond_scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv 2207.12598) to logits, or to what a projection turns into logits.

    Args:
        x: (2B, …), an image's row and then its row for an empty caption; (B, …) if cond_scale is 1.

    Returns:
        (B, …).
    """
    if cond_scale == 1:
        return x
    conditional, unconditional = x.float().unflatten(0, (-1, 2)).unbind(1)
    return unconditional + cond_scale * (conditional - unconditional)


class PackedStepper(Stepper):
    """A Stepper with prepared weights; it holds the caches of one batch at a time.

    Args:
        pack: see Pack.
        cache_dtype: the dtype in which the machine attends fastest.
        autocast: returns the context for the pass over captions, which the model itself computes.
        windows: the numbers of codes of an image that a pass may compute, ascending.
        kernels: the operations of layers around their products; LayerKernels by default.

    Attributes:
        sharers: int64 (B,), the first image with the same caption and given codes, until rows are released. Its
            text in the cache may be read in place of an image's own.
        passes: how often `next` was called.
        seconds: {number of rows: what time_windows found}.
    """

    @torch.no_grad()
    def __init__(
        self,
        dalle: DALLE,
        pack: Pack,
        cache_dtype: torch.dtype,
        autocast: Callable[[], ContextManager] = contextlib.nullcontext,
        windows: Sequence[int] = (1,),
        kernels: Optional[LayerKernels] = None,
    ):
        super().__init__(dalle)
        self.cache_dtype, self.autocast = cache_dtype, autocast
        self.windows, self.passes, self.kernels = windows, 0, kernels or LayerKernels()
        self.seconds: Dict[int, Dict[int, float]] = {}
        text_len, device = dalle.text_seq_len + 1, dalle.text_emb.weight.device
        self.tables: Dict[bytes, SlotTable] = {}
        self.layers: List[PackedLayer] = []
        for layer in dalle.transformer.layers:
            mask = layer.attention.mask.cpu()[text_len:, text_len:]
            pattern = mask.numpy().tobytes()
            if pattern not in self.tables:  # layers of one pattern share it
                self.tables[pattern] = SlotTable(mask, text_len, max(windows), device, cache_dtype)
            self.layers.append(PackedLayer(layer, self.tables[pattern], pack, cache_dtype, self.kernels))
        norm, projection = dalle.to_logits.norm_and_projection
        self.norm = norm.weight, norm.bias
        codes = slice(dalle.num_text_tokens, dalle.num_tokens)
        self.to_logits = pack(projection.weight[codes], projection.bias[codes])

    @torch.no_grad()
    def begin(self, text: Tensor, codes: Tensor, cond_scale: float = 1.0) -> Tensor:
        """See Stepper. Each different row of text and codes passes through the model once."""
        dalle = self.dalle
        self.positions = dalle.image_pos_emb()[0]  # (L, dim)
        different, rows = torch.cat((text, codes), dim=1).unique(dim=0, return_inverse=True)
        text, codes = different.split((text.shape[1], codes.shape[1]), dim=1)
        prefixes = [PrefixCache() for _ in self.layers]
        with self.autocast():
            x = dalle.embed_text(dalle.number_padding(text))
            if codes.shape[1]:
                x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
            x = dalle.transformer(x, cache=prefixes)[:, -1]
        self.images = torch.arange(len(rows), device=rows.device)[:, None]
        self.sharers = (rows[:, None] == rows).int().argmax(1)
        for layer, prefix in zip(self.layers, prefixes):
            layer.start(prefix, rows)
        return self.compute_logits(x.float()[rows], None, 1, cond_scale)[:, 0]

    def release(self, state: SamplingState) -> SamplingState:
        """See Stepper. Only those rows are copied that take the place of a complete one."""
        is_complete = state.places == self.dalle.image_seq_len
        left = int((~is_complete).sum())
        if left == len(is_complete):
            return state
        free, moved = is_complete[:left].nonzero()[:, 0], left + (~is_complete[left:]).nonzero()[:, 0]
        for tensor in state:
            tensor[torch.cat((free, moved))] = tensor[torch.cat((moved, free))]
        copies = len(self.images) // len(is_complete)  # with guidance an image has two rows
        free, moved = ((copies * rows[:, None] + torch.arange(copies)).flatten() for rows in (free, moved))
        self.images = self.images[: copies * left]
        for layer in self.layers:
            layer.cache[:, free] = layer.cache[:, moved]
            layer.cache = layer.cache[:, : copies * left]
        return SamplingState(*(tensor[:left] for tensor in state))

    @torch.no_grad()
    def next(self, codes: Tensor, places: Tensor, cond_scale: float = 1.0) -> Tensor:
        """See Stepper."""
        self.passes += 1
        inputs = places.clamp(max=self.dalle.image_seq_len - 1)
        last = self.last_place(inputs)
        found = {each: self.kernels.look_up(each, inputs, last, self.sharers) for each in self.tables.values()}
        x = (self.dalle.image_emb(codes) + self.positions[inputs]).flatten(0, 1)  # (B·w, dim)
        added = None
        for layer in self.layers:
            x, added = layer(x, added, self.images, found[layer.table])
        return self.compute_logits(x, added, codes.shape[1], cond_scale)

    def last_place(self, inputs: Tensor) -> int:
        """Return the last of a pass's places, or a later one; what is read depends on it."""
        return int(inputs.max())

    @torch.no_grad()
    def time_windows(self, state: SamplingState, sampling: Sampling) -> Dict[int, float]:
        """See Stepper. Each number of rows is measured once."""
        rows = len(self.images)
        found = self.seconds.setdefault(rows, {})
        if found:
            return found
        windows = [window for window in self.windows if rows * window <= MOST_ROWS] or self.windows[:1]
        # The processor time of this thread leaves out what other programs take; a GPU's time is waited for.
        clock = time.perf_counter if state.codes.is_cuda else time.thread_time
        codes, places = state.codes.clone(), state.places.clone()
        for window in windows if len(windows) > 1 else ():
            started = clock()
            times: List[float] = []
            while len(times) < 2 or (len(times) < 8 and clock() < started + 0.01):
                before = clock()
                self.advance(state, sampling, window).tolist()
                times.append(clock() - before)
                state.codes.copy_(codes)
                state.places.copy_(places)
            found[window] = min(times)
        # A pass is never slower than a larger one.
        least = float("inf")
        for window in reversed(windows):
            found[window] = least = min(least, found.get(window, 1.0))
        return found

    def compute_logits(self, x: Tensor, added: Optional[Tensor], width: int, cond_scale: float) -> Tensor:
        """Return the logits (B, w, V) of x float32 (R·w, dim) plus what is added.

        Guidance comes before the projection, which is linear, so that an image's two rows share it.
        """
        normed = self.kernels.add_and_normalize(x, added, self.norm)[1].unflatten(0, (-1, width))
        return self.to_logits(guide(normed, cond_scale).flatten(0, 1)).unflatten(0, (-1, width))


class CachedStepper(Stepper):
    """Computes one position for each code; keys and values of earlier positions stay in a cache.

    Args:
        autocast: returns the context in which the model computes.
    """

    def __init__(self, dalle: DALLE, autocast: Callable[[], ContextManager] = contextlib.nullcontext):
        super().__init__(dalle)
        self.autocast = autocast

    def begin(self, text: Tensor, codes: Tensor, cond_scale: float = 1.0) -> Tensor:
        dalle = self.dalle
        self.cache = [KeyValueCache(dalle.text_seq_len + dalle.image_seq_len) for _ in dalle.transformer.layers]
        self.count = codes.shape[1]
        x = dalle.embed_text(dalle.number_padding(text))
        if self.count:
            x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
        with self.autocast():
            return guide(dalle.image_logits(dalle.transformer(x, cache=self.cache)[:, -1]), cond_scale)

    def next(self, codes: Tensor, places: Tensor, cond_scale: float = 1.0) -> Tensor:
        dalle = self.dalle
        x = dalle.embed_codes(codes, start=self.count)
        self.count += 1
        with self.autocast():
            x = dalle.transformer(x, cache=self.cache, start=dalle.text_seq_len + self.count)
            return guide(dalle.image_logits(x), cond_scale)
