"""Sampling with fixed shapes, which an IPU compiles once for all captions, settings and image prompts.

It gives the codes of sampling.sample_codes for the same noise. A call computes R sequences, R even. Each is an image;
or sequences i and i + R/2 are one guided image, with its caption and with an empty one. Sampling settings are a tensor
with a row for each sequence. The loop over codes and the write into the key/value cache are arguments, because an IPU
has its own operators for both. Whatever depends on the place of a code is read with an index that is a tensor.
"""

from typing import Any, Callable, Dict, List, Tuple

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
        """See transformer.LayerCache."""
        self.keys = self.update(self.keys, keys, 2, start, 1)
        self.values = self.update(self.values, values, 2, start, 1)
        return self.keys, self.values, self.visible.index_select(0, start) > 0.5


def settings_row(sampling: Sampling, given: int, dalle: DALLE) -> Tensor:
    """Return a sequence's settings, float32 (5,): guidance, temperature, codes to keep, probability to keep, `given`.

    Args:
        given: number of codes of the image that are not sampled.

    Raises:
        ValueError: a setting is out of its range.
    """
    sampling.check()
    count, mass = sampling.codes_to_keep(dalle.num_tokens), sampling.top_p
    count = min(dalle.num_image_tokens if count is None else count, dalle.num_image_tokens)
    no_limit = 2.0  # above every probability
    return torch.tensor([sampling.cond_scale, sampling.temperature, count, no_limit if mass is None else mass, given])


def choose_codes(logits: Tensor, noise: Tensor, settings: Tensor) -> Tensor:
    """Choose one code for each of R sequences, as Sampling.choose does.

    Args:
        logits: (R, V).
        noise: Gumbel noise (R, V).
        settings: float (R, 5), see settings_row.

    Returns:
        Integers (R, 1).
    """
    scale, temperature, count, mass, _ = settings.split(1, dim=1)  # (R, 1) each
    first, second = logits.float().chunk(2)
    scale = scale.chunk(2)[0]
    is_guided = scale != 1
    first = torch.where(is_guided, second + scale * (first - second), first)
    ordered, order = (torch.cat((first, second)) / temperature).sort(dim=-1, descending=True)
    least = ordered.gather(-1, count.long() - 1)
    ordered = ordered.masked_fill(ordered < least, float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill(before >= mass, float("-inf"))
    chosen = (ordered + noise.gather(-1, order)).argmax(-1, keepdim=True)
    first, second = order.gather(-1, chosen).chunk(2)
    return torch.cat((first, torch.where(is_guided, first, second)))  # a guided image continues with one code


class FullPass(nn.Module):
    """Samples one code of each sequence with a pass over everything."""

    def __init__(self, dalle: DALLE):
        super().__init__()
        self.dalle = dalle

    @torch.no_grad()
    def forward(self, text: Tensor, noise: Tensor, codes: Tensor, settings: Tensor, place: Tensor) -> Tensor:
        """Choose the codes int32 (R, 1) at `place` (1,), after those before it; later ones are ignored.

        Args:
            text: int (R, text_seq_len).
            noise: float32 (R, L, V), see sampling.gumbel_noise.
            codes: int (R, L).
            settings: float32 (R, 5), see settings_row.
        """
        dalle = self.dalle
        x = dalle.embed_text(dalle.number_padding(text))
        x = dalle.transformer(torch.cat((x, dalle.embed_codes(codes[:, :-1])), dim=1))  # (R, T + L, dim)
        logits = dalle.image_logits(x.index_select(1, place + dalle.text_seq_len))[:, 0]
        return choose_codes(logits, noise.index_select(1, place)[:, 0], settings).to(torch.int32)


class StaticSampler(nn.Module):
    """Samples all codes of all sequences in one call.

    Args:
        loop: repeats the step over codes; see loop_in_python.
        update: writes into a tensor at an index that is a tensor; see write_in_place.
    """

    def __init__(
        self,
        dalle: DALLE,
        loop: Callable[..., List[Tensor]] = loop_in_python,
        update: Callable[..., Tensor] = write_in_place,
    ):
        super().__init__()
        self.dalle, self.loop, self.update = dalle, loop, update
        self.mask_names = []  # of each layer's mask among the buffers; layers of one pattern share it
        masks: Dict[bytes, str] = {}
        for layer in dalle.transformer.layers:
            mask = layer.attention.mask
            name = masks.setdefault(mask.cpu().numpy().tobytes(), f"visible_{len(masks)}")
            self.register_buffer(name, mask.to(dalle.text_emb.weight.dtype), persistent=False)
            self.mask_names.append(name)

    @torch.no_grad()
    def forward(self, text: Tensor, noise: Tensor, given: Tensor, settings: Tensor) -> Tensor:
        """Sample the codes int32 (R, L).

        Args:
            text: int (R, text_seq_len).
            noise: float32 (R, L, V), see sampling.gumbel_noise.
            given: int (R, L); the first codes of each sequence, as many as its settings say, are kept.
            settings: float32 (R, 5), see settings_row.
        """
        dalle, given = self.dalle, given.to(torch.int32)
        prefixes = [PrefixCache() for _ in dalle.transformer.layers]
        x = dalle.transformer(dalle.embed_text(dalle.number_padding(text)), cache=prefixes)  # (R, T + 1, dim)
        place = torch.zeros(1, dtype=torch.int32, device=text.device)  # of the code to choose next
        code = self.next_code(x[:, -1], noise, given, settings, place)  # (R, 1)
        steps = dalle.image_seq_len - 1
        codes = F.pad(code, (0, steps))  # (R, L)

        length = dalle.text_seq_len + dalle.image_seq_len
        caches = [tensor for prefix in prefixes for tensor in (prefix.keys, prefix.values)]
        caches = [F.pad(tensor, (0, 0, 0, length - tensor.shape[2])) for tensor in caches]  # (R, H, N, D) each
        positions = dalle.image_pos_emb()  # (1, L, dim)

        def sample_one(place: Tensor, codes: Tensor, code: Tensor, *tensors: Tensor) -> List[Tensor]:
            # `code` was chosen for the place before `place`.
            layers = [
                FullLengthCache(tensors[2 * number], tensors[2 * number + 1], getattr(self, name), self.update)
                for number, name in enumerate(self.mask_names)
            ]
            x = dalle.image_emb(code) + positions.index_select(1, place - 1)  # (R, 1, dim)
            x = dalle.transformer(x, cache=layers, start=place + dalle.text_seq_len)
            code = self.next_code(x[:, -1], noise, given, settings, place)
            codes = self.update(codes, code, 1, place, 1)
            return [place + 1, codes, code, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]

        return self.loop(steps, sample_one, [place + 1, codes, code, *caches])[1]

    def next_code(self, x: Tensor, noise: Tensor, given: Tensor, settings: Tensor, place: Tensor) -> Tensor:
        """Choose the codes int32 (R, 1) at `place` (1,) from x (R, dim), or take the given ones."""
        code = choose_codes(self.dalle.image_logits(x), noise.index_select(1, place)[:, 0], settings).to(torch.int32)
        return torch.where(place < settings[:, -1:], given.index_select(1, place), code)
