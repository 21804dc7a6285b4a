"""What generate.py does once its flags are read: from prompts to image files, in one process or several."""

import contextlib
import functools
import logging
import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import log
from args_generate import Request
from backends.base import Backend
from backends.memory import memory_explained
from generation import image_prompts, output, previews, ranking
from generation.batching import ImageSpec, complete_caption, encode_prompt, generate_lists, plan_image
from generation.loading import LoadedModel, load_from_flags
from models.sampling import CodeCallback, Sampling
from utils.files import check_writable

logger = logging.getLogger("minidalle")


@memory_explained("a smaller --batch_size needs less; so does --precision bf16")
def run(settings: Namespace) -> None:
    """Generate and save the images that the flags ask for."""
    loaded = load_from_flags(settings)
    backend = loaded.backend
    seed, share_images = agree_on_seed(settings, backend)
    plans = plan_images(settings, loaded, seed)
    clip = load_clip(settings, backend)
    check_writable(settings.outputs_dir, "--outputs_dir")
    logger.info("seed %d, %s", seed, describe_sampling(plans[0][0].sampling, loaded.recommended))
    if share_images:
        parts = [own_part(specs, backend) for specs in plans]
    else:
        parts = plans = own_prompts(plans, backend)
    total = sum(map(len, parts))
    loaded.batch_size = max(1, min(loaded.batch_size, total))
    start = time.monotonic()
    bar = tqdm(total=total, unit="image", desc="generating", disable=None)
    with bar, preview_callback(settings, loaded) as make_on_code:
        for specs, codes in zip(plans, generate_lists(loaded, parts, make_on_code, bar.update)):
            if share_images:
                codes = backend.gather(codes)
                if backend.rank:
                    continue
            save_best(settings, loaded, specs, codes, clip)
    logger.info("throughput: %.3f images/sec", total / max(time.monotonic() - start, 1e-9))


def agree_on_seed(settings: Namespace, backend: Backend) -> Tuple[int, bool]:
    """Return the first seed, and whether processes share the images of each prompt, rather than the prompts."""
    seed = new_seed() if settings.seed is None else settings.seed
    counts = [request.num_images or settings.num_images for request in settings.requests or ()] or [settings.num_images]
    share_images = backend.can_gather and len(counts) < backend.world_size <= min(counts)
    if share_images:
        seed = int(backend.gather(torch.tensor([seed]))[0])
        log.set_up(logging.WARNING if backend.rank else logging.INFO)
    return seed, share_images


def new_seed() -> int:
    """Return a random seed that fits any generator."""
    return random.SystemRandom().randrange(2**31)


def plan_images(settings: Namespace, loaded: LoadedModel, seed: int) -> List[List[ImageSpec]]:
    """Return the images of each request; all are checked before the first is generated.

    Raises:
        ValueError, OSError: a prompt, an image or a setting cannot be used; one line.
    """
    encode_rows = functools.lru_cache(maxsize=None)(functools.partial(image_prompts.encode_kept_rows, loaded))
    requests = settings.requests
    if requests is None:
        prompt = image_prompts.read_prompt(settings.variations)
        if prompt is None:
            raise ValueError(f"--variations {settings.variations}: the image has no prompt in it; give it with --text")
        requests = [Request(prompt)]
    plans = []
    for request in requests:
        first = seed if request.seed is None else request.seed
        if settings.gentxt:
            tokens, prompt = complete_caption(loaded, request.prompt, first)
            logger.info("completed prompt: %s", prompt)
            request = request._replace(prompt=prompt, tokens=tokens)
        plans.append(plan_request(request, settings, loaded, first, encode_rows))
    unknown = dict.fromkeys(word for specs in plans for word in loaded.unknown_words(specs[0].prompt))
    if unknown:
        logger.warning("no training caption has the words: %s", ", ".join(unknown))
    return plans


def plan_request(
    request: Request, settings: Namespace, loaded: LoadedModel, seed: int, encode_rows: Callable[..., Tensor]
) -> List[ImageSpec]:
    """Return all images to generate for a request, in the order of their seeds."""
    image, given_codes = request.image_prompt or settings.image_prompt or settings.variations, None
    if not image and request.keep_rows is not None:
        raise ValueError(f"{request.source}: keeps rows of an image; name it as image_prompt, or with --image_prompt")
    if image:
        given_codes = encode_rows(image, settings.keep_rows if request.keep_rows is None else request.keep_rows)
    sampling = loaded.recommended.override(vars(settings)).override(request.sampling)
    try:
        tokens = encode_prompt(loaded, request.prompt) if request.tokens is None else request.tokens
    except ValueError as error:
        raise ValueError(f"{request.source}: {error}") from None
    first = plan_image(loaded, request.prompt, seed, sampling, given_codes, tokens)
    count = settings.rank * (settings.num_images if request.num_images is None else request.num_images)
    return [first._replace(seed=seed + number) for number in range(count)]


def own_part(specs: List[ImageSpec], backend: Backend) -> List[ImageSpec]:
    """Return this process's share of a prompt's images."""
    start, end = (len(specs) * rank // backend.world_size for rank in (backend.rank, backend.rank + 1))
    return specs[start:end]


def own_prompts(plans: List[List[ImageSpec]], backend: Backend) -> List[List[ImageSpec]]:
    """Return the requests of this process; equal prompts belong to one process, because they have one folder."""
    prompts = [specs[0].prompt for specs in plans]
    return [specs for specs in plans if prompts.index(specs[0].prompt) % backend.world_size == backend.rank]


def save_best(
    settings: Namespace,
    loaded: LoadedModel,
    specs: List[ImageSpec],
    codes: Tensor,
    clip: Optional[ranking.ClipScore],
) -> None:
    """Decode and save the best images of a prompt, and say where."""
    best: List[Tuple[int, Optional[Dict[str, float]]]] = [(index, None) for index in range(len(specs))]
    if settings.rank > 1:
        best = ranking.best_of(loaded, specs, codes, len(specs) // settings.rank, clip)
    codes = codes[[index for index, _ in best]]
    images = [output.to_image(pixels) for pixels in loaded.decode(codes)]
    metadata = [output.image_metadata(specs[index], loaded, scores) for index, scores in best]
    frames = previews.animation_frames(loaded, codes) if settings.animate else None
    folder = output.save_images(images, metadata, settings.outputs_dir, settings.format, frames)
    tqdm.write(f"{len(images)} images of '{specs[0].prompt}' in {folder}")


def describe_sampling(sampling: Sampling, recommended: Sampling) -> str:
    """List settings for the log, with the checkpoint's recommendation if it differs."""
    return ", ".join(
        f"{name} {value}" + (f" (recommended {advice})" if value != advice else "")
        for name, value, advice in zip(Sampling._fields, sampling, recommended)
    )


def load_clip(settings: Namespace, backend: Backend) -> Optional[ranking.ClipScore]:
    """Load the CLIP model of --clip-weights, or return None, so that the model itself chooses."""
    if settings.clip_weights is None:
        return None
    from models.image_scores import clip_score  # few installations have its package

    return clip_score(settings.clip_weights, settings.clip_model, backend.device)


@contextlib.contextmanager
def preview_callback(
    settings: Namespace, loaded: LoadedModel
) -> Iterator[Callable[[List[ImageSpec]], Optional[CodeCallback]]]:
    """Yield generate_lists' make_on_code, which writes preview.png with --preview; remove that file at the end."""
    if settings.preview is None:
        yield lambda specs: None
        return
    path = Path(settings.outputs_dir) / output.PREVIEW

    def save(images: List[Image.Image], row: int) -> None:
        output.save_grid(images, path)

    try:
        yield lambda specs: previews.Preview(loaded, settings.preview, save)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
