"""A whole picture drawn in one call with shapes that never change: what an IPU compiles once and then runs by itself.

Same codes as sampling.py's loop for the same noise. The loop over codes and the write into the key/value cache are
handed in, since an IPU has its own for both; in_python and write_in_place are plain PyTorch's. Everything that depends
on the place of a code is read by an index that is a tensor.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import PrefixCache
from models.sampling import check_sampling, choose_code


def in_python(count, body, inputs):
    """body(*tensors) → as many tensors, `count` times over: poptorch.for_loop's signature."""
    for _ in range(count):
        inputs = body(*inputs)
    return inputs


def write_in_place(tensor, source, dim, start, size):
    """`source`, `size` long in dimension `dim`, written into tensor at `start` (1,): poptorch.dynamic_update's
    signature.
    """
    return tensor.index_copy_(dim, start.long() + torch.arange(size, device=tensor.device), source)


class FullLength:
    """A layer's cache with all N positions, of which those to come are masked; `start` is a tensor (1,)."""

    def __init__(self, keys, values, visible, update):
        self.keys, self.values = keys, values  # (B, H, N, D) each
        self.visible, self.update = visible, update  # the mask as numbers, 1 or 0: rows of bool cannot be selected

    def put(self, keys, values, mask, start):
        self.keys = self.update(self.keys, keys, 2, start, 1)
        self.values = self.update(self.values, values, 2, start, 1)
        return self.keys, self.values, self.visible.index_select(0, start) > 0.5


class FullPass(nn.Module):
    """Logits of one code from a pass over everything, the oracle of what follows: text int (B, T), codes int (B, L) of
    which those from `place` (1,) on do not count → (B, V).
    """

    def __init__(self, dalle):
        super().__init__()
        self.dalle = dalle

    @torch.no_grad()
    def forward(self, text, codes, place):
        dalle = self.dalle
        x = dalle.embed_text(dalle.number_padding(text))
        x = dalle.transformer(torch.cat((x, dalle.embed_codes(codes[:, :-1])), dim=1))  # (B, T + L, dim)
        return dalle.image_logits(x.index_select(1, place + dalle.text_seq_len))[:, 0]


class StaticSampler(nn.Module):
    """forward(text, noise, given codes) → codes; settings are those of sampling.generate_codes and fixed here."""

    def __init__(self, dalle, *, top_k, top_p, temperature, cond_scale, loop=in_python, update=write_in_place):
        super().__init__()
        check_sampling(top_k, top_p, temperature, cond_scale)
        self.dalle, self.loop, self.update = dalle, loop, update
        self.shaping = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "cond_scale": cond_scale}
        self.mask_names = []  # of each layer's mask among the buffers; layers of one pattern share it
        masks = {}
        for attention, _ in dalle.transformer.layers:
            mask = attention.fn.fn.mask
            name = masks.setdefault(mask.cpu().numpy().tobytes(), f"visible_{len(masks)}")
            self.register_buffer(name, mask.to(dalle.text_emb.weight.dtype), persistent=False)
            self.mask_names.append(name)

    @torch.no_grad()
    def forward(self, text, noise, given=None):
        """text int (B, text_seq_len), noise fp32 (B, L, V) (see sampling.gumbel_noise), given int (B, n): the first n
        codes → int (B, L), all of them.
        """
        dalle, guided = self.dalle, self.shaping["cond_scale"] != 1
        count = 0 if given is None else given.shape[1]
        place = torch.full((1,), count, dtype=torch.int32, device=text.device)  # of the code to be chosen next

        prefixes = [PrefixCache() for _ in dalle.transformer.layers]
        branches = torch.cat((text, torch.zeros_like(text))) if guided else text  # (2B or B, T)
        x = dalle.embed_text(dalle.number_padding(branches))
        if count:
            x = torch.cat((x, dalle.embed_codes(torch.cat((given, given)) if guided else given)), dim=1)
        x = dalle.transformer(x, cache=prefixes)  # (2B or B, T + 1 + n, dim)
        code = self.next_code(x[:, -1], noise, place)  # (B, 1)
        steps = dalle.image_seq_len - count - 1
        codes = torch.cat((given.to(code.dtype), code), dim=1) if count else code
        codes = F.pad(codes, (0, steps))  # (B, L)

        length = dalle.text_seq_len + dalle.image_seq_len
        caches = [tensor for prefix in prefixes for tensor in (prefix.keys, prefix.values)]
        caches = [F.pad(tensor, (0, 0, 0, length - tensor.shape[2])) for tensor in caches]  # (2B or B, H, N, D) each
        positions = dalle.image_pos_emb()  # (1, L, dim)

        def one_code(place, codes, code, *tensors):
            """`code` was chosen for the place before `place`."""
            layers = [
                FullLength(*tensors[2 * number : 2 * number + 2], getattr(self, name), self.update)
                for number, name in enumerate(self.mask_names)
            ]
            seen = torch.cat((code, code)) if guided else code
            x = dalle.image_emb(seen) + positions.index_select(1, place - 1)  # (2B or B, 1, dim)
            x = dalle.transformer(x, cache=layers, start=place + dalle.text_seq_len)
            code = self.next_code(x[:, -1], noise, place)
            codes = self.update(codes, code, 1, place, 1)
            return [place + 1, codes, code, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]

        return self.loop(steps, one_code, [place + 1, codes, code, *caches])[1] if steps else codes

    def next_code(self, x, noise, place):
        """x (2B or B, dim) of the last position → int32 (B, 1)."""
        noise = noise.index_select(1, place)[:, 0]
        logits = self.dalle.image_logits(x)
        return choose_code(logits, noise, num_tokens=self.dalle.num_tokens, **self.shaping)[:, None].to(torch.int32)
