"""A DALLE that draws: one position at a time, with everything prepared that does not depend on the code.

What sampling.py's plain loop computes, in fewer and larger reads: weights in the form that a machine multiplies single
positions with (how is handed in: `pack`), LayerScale folded into the weights before it, a cache that keeps only keys
which a pattern may still see, and one pass over each different caption. Drawing itself stays sampling.py's.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import Prefix


def cache_plan(mask):
    """Where a layer keeps the keys of its N positions, and which of them each position reads.

    mask bool (N, N), see attention.pattern_mask. → slots [N], each a place in the cache; reads [N], each a number of
    places from the first on, or int64 indices of places. A place is used again once nobody can see its key any more:
    a row's keys die with the row, so that the cache of axial_row is text and one row.
    """
    length = len(mask)
    last_seen = [int(column.nonzero().max()) for column in mask.T]
    slots, reads, free, owner = [], [], [], {}
    for position in range(length):
        for slot in [slot for slot, key in owner.items() if last_seen[key] < position]:
            free.append(slot)
            del owner[slot]
        free.sort()
        slot = free.pop(0) if free else len(owner)
        owner[slot] = position
        slots.append(slot)
        seen = sorted(slot for slot, key in owner.items() if mask[position, key])
        assert len(seen) == int(mask[position].sum())
        reads.append(len(seen) if seen[-1] == len(seen) - 1 else torch.tensor(seen))
    return slots, reads


class Layer:
    """One layer at one position: x fp32 (B, dim) → fp32 (B, dim)."""

    def __init__(self, attention, feed_forward, plan, pack, dtype, cache_dtype):
        self.slots, self.reads = plan
        self.places, self.dtype, self.cache_dtype = 1 + max(self.slots), dtype, cache_dtype
        inner, self.norm, self.norm_after = self.fold(attention)
        self.heads, self.dim_head = inner.heads, inner.dim_head
        self.to_qkv = pack(inner.to_qkv.weight, None)
        self.to_out = pack(*self.scaled(inner.to_out[0], attention))
        wide, _, _, narrow = feed_forward.fn.fn.net
        _, self.ff_norm, self.ff_norm_after = self.fold(feed_forward)
        self.wide = pack(wide.weight, wide.bias)
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

    def start(self, prefix, rows):
        """Fill the cache from a pass over captions; rows int64 (B,): which caption each picture has."""
        length = prefix.keys.shape[2]
        kept = {}  # of several keys that had the same place, the last
        for position in range(length):
            kept[self.slots[position]] = position
        slots, positions = (torch.tensor(part, device=rows.device) for part in (list(kept), list(kept.values())))
        shape = len(rows), self.heads, self.places, self.dim_head
        self.keys, self.values = (torch.empty(shape, dtype=self.cache_dtype, device=rows.device) for _ in range(2))
        for cache, found in ((self.keys, prefix.keys), (self.values, prefix.values)):
            cache[:, :, slots] = found[:, :, positions].to(self.cache_dtype)[rows]

    def __call__(self, x, position):
        normed = F.layer_norm(x, x.shape[-1:], *self.norm).to(self.dtype)
        qkv = self.to_qkv(normed).to(self.cache_dtype).view(len(x), 3, self.heads, 1, self.dim_head)
        slot, read = self.slots[position], self.reads[position]
        self.keys[:, :, slot] = qkv[:, 1, :, 0]
        self.values[:, :, slot] = qkv[:, 2, :, 0]
        if isinstance(read, int):
            keys, values = self.keys[:, :, :read], self.values[:, :, :read]
        else:
            read = read.to(x.device)
            keys, values = self.keys.index_select(2, read), self.values.index_select(2, read)
        out = F.scaled_dot_product_attention(qkv[:, 0], keys, values)  # (B, H, 1, D)
        x = x + self.after(self.to_out(out.view(len(x), -1).to(self.dtype)), self.norm_after)
        normed = F.layer_norm(x, x.shape[-1:], *self.ff_norm).to(self.dtype)
        value, gate = self.wide(normed).chunk(2, dim=-1)
        return x + self.after(self.narrow(value * F.gelu(gate)), self.ff_norm_after)

    @staticmethod
    def after(out, norm):
        return out if norm is None else F.layer_norm(out.float(), out.shape[-1:], *norm)


class Decoder:
    """Logits of the next code, for sampling.draw_codes; holds the caches of one drawing at a time."""

    @torch.no_grad()
    def __init__(self, dalle, pack, dtype, cache_dtype, autocast=contextlib.nullcontext):
        """pack(weight, bias or None) → a function (B, in) → (B, out), both of `dtype`. cache_dtype: in which a machine
        attends fastest. autocast() → the context of the pass over captions, which the model itself does.
        """
        self.dalle = dalle
        plans, self.layers = {}, []
        for attention, feed_forward in dalle.transformer.layers:
            mask = attention.fn.fn.mask.cpu()
            name = mask.numpy().tobytes()
            if name not in plans:  # once a pattern
                plans[name] = cache_plan(mask)
            self.layers.append(Layer(attention, feed_forward, plans[name], pack, dtype, cache_dtype))
        norm, projection = dalle.to_logits
        self.norm = norm.weight, norm.bias
        codes = slice(dalle.num_text_tokens, dalle.num_tokens)
        self.to_logits = pack(projection.weight[codes], projection.bias[codes])
        self.dtype, self.autocast = dtype, autocast

    def logits(self, dalle, text, codes, cache):
        """draw_codes' logits_of: text int64 (B, T), codes int64 (B, n) so far → (B, V)."""
        place = codes.shape[1]
        if cache[0].keys is None:  # draw_codes made it anew: the first call of a drawing
            cache[0].keys = self.layers[0]
            return self.begin(text, codes)
        x = dalle.image_emb(codes[:, -1]) + self.positions[place - 1]  # (B, dim)
        for layer in self.layers:
            x = layer(x, dalle.text_seq_len + place)
        return self.head(x)

    def begin(self, text, codes):
        """The pass over captions, each different one once, and given codes."""
        dalle = self.dalle
        self.positions = dalle.image_pos_emb()[0]  # (L, dim)
        seen = torch.cat((text, codes), dim=1)
        different, rows = seen.unique(dim=0, return_inverse=True)
        text, codes = different.split((text.shape[1], codes.shape[1]), dim=1)
        prefixes = [Prefix() for _ in self.layers]
        with self.autocast():
            x = dalle.embed_text(dalle.number_padding(text))
            if codes.shape[1]:
                x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
            x = dalle.transformer(x, cache=prefixes)[:, -1]
        for layer, prefix in zip(self.layers, prefixes):
            layer.start(prefix, rows)
        return self.head(x.float()[rows])

    def head(self, x):
        return self.to_logits(F.layer_norm(x, x.shape[-1:], *self.norm).to(self.dtype))
