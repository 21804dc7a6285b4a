"""A fast Stepper: a few positions of a DALLE at a time, with everything prepared that does not depend on the codes.

It computes what the model computes in a pass over everything, but reads less memory for each code:
- keys and values of earlier positions stay in a cache, which keeps only those that a pattern may still see;
- weights are in the form that the machine multiplies fastest (`pack`), with LayerScale folded in;
- each different caption passes through the model once, and its images may share its keys.
"""

import contextlib
import functools
import math
import time
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dalle import DALLE
from models.transformer import LayerScale, PrefixCache

MOST_ROWS = 256  # of a pass; the time of larger ones grows with their rows on any machine
FEW = 4  # images up to which a CPU attends faster in one fused kernel
Read = Union[slice, Tensor]
Plan = Tuple[List[int], List[Read]]
Norm = Tuple[Tensor, Tensor]  # weight, bias
# pack(weight (out, in), bias (out,) or None, geglu=False) returns a function of x (B, in) that computes (B, out), or
# (B, out / 2) if GEGLU follows.
Pack = Callable[..., Callable[[Tensor], Tensor]]


def plan_cache(mask: Tensor, window: int = 1) -> Plan:
    """Plan the slot of each code's key in a layer's cache, and the slots that each code reads.

    Codes that see one another, directly or through others, get neighboring slots, so that a column of axial_col is one
    slice. A slot is used again once no later code sees its key: the cache of axial_row is one row if window is 1.

    Args:
        mask: bool (n, n), the part of transformer.pattern_mask for codes.
        window: the number of codes that a pass may write before the first of them reads.

    Returns:
        The slot of each code, and what each code reads: a slice of slots, or int64 indices if they are not adjacent.
    """
    length, visible = len(mask), mask.tolist()
    last_needed = [int(column.nonzero().max()) + window - 1 for column in mask.T]
    group_of = list(range(length))  # by its first code
    for position in range(length):
        joined = {group_of[key] for key in range(length) if visible[position][key]}
        group_of = [min(joined) if group in joined else group for group in group_of]
    slots: List[int] = [0] * length
    reads: List[Read] = [slice(0)] * length
    busy: List[Tuple[int, int, int]] = []  # first slot, end and last need of each group so far
    for group in sorted(set(group_of)):
        members = [position for position in range(length) if group_of[position] == group]
        busy = [taken for taken in busy if taken[2] >= members[0]]
        ends = sorted(end for _, end, _ in busy)
        start = next(
            place
            for place in [0, *ends]
            if all(end <= place or first >= place + len(members) for first, end, _ in busy)
        )
        free: List[int] = []
        owner: Dict[int, int] = {}  # slot: the code whose key it has
        for position in members:
            for slot in [slot for slot, key in owner.items() if last_needed[key] < position]:
                free.append(slot)
                del owner[slot]
            free.sort()
            slot = free.pop(0) if free else start + len(owner)
            owner[slot] = position
            slots[position] = slot
            seen = sorted(slot for slot, key in owner.items() if visible[position][key])
            adjacent = seen[-1] + 1 - seen[0] == len(seen)
            reads[position] = slice(seen[0], seen[-1] + 1) if adjacent else torch.tensor(seen)
        end = start + len(owner) + len(free)
        busy.append((start, end, max(last_needed[position] for position in members)))
    return slots, reads


class Window(NamedTuple):
    """What a pass writes and reads in the caches of a pattern's layers.

    Attributes:
        slots: of the new keys: one for all images, or int64 (B, w).
        read: the slots to read.
        mask: float (B, 1, w, T + m), added to the scores; None if each code sees all that is read.
    """

    slots: Any
    read: Read
    mask: Optional[Tensor]


class Cache:
    """The plan of a pattern's caches as tables, with a row for each place of an input.

    Inputs are the codes but the last; what a window has past them goes to a slot that nobody reads.

    Attributes:
        static: whether every window reads all slots, so that its shapes depend on nothing.
    """

    static = False

    def __init__(self, mask: Tensor, text_len: int, window: int, device: torch.device, dtype: torch.dtype):
        (slots, reads), places = plan_cache(mask, window), len(mask)
        self.reads = [read if isinstance(read, slice) else read.to(device) for read in reads]
        self.num_slots = max(slots) + 2
        self.ends = torch.tensor(slots).cummax(0).values.tolist()  # slots in use
        self.slots = torch.tensor([*slots, self.num_slots - 1], device=device)
        hidden = torch.full((places + 1, text_len + self.num_slots), float("-inf"))
        hidden[:, :text_len] = 0
        query, key = mask.nonzero(as_tuple=True)
        hidden[query, text_len + self.slots.cpu()[key]] = 0
        self.hidden, self.text_len = hidden.to(device, dtype), text_len

    def look(self, inputs: Tensor) -> Window:
        """Return the window of a pass over inputs at these places, int64 (B, w)."""
        if self.static:
            return Window(self.slots[inputs], slice(0, self.num_slots), self.hidden[inputs][:, None])
        first, last = int(inputs.min()), int(inputs.max())
        if first == last:
            return Window(self.slots[first], self.reads[first], None)
        end = 1 + self.ends[min(last, len(self.ends) - 1)]
        mask = self.hidden[inputs, : self.text_len + end]
        return Window(self.slots[inputs], slice(0, end), mask[:, None])


class PackedLayer:
    """One layer at a few positions: x float32 (B·w, dim) in and out."""

    def __init__(
        self, attention: LayerScale, feed_forward: LayerScale, num_slots: int, pack: Pack, cache_dtype: torch.dtype
    ):
        self.num_slots, self.cache_dtype = num_slots, cache_dtype
        inner, wide, narrow = attention.fn.fn, feed_forward.fn.fn.net[0], feed_forward.fn.fn.net[3]
        self.heads, self.dim_head = inner.heads, inner.dim_head
        self.norm, self.norm_after = fold_norms(attention)
        self.to_qkv = pack(inner.to_qkv.weight, None)
        self.to_out = pack(*fold_scale(inner.to_out[0], attention))
        self.ff_norm, self.ff_norm_after = fold_norms(feed_forward)
        self.wide = pack(wide.weight, wide.bias, geglu=True)
        self.narrow = pack(*fold_scale(narrow, feed_forward))

    def start(self, prefix: PrefixCache, text_len: int, rows: Tensor, group: int, slots: Tensor) -> None:
        """Fill the cache from a pass over captions and given codes.

        Args:
            prefix: keys and values (captions, H, text_len + n, D) of that pass.
            rows: int64 (B,), the caption index of each image.
            group: if above 0, runs of that many images have the same caption and share its keys.
            slots: int64, of the codes of an image.
        """
        seen = torch.stack((prefix.keys, prefix.values)).to(self.cache_dtype)  # (2, captions, H, n, D)
        text, codes = seen[:, :, :, :text_len], seen[:, :, :, text_len:]
        shape = 2, len(rows), self.heads, text_len + self.num_slots, self.dim_head
        self.group = group
        if group:
            self.text = text[:, rows[::group]]  # (2, G, H, T, D)
            self.codes = seen.new_zeros(*shape[:3], self.num_slots, self.dim_head)
        else:  # text and codes of an image next to each other, to be read as one
            self.cache = seen.new_zeros(shape)
            self.text, self.codes = self.cache.tensor_split([text_len], dim=3)
            self.text.copy_(text[:, rows])
        last = {slot: place for place, slot in enumerate(slots[: codes.shape[3]].tolist())}  # the last code of each
        self.codes[:, :, :, list(last)] = codes[:, rows][:, :, :, list(last.values())]

    def __call__(self, x: Tensor, images: Tensor, window: Window) -> Tensor:
        """Compute the layer for a window of codes of each image, and add it to the cache; images is 0 … B − 1."""
        qkv = self.to_qkv(F.layer_norm(x, x.shape[-1:], *self.norm))
        qkv = qkv.view(len(images), -1, 3, self.heads, self.dim_head)  # (B, w, 3, H, D)
        if window.mask is None:
            self.codes[:, :, :, window.slots] = qkv[:, 0, 1:].transpose(0, 1)
        else:
            self.codes[:, images[:, None], :, window.slots] = qkv[:, :, 1:].to(self.cache_dtype)
        query = qkv[:, :, 0].transpose(1, 2).to(self.cache_dtype)  # (B, H, w, D)
        out = self.attend_shared(query, window) if self.group else self.attend(query, window)
        out = out.transpose(1, 2).reshape(len(x), -1)
        x = x + norm_or_same(self.to_out(out), self.norm_after)
        normed = F.layer_norm(x, x.shape[-1:], *self.ff_norm)
        return x + norm_or_same(self.narrow(self.wide(normed)), self.ff_norm_after)

    def read_codes(self, read: Read) -> Tensor:
        """Return keys and values, (2, B, H, m, D)."""
        if isinstance(read, slice):
            return self.codes[:, :, :, read]
        return self.codes.index_select(3, read)

    def attend(self, query: Tensor, window: Window) -> Tensor:
        """Attend with keys of the text for each image; (B, H, w, D) in and out."""
        read = window.read
        if isinstance(read, slice) and read.start == 0:
            seen = self.cache[:, :, :, : self.text.shape[3] + read.stop]
        else:
            seen = torch.cat((self.text, self.read_codes(read)), dim=3)  # (2, B, H, T + m, D)
        keys, values = seen
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=window.mask)

    def attend_shared(self, query: Tensor, window: Window) -> Tensor:
        """Attend with keys of the text that are read once for all images of a group; shapes as in attend."""
        batch, heads, width, dim_head = query.shape
        (text_keys, text_values), (keys, values) = self.text, self.read_codes(window.read)
        text_len = text_keys.shape[2]
        query = query * dim_head**-0.5
        grouped = query.reshape(-1, self.group, heads, width, dim_head).transpose(1, 2).flatten(2, 3)
        text_scores = (grouped @ text_keys.transpose(-1, -2)).view(-1, heads, self.group, width, text_len)
        text_scores = text_scores.transpose(1, 2).reshape(batch, heads, width, text_len)
        scores = torch.cat((text_scores, query @ keys.transpose(-1, -2)), dim=-1)  # (B, H, w, T + m)
        weights = (scores if window.mask is None else scores + window.mask).softmax(-1)
        grouped = weights[..., :text_len].reshape(-1, self.group, heads, width, text_len).transpose(1, 2).flatten(2, 3)
        from_text = (grouped @ text_values).view(-1, heads, self.group, width, dim_head).transpose(1, 2)
        return from_text.reshape(query.shape) + weights[..., text_len:] @ values


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


def norm_or_same(x: Tensor, norm: Optional[Norm]) -> Tensor:
    return x if norm is None else F.layer_norm(x.float(), x.shape[-1:], *norm)


class PackedStepper:
    """A Stepper with prepared weights; it holds the caches of one batch at a time.

    Args:
        pack: see Pack.
        cache_dtype: the dtype in which the machine attends fastest.
        autocast: returns the context for the pass over captions, which the model itself computes.
        windows: the numbers of codes of an image that a pass may compute, ascending.

    Attributes:
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
    ):
        self.dalle = dalle
        self.cache_dtype, self.autocast = cache_dtype, autocast
        self.windows, self.passes = windows, 0
        self.seconds: Dict[int, Dict[int, float]] = {}
        text_len, device = dalle.text_seq_len + 1, dalle.text_emb.weight.device
        self.caches: Dict[bytes, Cache] = {}
        self.layers = []
        for attention, feed_forward in dalle.transformer.layers:
            mask = attention.fn.fn.mask.cpu()[text_len:, text_len:]
            name = mask.numpy().tobytes()
            if name not in self.caches:  # layers of one pattern share its plan
                self.caches[name] = Cache(mask, text_len, max(windows), device, cache_dtype)
            layer = PackedLayer(attention, feed_forward, self.caches[name].num_slots, pack, cache_dtype)
            self.layers.append((name, layer))
        self.positions = dalle.image_pos_emb()[0]  # (L, dim)
        norm, projection = dalle.to_logits.norm_and_projection
        self.norm = norm.weight, norm.bias
        codes = slice(dalle.num_text_tokens, dalle.num_tokens)
        self.to_logits = pack(projection.weight[codes], projection.bias[codes])

    @torch.no_grad()
    def begin(self, text: Tensor, codes: Tensor) -> Tensor:
        """See Stepper. Each different row of text and codes passes through the model once."""
        dalle = self.dalle
        different, rows, counts = torch.cat((text, codes), dim=1).unique(dim=0, return_inverse=True, return_counts=True)
        text, codes = different.split((text.shape[1], codes.shape[1]), dim=1)
        prefixes = [PrefixCache() for _ in self.layers]
        with self.autocast():
            x = dalle.embed_text(dalle.number_padding(text))
            if codes.shape[1]:
                x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
            x = dalle.transformer(x, cache=prefixes)[:, -1]
        self.order = rows.argsort()  # images of one caption are computed one after another
        self.restore = self.order.argsort()
        self.images = torch.arange(len(rows), device=rows.device)
        # One fused kernel is faster for few images, and does not round scores to less than fp32.
        fused = len(rows) <= FEW or self.cache_dtype != torch.float32
        group = 0 if fused else functools.reduce(math.gcd, counts.tolist())
        for (name, layer), prefix in zip(self.layers, prefixes):
            layer.start(prefix, dalle.text_seq_len + 1, rows[self.order], group, self.caches[name].slots)
        return self.compute_logits(x.float()[rows])

    @torch.no_grad()
    def next(self, codes: Tensor, places: Tensor) -> Tensor:
        """See Stepper."""
        self.passes += 1
        width = codes.shape[1]
        inputs = places[self.order, None] - 1 + torch.arange(width, device=places.device)  # (B, w)
        inputs = inputs.clamp(max=self.dalle.image_seq_len - 1)
        windows = {name: cache.look(inputs) for name, cache in self.caches.items()}
        x = (self.dalle.image_emb(codes[self.order]) + self.positions[inputs]).flatten(0, 1)  # (B·w, dim)
        for name, layer in self.layers:
            x = layer(x, self.images, windows[name])
        return self.compute_logits(x).unflatten(0, (-1, width))[self.restore]

    @torch.no_grad()
    def time_windows(self, codes: Tensor, places: Tensor) -> Dict[int, float]:
        """See Stepper. Each number of rows is measured once."""
        found = self.seconds.setdefault(len(codes), {})
        if found:
            return found
        windows = [window for window in self.windows if len(codes) * window <= MOST_ROWS] or self.windows[:1]
        for window in windows if len(windows) > 1 else ():
            started = time.perf_counter()
            times: List[float] = []
            while len(times) < 2 or (len(times) < 8 and time.perf_counter() < started + 0.02):
                before = time.perf_counter()
                float(self.next(codes.expand(-1, window), places)[0, 0, 0])  # waits for a GPU
                times.append(time.perf_counter() - before)
            found[window] = min(times)
        # A pass is never slower than a larger one, but other programs may have used the processor meanwhile.
        least = float("inf")
        for window in reversed(windows):
            found[window] = least = min(least, found.get(window, 1.0))
        return found

    def compute_logits(self, x: Tensor) -> Tensor:
        return self.to_logits(F.layer_norm(x, x.shape[-1:], *self.norm))
