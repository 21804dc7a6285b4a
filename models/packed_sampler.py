"""A fast Stepper: one position of a DALLE at a time, with everything prepared that does not depend on the code.

It computes what sampling.CachedStepper computes, but reads less memory for each code:
- weights are in the form that the machine multiplies fastest (`pack`), with LayerScale folded in;
- caches keep only keys that a pattern may still see;
- each different caption passes through the model once, and its images may share its keys.
"""

import contextlib
import functools
import math
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dalle import DALLE
from models.transformer import LayerScale, PrefixCache

FEW = 4  # images up to which a CPU attends faster in one fused kernel
Read = Union[slice, Tensor]
Plan = Tuple[List[int], List[Read]]
Norm = Tuple[Tensor, Tensor]  # weight, bias
# pack(weight (out, in), bias (out,) or None, geglu=False) returns a function of x (B, in) that computes (B, out), or
# (B, out / 2) if GEGLU follows.
Pack = Callable[..., Callable[[Tensor], Tensor]]


def plan_cache(mask: Tensor) -> Plan:
    """Plan the slot of each code's key in a layer's cache, and the slots that each code reads.

    Codes that see one another, directly or through others, get neighboring slots, so that a column of axial_col is one
    slice. A slot is used again once no later code sees its key: the cache of axial_row is one row.

    Args:
        mask: bool (n, n), the part of transformer.pattern_mask for codes.

    Returns:
        The slot of each code, and what each code reads: a slice of slots, or int64 indices if they are not adjacent.
    """
    length = len(mask)
    last_seen = [int(column.nonzero().max()) for column in mask.T]
    group_of = list(range(length))  # by its first code
    for position in range(length):
        joined = {group_of[key] for key in mask[position].nonzero().flatten().tolist()}
        group_of = [min(joined) if group in joined else group for group in group_of]
    slots: List[int] = [0] * length
    reads: List[Read] = [slice(0)] * length
    end, busy_until = 0, -1
    for group in sorted(set(group_of)):
        members = [position for position in range(length) if group_of[position] == group]
        start = end if busy_until >= members[0] else 0
        free: List[int] = []
        owner: Dict[int, int] = {}  # slot: the code whose key it has
        for position in members:
            for slot in [slot for slot, key in owner.items() if last_seen[key] < position]:
                free.append(slot)
                del owner[slot]
            free.sort()
            slot = free.pop(0) if free else start + len(owner)
            owner[slot] = position
            slots[position] = slot
            seen = sorted(slot for slot, key in owner.items() if mask[position, key])
            adjacent = seen[-1] + 1 - seen[0] == len(seen)
            reads[position] = slice(seen[0], seen[-1] + 1) if adjacent else torch.tensor(seen)
        end = start + len(owner) + len(free)
        busy_until = max(busy_until, *(last_seen[position] for position in members))
    return slots, reads


class PackedLayer:
    """One layer at one position: x float32 (B, dim) in and out."""

    def __init__(
        self, attention: LayerScale, feed_forward: LayerScale, plan: Plan, pack: Pack, cache_dtype: torch.dtype
    ):
        self.slots, self.reads = plan
        self.num_slots, self.cache_dtype = 1 + max(self.slots), cache_dtype
        inner, wide, narrow = attention.fn.fn, feed_forward.fn.fn.net[0], feed_forward.fn.fn.net[3]
        self.heads, self.dim_head = inner.heads, inner.dim_head
        self.norm, self.norm_after = fold_norms(attention)
        self.to_qkv = pack(inner.to_qkv.weight, None)
        self.to_out = pack(*fold_scale(inner.to_out[0], attention))
        self.ff_norm, self.ff_norm_after = fold_norms(feed_forward)
        self.wide = pack(wide.weight, wide.bias, geglu=True)
        self.narrow = pack(*fold_scale(narrow, feed_forward))

    def start(self, prefix: PrefixCache, text_len: int, rows: Tensor, group: int) -> None:
        """Fill the cache from a pass over captions and given codes.

        Args:
            prefix: keys and values (captions, H, text_len + n, D) of that pass.
            rows: int64 (B,), the caption index of each image.
            group: if above 0, runs of that many images have the same caption and share its keys.
        """
        seen = torch.stack((prefix.keys, prefix.values)).to(self.cache_dtype)  # (2, captions, H, n, D)
        text, codes = seen[:, :, :, :text_len], seen[:, :, :, text_len:]
        shape = 2, len(rows), self.heads, text_len + self.num_slots, self.dim_head
        self.group = group
        if group:
            self.text = text[:, rows[::group]]  # (2, G, H, T, D)
            self.codes = seen.new_empty(*shape[:3], self.num_slots, self.dim_head)
        else:  # text and codes of an image next to each other, to be read as one
            self.cache = seen.new_empty(shape)
            self.text, self.codes = self.cache.tensor_split([text_len], dim=3)
            self.text.copy_(text[:, rows])
        last = {slot: place for place, slot in enumerate(self.slots[: codes.shape[3]])}  # the last code of each slot
        self.codes[:, :, :, list(last)] = codes[:, rows][:, :, :, list(last.values())]

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """Compute the layer for the code number `place` (from 0) of each image, and add it to the cache."""
        qkv = self.to_qkv(F.layer_norm(x, x.shape[-1:], *self.norm)).view(len(x), 3, self.heads, self.dim_head)
        self.codes[:, :, :, self.slots[place]] = qkv[:, 1:].transpose(0, 1)
        query, read = qkv[:, 0].to(self.cache_dtype), self.reads[place]
        out = self.attend_shared(query, read) if self.group else self.attend(query, read)
        x = x + norm_or_same(self.to_out(out), self.norm_after)
        normed = F.layer_norm(x, x.shape[-1:], *self.ff_norm)
        return x + norm_or_same(self.narrow(self.wide(normed)), self.ff_norm_after)

    def read_codes(self, read: Read) -> Tensor:
        """Return keys and values, (2, B, H, m, D)."""
        if isinstance(read, slice):
            return self.codes[:, :, :, read]
        return self.codes.index_select(3, read.to(self.codes.device))

    def attend(self, query: Tensor, read: Read) -> Tensor:
        """Attend with keys of the text for each image: query (B, H, D); returns (B, H·D)."""
        if isinstance(read, slice) and read.start == 0:
            seen = self.cache[:, :, :, : self.text.shape[3] + read.stop]
        else:
            seen = torch.cat((self.text, self.read_codes(read)), dim=3)  # (2, B, H, T + m, D)
        return F.scaled_dot_product_attention(query[:, :, None], *seen).flatten(1)

    def attend_shared(self, query: Tensor, read: Read) -> Tensor:
        """Attend with keys of the text that are read once for all images of a group; shapes as in attend."""
        batch, text_len = len(query), self.text.shape[3]
        (text_keys, text_values), (keys, values) = self.text, self.read_codes(read)
        query = query * self.dim_head**-0.5
        by_text = query.view(-1, self.group, self.heads, self.dim_head).transpose(1, 2)  # (G, H, B / G, D)
        text_scores = (by_text @ text_keys.transpose(-1, -2)).transpose(1, 2)  # (G, B / G, H, T)
        code_scores = query[:, :, None] @ keys.transpose(-1, -2)  # (B, H, 1, m)
        scores = torch.cat((text_scores.reshape(batch, self.heads, 1, text_len), code_scores), dim=-1)
        weights = scores.softmax(-1)  # (B, H, 1, T + m)
        by_text = weights[..., :text_len].reshape(-1, self.group, self.heads, text_len).transpose(1, 2)
        from_text = (by_text @ text_values).transpose(1, 2)  # (G, B / G, H, D)
        from_codes = weights[..., text_len:] @ values  # (B, H, 1, D)
        return from_text.reshape(batch, -1) + from_codes.view(batch, -1)


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
    """

    @torch.no_grad()
    def __init__(
        self,
        dalle: DALLE,
        pack: Pack,
        cache_dtype: torch.dtype,
        autocast: Callable[[], ContextManager] = contextlib.nullcontext,
    ):
        self.dalle = dalle
        self.cache_dtype, self.autocast = cache_dtype, autocast
        plans: Dict[bytes, Plan] = {}
        self.layers = []
        for attention, feed_forward in dalle.transformer.layers:
            mask = attention.fn.fn.mask.cpu()[dalle.text_seq_len + 1 :, dalle.text_seq_len + 1 :]
            name = mask.numpy().tobytes()
            if name not in plans:  # layers of one pattern share its plan
                plans[name] = plan_cache(mask)
            self.layers.append(PackedLayer(attention, feed_forward, plans[name], pack, cache_dtype))
        norm, projection = dalle.to_logits.norm_and_projection
        self.norm = norm.weight, norm.bias
        codes = slice(dalle.num_text_tokens, dalle.num_tokens)
        self.to_logits = pack(projection.weight[codes], projection.bias[codes])

    @torch.no_grad()
    def begin(self, text: Tensor, codes: Tensor) -> Tensor:
        """See Stepper. Each different row of text and codes passes through the model once."""
        dalle = self.dalle
        self.place = codes.shape[1]
        self.positions = dalle.image_pos_emb()[0]  # (L, dim)
        different, rows, counts = torch.cat((text, codes), dim=1).unique(dim=0, return_inverse=True, return_counts=True)
        text, codes = different.split((text.shape[1], codes.shape[1]), dim=1)
        prefixes = [PrefixCache() for _ in self.layers]
        with self.autocast():
            x = dalle.embed_text(dalle.number_padding(text))
            if self.place:
                x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
            x = dalle.transformer(x, cache=prefixes)[:, -1]
        self.order = rows.argsort()  # images of one caption are computed one after another
        self.restore = self.order.argsort()
        # One fused kernel is faster for few images, and does not round scores to less than fp32.
        fused = len(rows) <= FEW or self.cache_dtype != torch.float32
        group = 0 if fused else functools.reduce(math.gcd, counts.tolist())
        for layer, prefix in zip(self.layers, prefixes):
            layer.start(prefix, dalle.text_seq_len + 1, rows[self.order], group)
        return self.compute_logits(x.float()[rows])

    @torch.no_grad()
    def next(self, code: Tensor) -> Tensor:
        x = self.dalle.image_emb(code[self.order]) + self.positions[self.place]  # (B, dim)
        for layer in self.layers:
            x = layer(x, self.place)
        self.place += 1
        return self.compute_logits(x)[self.restore]

    def compute_logits(self, x: Tensor) -> Tensor:
        return self.to_logits(F.layer_norm(x, x.shape[-1:], *self.norm))
