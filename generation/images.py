"""From prompts to codes to images: what defines an image, which images can share a batch, and image files in memory.

An image depends on its own seed, prompt, settings and given codes alone, not on its batch.
"""

import io
import json
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from backends import OutOfMemory, explain_out_of_memory
from data.tokenizer import encode_text
from generation.loading import LoadedModel
from models.sampling import CodeCallback, Sampling, evaluation_mode, gumbel_noise, keep_top_p
from utils.checkpoint import short

TOO_LARGE = "the model is too large for this device; try --precision bf16, or --device cpu"


class ImageSpec(NamedTuple):
    """What defines an image to generate."""

    prompt: str
    tokens: Tensor  # int64 (text_seq_len,)
    seed: int
    sampling: Sampling
    given_codes: Tensor  # int64 (n,), the first codes of the image, which are kept

    def with_seeds(self, count: int) -> List["ImageSpec"]:
        """Return `count` images that differ in their seeds alone, which follow this one's."""
        return [self._replace(seed=self.seed + number) for number in range(count)]


def plan_image(
    loaded: LoadedModel,
    prompt: str,
    seed: int,
    sampling: Union[None, Sampling, Mapping[str, Any]] = None,
    given_codes: Optional[Tensor] = None,
    tokens: Optional[Tensor] = None,
) -> ImageSpec:
    """Check what was asked for and return the image to generate.

    Args:
        sampling: a complete Sampling, or settings by name that replace the checkpoint's recommended ones.
        tokens: the prompt's tokens, if they are known.

    Raises:
        ValueError: one sentence, if the model cannot do it or a setting is out of its range.
    """
    tokens = encode_prompt(loaded, prompt) if tokens is None else tokens
    if not isinstance(sampling, Sampling):
        sampling = sampling or {}
        unknown = sorted(set(sampling) - set(Sampling._fields))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: unknown setting; choose from {', '.join(Sampling._fields)}")
        sampling = loaded.recommended.override(sampling)
    sampling.check()
    if sampling.is_guided and not loaded.guidable:
        raise ValueError(
            f"cond_scale is {sampling.cond_scale}, but {loaded.path} was trained without --caption-dropout and "
            "cannot be guided; leave it at 1"
        )
    given_codes = tokens.new_zeros(0) if given_codes is None else given_codes
    if len(given_codes) >= loaded.model.image_seq_len:
        raise ValueError("the whole image is kept; keep fewer rows, so that some are left to generate")
    return ImageSpec(prompt, tokens, int(seed), sampling, given_codes)


def encode_prompt(loaded: LoadedModel, prompt: str) -> Tensor:
    """Return a prompt's tokens, int64 (text_seq_len,); ValueError if there are too many, or no known word."""
    tokens = encode_text(loaded.tokenizer, prompt)
    if not loaded.tokenizer.decode(tokens):  # no tokens, or unknown ones alone
        raise ValueError(f"'{prompt[:60]}' has no words that the vocabulary knows")
    most = loaded.model.text_seq_len
    if len(tokens) > most:
        raise ValueError(f"'{prompt[:60]}' is {len(tokens)} tokens long; the model reads at most {most}")
    return torch.tensor(tokens + [0] * (most - len(tokens)))


@torch.no_grad()
def complete_caption(loaded: LoadedModel, prompt: str, seed: int) -> Tuple[Tensor, str]:
    """Let the model continue a caption until it ends it; return its tokens, int64 (text_seq_len,), and its text.

    top-p is 0.9, because captions have only an eighth of the training loss, and their unlikely words are unreliable.
    """
    device, generator = loaded.backend.device, torch.Generator().manual_seed(seed)
    dalle = loaded.model.to(device)
    tokens = encode_prompt(loaded, prompt)
    tokens = tokens[tokens != 0][None].to(device)
    with evaluation_mode(dalle):
        for place in range(tokens.shape[1], dalle.text_seq_len):
            seen = F.pad(tokens, (0, dalle.text_seq_len - place))
            x = dalle.transformer(dalle.embed_text(dalle.number_padding(seen))[:, : place + 1])
            logits = dalle.text_logits(x[:, -1]).float()  # (1, num_text_tokens)
            logits[:, 0] = float("-inf")  # in a caption 0 is padding, for which each position has an id
            noise = gumbel_noise(1, 1, dalle.num_text_tokens, generator, device)[:, 0]
            token = (keep_top_p(logits, 0.9) + noise).argmax(-1)
            if int(token) >= dalle.first_padding_id:
                break
            tokens = torch.cat((tokens, token[:, None]), dim=1)
    tokens = F.pad(tokens, (0, dalle.text_seq_len - tokens.shape[1]))[0].cpu()
    return tokens, " ".join(loaded.tokenizer.decode(tokens).split())


def batch_key(spec: ImageSpec) -> Tuple[Sampling, int]:
    """Return a key; images with equal keys can share a batch, whatever their prompts and seeds."""
    return spec.sampling, len(spec.given_codes)


def group_into_batches(specs: Sequence[ImageSpec], size: int) -> List[List[int]]:
    """Return batches of up to `size` images, as lists of their indices, ordered by their first image."""
    groups: Dict[Tuple[Sampling, int], List[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(batch_key(spec), []).append(index)
    batches = [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]
    return sorted(batches)


def generate_lists(
    loaded: LoadedModel,
    lists: Sequence[Sequence[ImageSpec]],
    make_on_code: Callable[[List[ImageSpec]], Optional[CodeCallback]] = lambda specs: None,
    on_batch: Callable[[int], Any] = lambda count: None,
) -> Iterator[Tensor]:
    """Yield the codes int64 (n, L) of each list, in order, as soon as they are complete.

    Images of several lists share batches.

    Args:
        make_on_code: returns generate_batch's on_code for a batch.
        on_batch: called with the number of images of each finished batch.
    """
    specs = [spec for part in lists for spec in part]
    codes: List[Any] = [None] * len(specs)
    ends = list(accumulate(len(part) for part in lists))
    start = ready = 0
    for indices in group_into_batches(specs, loaded.batch_size):
        batch = [specs[index] for index in indices]
        for index, row in zip(indices, generate_batch(loaded, batch, make_on_code(batch))):
            codes[index] = row
        on_batch(len(batch))
        while ready < len(lists) and all(row is not None for row in codes[start : ends[ready]]):
            yield torch.stack(codes[start : ends[ready]])
            start, ready = ends[ready], ready + 1


def generate_batch(loaded: LoadedModel, specs: Sequence[ImageSpec], on_code: Optional[CodeCallback] = None) -> Tensor:
    """Sample the codes int64 (B, L) of images with equal batch_key, at most loaded.batch_size of them.

    on_code is called with the codes so far, int64 (B, n), after every code, if the machine can do that; if it raises,
    sampling ends.

    Raises:
        OutOfMemory: fewer images at once may fit; the memory of this batch is free again.
    """
    count = len(specs)
    try:
        half = f"{count} images at once are too many; --batch_size {count // 2} needs half"
        with explain_out_of_memory(half if count > 1 else TOO_LARGE):
            return loaded.sampler(
                torch.stack([spec.tokens for spec in specs]),
                specs[0].sampling,
                generator=[torch.Generator().manual_seed(spec.seed) for spec in specs],
                image_codes=torch.stack([spec.given_codes for spec in specs]),
                on_code=on_code,
            )
    except OutOfMemory:
        loaded.drop_sampler()
        raise


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels, float (3, H, W) in [0, 1], to an image; values are rounded, contrast stays as it is."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def make_grid(images: Sequence[Image.Image], columns: Optional[int] = None, gap: int = 2) -> Image.Image:
    """Arrange images of one size row by row on white, about as many rows as columns by default."""
    columns = columns or max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    width, height = images[0].width + gap, images[0].height + gap
    grid = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        grid.paste(image, (gap + column * width, gap + row * height))
    return grid


def image_metadata(spec: ImageSpec, loaded: LoadedModel, scores: Optional[Dict[str, float]] = None) -> Dict[str, Any]:
    """Return what is needed to generate an image again, as plain values, and its scores."""
    return {
        "prompt": spec.prompt,
        "seed": spec.seed,
        **spec.sampling._asdict(),
        **({"kept_rows": len(spec.given_codes) // loaded.side} if len(spec.given_codes) else {}),
        "checkpoint": Path(loaded.path).name,
        "fingerprint": short(loaded.fingerprint),
        **({"scores": scores} if scores else {}),
    }


def encode_image(image: Image.Image, metadata: Mapping[Any, Any], format: str = "png") -> bytes:
    """Return the bytes of a png or jpg file that has the metadata as JSON in its comment."""
    comment, file = json.dumps(metadata, ensure_ascii=False), io.BytesIO()
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("Description", metadata["prompt"])
        chunks.add_itxt("Software", "Mini DALL-E")
        chunks.add_itxt("Comment", comment)
        image.save(file, "PNG", pnginfo=chunks)
    else:
        image.save(file, "JPEG", quality=95, subsampling=0, comment=comment.encode())
    return file.getvalue()
