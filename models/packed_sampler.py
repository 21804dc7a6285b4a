"""A DALLE that draws: one position at a time, with everything prepared that does not depend on the code.

What sampling.py's plain loop computes, in fewer and larger reads: weights in the form that a machine multiplies single
positions with (how is handed in: `pack`), LayerScale folded into the weights before it, a cache that keeps only keys
which a pattern may still see, and one pass over each different caption. Drawing itself stays sampling.py's.
"""

import contextlib
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import PrefixCache

FEW = 4  # pictures, up to which a CPU attends faster in one kernel


def cache_plan(mask):
    """Where a layer keeps the keys of its n codes, and which of them each code reads.

    mask bool (n, n): the part of attention.pattern_mask for codes. → slots [n], each a place in the cache; reads [n],
    each a slice of places or, where they do not lie together, int64 indices. Codes that see one another, directly or
    over others, lie together: a column of axial_col is one slice. A place is used again once nobody can see its key
    any more: a row's keys die with the row, so that the cache of axial_row is one row.
    """
    length = len(mask)
    last_seen = [int(column.nonzero().max()) for column in mask.T]
    group_of = list(range(length))  # by its first code
    for position in range(length):
        joined = {group_of[key] for key in mask[position].nonzero().flatten().tolist()}
        group_of = [min(joined) if group in joined else group for group in group_of]
    slots, reads, end, busy_until = [None] * length, [None] * length, 0, -1
    for group in sorted(set(group_of)):
        members = [position for position in range(length) if group_of[position] == group]
        start = end if busy_until >= members[0] else 0
        free, owner = [], {}
        for position in members:
            for slot in [slot for slot, key in owner.items() if last_seen[key] < position]:
                free.append(slot)
                del owner[slot]
            free.sort()
            slot = free.pop(0) if free else start + len(owner)
            owner[slot] = position
            slots[position] = slot
            seen = sorted(slot for slot, key in owner.items() if mask[position, key])
            together = slice(seen[0], seen[-1] + 1)
            reads[position] = together if together.stop - together.start == len(seen) else torch.tensor(seen)
        end = start + len(owner) + len(free)
        busy_until = max(busy_until, *(last_seen[position] for position in members))
    return slots, reads


class PackedLayer:
    """One layer at one position: x fp32 (B, dim) → fp32 (B, dim)."""

    def __init__(self, attention, feed_forward, plan, pack, cache_dtype):
        self.slots, self.reads = plan
        self.places, self.cache_dtype = 1 + max(self.slots), cache_dtype
        inner, self.norm, self.norm_after = self.fold(attention)
        self.heads, self.dim_head = inner.heads, inner.dim_head
        self.to_qkv = pack(inner.to_qkv.weight, None)
        self.to_out = pack(*self.scaled(inner.to_out[0], attention))
        wide, _, _, narrow = feed_forward.fn.fn.net
        _, self.ff_norm, self.ff_norm_after = self.fold(feed_forward)
        self.wide = pack(wide.weight, wide.bias, geglu=True)
        self.narrow = pack(*self.scaled(narrow, feed_forward))

    @staticmethod
    def fold(block):
        """(what is inside, its norm, the norm after it with LayerScale in its weights or None)."""
        norm, after = block.fn.norm, block.fn.norm_out
        if isinstance(after, nn.Identity):
            return block.fn.fn, (norm.weight, norm.bias), None
        scale = block.scale.flatten()
        return block.fn.fn, (norm.weight, norm.bias), (after.weight * scale, after.bias * scale)

    @staticmethod
    def scaled(linear, block):
        """Weight and bias with LayerScale in them, unless a norm comes in between."""
        if not isinstance(block.fn.norm_out, nn.Identity):
            return linear.weight, linear.bias
        scale = block.scale.flatten()
        return linear.weight * scale[:, None], linear.bias * scale

    def start(self, prefix, text_len, rows, together):
        """Fill the cache from a pass over captions; rows int64 (B,): which of them each picture has, `together` after
        another the same one, which they share then. together 0: nothing is shared.
        """
        seen = torch.stack((prefix.keys, prefix.values)).to(self.cache_dtype)  # (2, captions, H, n, D)
        text, codes = seen[:, :, :, :text_len], seen[:, :, :, text_len:]
        shape = 2, len(rows), self.heads, text_len + self.places, self.dim_head
        if not together:  # a picture's text and codes side by side
            self.cache = torch.empty(shape, dtype=seen.dtype, device=seen.device)
            self.text, self.codes = self.cache.tensor_split([text_len], dim=3)
            self.text.copy_(text[:, rows])
        else:
            self.text = text[:, rows[::together]]  # (2, G, H, T, D)
            self.codes = torch.empty(*shape[:3], self.places, self.dim_head, dtype=seen.dtype, device=seen.device)
        kept = {slot: place for place, slot in enumerate(self.slots[: codes.shape[3]])}  # the last code of each place
        self.codes[:, :, :, list(kept)] = codes[:, rows][:, :, :, list(kept.values())]
        self.together = together

    def __call__(self, x, place):
        """place: which code x is, from 0 on."""
        qkv = self.to_qkv(F.layer_norm(x, x.shape[-1:], *self.norm)).view(len(x), 3, self.heads, self.dim_head)
        self.codes[:, :, :, self.slots[place]] = qkv[:, 1:].transpose(0, 1)
        query, read = qkv[:, 0].to(self.cache_dtype), self.reads[place]
        out = self.attend_shared(query, read) if self.together else self.attend(query, read)
        x = x + self.after(self.to_out(out), self.norm_after)
        normed = F.layer_norm(x, x.shape[-1:], *self.ff_norm)
        return x + self.after(self.narrow(self.wide(normed)), self.ff_norm_after)

    def codes_at(self, read):
        """Keys and values, (2, B, H, m, D)."""
        if isinstance(read, slice):
            return self.codes[:, :, :, read]
        return self.codes.index_select(3, read.to(self.codes.device))

    def attend(self, query, read):
        """query (B, H, D) → (B, H·D), each picture with keys of its own for the text."""
        text_len = self.text.shape[3]
        if isinstance(read, slice) and read.start == 0:
            seen = self.cache[:, :, :, : text_len + read.stop]
        else:
            seen = torch.cat((self.text, self.codes_at(read)), dim=3)  # (2, B, H, T + m, D)
        return F.scaled_dot_product_attention(query[:, :, None], *seen).flatten(1)

    def attend_shared(self, query, read):
        """query (B, H, D) → (B, H·D): the same, and the keys of a text are read once for all its pictures."""
        batch, text_len = len(query), self.text.shape[3]
        (text_keys, text_values), (keys, values) = self.text, self.codes_at(read)
        query = query * self.dim_head**-0.5
        by_text = query.view(-1, self.together, self.heads, self.dim_head).transpose(1, 2)  # (G, H, B / G, D)
        text_scores = (by_text @ text_keys.transpose(-1, -2)).transpose(1, 2)  # (G, B / G, H, T)
        code_scores = query[:, :, None] @ keys.transpose(-1, -2)  # (B, H, 1, m)
        scores = torch.cat((text_scores.reshape(batch, self.heads, 1, text_len), code_scores), dim=-1)
        weights = scores.softmax(-1)  # (B, H, 1, T + m)
        by_text = weights[..., :text_len].reshape(-1, self.together, self.heads, text_len).transpose(1, 2)
        from_text = (by_text @ text_values).transpose(1, 2)  # (G, B / G, H, D)
        from_codes = weights[..., text_len:] @ values  # (B, H, 1, D)
        return from_text.reshape(batch, -1) + from_codes.view(batch, -1)

    @staticmethod
    def after(out, norm):
        return out if norm is None else F.layer_norm(out.float(), out.shape[-1:], *norm)


class PackedStepper:
    """Logits of the next code, for sampling.sample_codes; holds the caches of one drawing at a time."""

    @torch.no_grad()
    def __init__(self, dalle, pack, cache_dtype, autocast=contextlib.nullcontext):
        """pack(weight, bias or None, geglu=False) → a function (B, in) → (B, out), or (B, out / 2) with GEGLU after it,
        of any dtype. cache_dtype: in which a machine attends fastest. autocast() → the context of the pass over
        captions, which the model itself does.
        """
        self.dalle = dalle
        plans, self.layers = {}, []
        for attention, feed_forward in dalle.transformer.layers:
            mask = attention.fn.fn.mask.cpu()[dalle.text_seq_len + 1 :, dalle.text_seq_len + 1 :]
            name = mask.numpy().tobytes()
            if name not in plans:  # once a pattern
                plans[name] = cache_plan(mask)
            self.layers.append(PackedLayer(attention, feed_forward, plans[name], pack, cache_dtype))
        norm, projection = dalle.to_logits
        self.norm = norm.weight, norm.bias
        codes = slice(dalle.num_text_tokens, dalle.num_tokens)
        self.to_logits = pack(projection.weight[codes], projection.bias[codes])
        self.cache_dtype, self.autocast = cache_dtype, autocast

    @torch.no_grad()
    def logits(self, dalle, text, codes, cache):
        """sample_codes' logits_of: text int64 (B, T), codes int64 (B, n) so far → (B, V)."""
        place = codes.shape[1] - 1
        if cache[0].keys is None:  # sample_codes made it anew: the first call of a drawing
            cache[0].keys = self.layers[0]
            return self.begin(text, codes)
        x = dalle.image_emb(codes[self.order, -1]) + self.positions[place]  # (B, dim)
        for layer in self.layers:
            x = layer(x, place)
        return self.head(x)[self.back]

    def begin(self, text, codes):
        """The pass over captions, each different one once, and given codes."""
        dalle = self.dalle
        self.positions = dalle.image_pos_emb()[0]  # (L, dim)
        seen = torch.cat((text, codes), dim=1)
        different, rows, counts = seen.unique(dim=0, return_inverse=True, return_counts=True)
        text, codes = different.split((text.shape[1], codes.shape[1]), dim=1)
        prefixes = [PrefixCache() for _ in self.layers]
        with self.autocast():
            x = dalle.embed_text(dalle.number_padding(text))
            if codes.shape[1]:
                x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
            x = dalle.transformer(x, cache=prefixes)[:, -1]
        self.order = rows.argsort()  # pictures of a caption after one another, while drawing
        self.back = self.order.argsort()
        # One fused kernel is faster for few pictures, and does not round scores of less than fp32.
        fused = len(rows) <= FEW or self.cache_dtype != torch.float32
        together = 0 if fused else functools.reduce(math.gcd, counts.tolist())
        for layer, prefix in zip(self.layers, prefixes):
            layer.start(prefix, dalle.text_seq_len + 1, rows[self.order], together)
        return self.head(x.float()[rows])

    def head(self, x):
        return self.to_logits(F.layer_norm(x, x.shape[-1:], *self.norm))
