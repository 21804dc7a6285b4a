"""Sampling of whole images in one call with fixed shapes, which an IPU compiles once and then runs by itself.

It gives the codes of sampling.sample_codes for the same noise. The loop over codes and the write into the key/value
cache are arguments, because an IPU has its own operators for both. Whatever depends on the place of a code is read with
an index that is a tensor.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dalle import DALLE
from models.sampling import Sampling
from models.transformer import PrefixCache


def loop_in_python(count: int, body: Callable[..., List[Tensor]], inputs: List[Tensor]) -> List[Tensor]:
    """Call inputs = body(*inputs) `count` times; the signature is that of poptorch.for_loop."""
    for _ in range(count):
        inputs = body(*inputs)
    return inputs


def write_in_place(tensor: Tensor, source: Tensor, dim: int, start: Tensor, size: int) -> Tensor:
    """Write `source`, of length `size` in dimension `dim`, at `start` (1,); poptorch.dynamic_update's signature."""
    return tensor.index_copy_(dim, start.long() + torch.arange(size, device=tensor.device), source)


class FullLengthCache:
    """Keys and values of all N positions of a layer, of which future ones are masked; `start` is a tensor (1,).

    Args:
        keys: (B, H, N, D), as values.
        visible: the mask as numbers, 1 or 0, because an IPU cannot select rows of booleans.
        update: writes one position; see write_in_place.
    """

    def __init__(self, keys: Tensor, values: Tensor, visible: Tensor, update: Callable[..., Tensor]):
        self.keys, self.values, self.visible, self.update = keys, values, visible, update

    def append(self, keys: Tensor, values: Tensor, mask: Tensor, start: Any) -> Tuple[Tensor, Tensor, Tensor]:
        """See PrefixCache.append."""
        self.keys = self.update(self.keys, keys, 2, start, 1)
        self.values = self.update(self.values, values, 2, start, 1)
        return self.keys, self.values, self.visible.index_select(0, start) > 0.5


class FullPass(nn.Module):
    """The logits of one code from a pass over everything, with fixed shapes."""

    def __init__(self, dalle: DALLE):
        super().__init__()
        self.dalle = dalle

    @torch.no_grad()
    def forward(self, text: Tensor, codes: Tensor, place: Tensor) -> Tensor:
        """Compute logits (B, V) from text int (B, T) and codes int (B, L), ignoring those from `place` (1,) on."""
        dalle = self.dalle
        x = dalle.embed_text(dalle.number_padding(text))
        x = dalle.transformer(torch.cat((x, dalle.embed_codes(codes[:, :-1])), dim=1))  # (B, T + L, dim)
        return dalle.image_logits(x.index_select(1, place + dalle.text_seq_len))[:, 0]


class StaticSampler(nn.Module):
    """Samples all codes of a batch in one call; the sampling settings are fixed.

    Args:
        loop: repeats the step over codes; see loop_in_python.
        update: writes into a tensor at an index that is a tensor; see write_in_place.
    """

    def __init__(
        self,
        dalle: DALLE,
        sampling: Sampling,
        loop: Callable[..., List[Tensor]] = loop_in_python,
        update: Callable[..., Tensor] = write_in_place,
    ):
        super().__init__()
        sampling.check()
        self.dalle, self.sampling, self.loop, self.update = dalle, sampling, loop, update
        self.mask_names = []  # of each layer's mask among the buffers; layers of one pattern share it
        masks: Dict[bytes, str] = {}
        for attention, _ in dalle.transformer.layers:
            mask = attention.fn.fn.mask
            name = masks.setdefault(mask.cpu().numpy().tobytes(), f"visible_{len(masks)}")
            self.register_buffer(name, mask.to(dalle.text_emb.weight.dtype), persistent=False)
            self.mask_names.append(name)

    @torch.no_grad()
    def forward(self, text: Tensor, noise: Tensor, given: Optional[Tensor] = None) -> Tensor:
        """Sample the codes int32 (B, L) of one image for each caption.

        Args:
            text: int (B, text_seq_len).
            noise: float32 (B, L, V), see sampling.gumbel_noise.
            given: int (B, n), the first n codes of each image, n < L.
        """
        dalle, guided = self.dalle, self.sampling.is_guided
        count = 0 if given is None else given.shape[1]
        place = torch.full((1,), count, dtype=torch.int32, device=text.device)  # of the code to choose next

        prefixes = [PrefixCache() for _ in dalle.transformer.layers]
        branches = torch.cat((text, torch.zeros_like(text))) if guided else text  # (2B or B, T)
        x = dalle.embed_text(dalle.number_padding(branches))
        if given is not None:
            x = torch.cat((x, dalle.embed_codes(torch.cat((given, given)) if guided else given)), dim=1)
        x = dalle.transformer(x, cache=prefixes)  # (2B or B, T + 1 + n, dim)
        code = self.next_code(x[:, -1], noise, place)  # (B, 1)
        steps = dalle.image_seq_len - count - 1
        codes = code if given is None else torch.cat((given.to(code.dtype), code), dim=1)
        codes = F.pad(codes, (0, steps))  # (B, L)

        length = dalle.text_seq_len + dalle.image_seq_len
        caches = [tensor for prefix in prefixes for tensor in (prefix.keys, prefix.values)]
        caches = [F.pad(tensor, (0, 0, 0, length - tensor.shape[2])) for tensor in caches]  # (2B or B, H, N, D) each
        positions = dalle.image_pos_emb()  # (1, L, dim)

        def sample_one(place: Tensor, codes: Tensor, code: Tensor, *tensors: Tensor) -> List[Tensor]:
            # `code` was chosen for the place before `place`.
            layers = [
                FullLengthCache(tensors[2 * number], tensors[2 * number + 1], getattr(self, name), self.update)
                for number, name in enumerate(self.mask_names)
            ]
            seen = torch.cat((code, code)) if guided else code
            x = dalle.image_emb(seen) + positions.index_select(1, place - 1)  # (2B or B, 1, dim)
            x = dalle.transformer(x, cache=layers, start=place + dalle.text_seq_len)
            code = self.next_code(x[:, -1], noise, place)
            codes = self.update(codes, code, 1, place, 1)
            return [place + 1, codes, code, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]

        return self.loop(steps, sample_one, [place + 1, codes, code, *caches])[1] if steps else codes

    def next_code(self, x: Tensor, noise: Tensor, place: Tensor) -> Tensor:
        """Choose a code int32 (B, 1) from x (2B or B, dim) of the last position."""
        noise = noise.index_select(1, place)[:, 0]
        return self.sampling.choose(self.dalle.image_logits(x), noise, self.dalle.num_tokens)[:, None].to(torch.int32)
