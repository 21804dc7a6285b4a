"""What generate.py does once its flags are read: from prompts to image files, in one process or several.

Each prompt gets a folder. The output folder also has results.jsonl, with a line for each image.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import random
import re
import time
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import log
from backends import explain_out_of_memory
from backends.base import Backend
from generation import image_prompts, previews, ranking
from generation.images import (
    ImageSpec,
    complete_caption,
    encode_image,
    encode_prompt,
    generate_lists,
    image_metadata,
    make_grid,
    plan_image,
    to_image,
)
from generation.loading import LoadedModel, load_from_flags
from models.sampling import CodeCallback, Sampling
from utils.files import atomic_write, check_writable, errors_name

if TYPE_CHECKING:
    from generate import Request

logger = logging.getLogger("minidalle")
NAME_BYTES = 200  # of a folder's name; file systems allow 255
RESULTS, PREVIEW = "results.jsonl", "preview.png"  # files in the output folder; each prompt has a folder there
MILLISECONDS, LAST_MILLISECONDS = 120, 2500  # that an animation shows a frame, and the complete image


@explain_out_of_memory("a smaller --batch_size needs less; so does --precision bf16")
def run(settings: Namespace) -> None:
    """Generate and save the images that the flags ask for."""
    loaded = load_from_flags(settings)
    backend = loaded.backend
    seed, share_images = agree_on_seed(settings, backend), shares_images(settings, backend)
    if share_images:
        log.set_up(logging.WARNING if backend.rank else logging.INFO)
    plans = plan_images(settings, loaded, seed)
    clip = None  # without it, the model itself chooses
    if settings.clip_weights is not None:
        from models.image_scores import clip_score  # few installations have its package

        clip = clip_score(settings.clip_weights, settings.clip_model, backend.device)
    check_writable(settings.outputs_dir, "--outputs_dir")
    logger.info("seed %d, %s", seed, describe_sampling(plans[0][0].sampling, loaded.recommended))
    rank, processes = backend.rank, backend.world_size
    if share_images:
        parts = [specs[len(specs) * rank // processes : len(specs) * (rank + 1) // processes] for specs in plans]
    else:  # a folder belongs to one process, because nothing locks its files
        folders = [folder_name(specs[0].prompt) for specs in plans]
        parts = plans = [specs for specs, name in zip(plans, folders) if folders.index(name) % processes == rank]
    total = sum(map(len, parts))
    loaded.batch_size = max(1, min(loaded.batch_size, total))
    start = time.monotonic()
    bar = tqdm(total=total, unit="image", desc="generating", disable=None)
    saving: Optional[Future] = None  # files are written while the next images are generated

    def on_batch(count: int) -> None:
        bar.update(count)
        if saving is not None and saving.done():
            saving.result()  # raises what went wrong

    with bar, preview_callback(settings, loaded) as make_on_code, ThreadPoolExecutor(1) as saver:
        try:
            for specs, codes in zip(plans, generate_lists(loaded, parts, make_on_code, on_batch)):
                if share_images:
                    codes = backend.gather(codes)
                    if backend.rank:
                        continue
                images, codes = finish_images(loaded, specs, codes, len(specs) // settings.rank, clip)
                frames = previews.animation_frames(loaded, codes) if settings.animate else ()
                if saving is not None:
                    saving.result()
                saving = saver.submit(save_images, images, settings.outputs_dir, settings.format, frames)
        finally:
            if saving is not None:
                saving.result()  # its error counts more than a Ctrl-C, or memory that ran out, since then
    logger.info("throughput: %.3f images/sec", sum(map(len, plans)) / max(time.monotonic() - start, 1e-9))


def agree_on_seed(settings: Namespace, backend: Backend) -> int:
    """Return the first seed, which is the same in all processes that can agree on one."""
    seed = new_seed() if settings.seed is None else settings.seed
    if settings.seed is None and backend.can_gather and backend.world_size > 1:
        seed = int(backend.gather(torch.tensor([seed]))[0])
    return seed


def shares_images(settings: Namespace, backend: Backend) -> bool:
    """Return whether processes share the images of each prompt, rather than the prompts."""
    counts = [request.num_images or settings.num_images for request in settings.requests]
    return backend.can_gather and len(counts) < backend.world_size <= min(counts)


def new_seed() -> int:
    return random.SystemRandom().randrange(2**31)


def plan_images(settings: Namespace, loaded: LoadedModel, seed: int) -> List[List[ImageSpec]]:
    """Return the images of each request; ValueError or OSError, in one line, before the first is generated."""
    encode_rows = functools.lru_cache(maxsize=None)(functools.partial(image_prompts.encode_kept_rows, loaded))
    plans = []
    for request in settings.requests:
        if not request.prompt:
            request = request._replace(prompt=image_prompts.read_prompt(settings.variations))
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
    request: "Request", settings: Namespace, loaded: LoadedModel, seed: int, encode_rows: Callable[..., Tensor]
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
    return first.with_seeds(settings.rank * (request.num_images or settings.num_images))


def finish_images(
    loaded: LoadedModel, specs: List[ImageSpec], codes: Tensor, count: int, clip: Optional[ranking.ClipScore] = None
) -> Tuple[List[Image.Image], Tensor]:
    """Return the best `count` images of a prompt, with their metadata as `info`, and their codes."""
    best: List[Tuple[int, Optional[Dict[str, float]]]] = [(index, None) for index in range(len(specs))]
    if count < len(specs):
        best = ranking.best_of(loaded, specs, codes, count, clip)
    codes = codes[[index for index, _ in best]]
    images = [to_image(pixels) for pixels in loaded.decode(codes)]
    for image, (index, scores) in zip(images, best):
        image.info.update(image_metadata(specs[index], loaded, scores))
    return images, codes


def describe_sampling(sampling: Sampling, recommended: Sampling) -> str:
    """List settings for the log, with the checkpoint's recommendation if it differs."""
    return ", ".join(
        f"{name} {value}" + (f" (recommended {advice})" if value != advice else "")
        for name, value, advice in zip(Sampling._fields, sampling, recommended)
    )


@contextlib.contextmanager
def preview_callback(
    settings: Namespace, loaded: LoadedModel
) -> Iterator[Callable[[List[ImageSpec]], Optional[CodeCallback]]]:
    """Yield generate_lists' make_on_code, which writes preview.png with --preview; remove that file at the end."""
    if settings.preview is None:
        yield lambda specs: None
        return
    path = Path(settings.outputs_dir) / PREVIEW
    try:
        yield lambda specs: previews.Preview(loaded, settings.preview, lambda images, row: save_grid(images, path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def folder_name(prompt: str) -> str:
    """Turn a prompt into a file name: at most 100 characters, "_" for spaces and for special characters."""
    name = re.sub(r"[^\w.,'()+-]", "_", prompt)[:100].lstrip(".") or "prompt"
    return name.encode()[:NAME_BYTES].decode(errors="ignore")


def prompt_folder(prompt: str, outputs_dir: str) -> Path:
    """Return the folder of a prompt's images, created if needed; its caption.txt identifies it."""
    base, caption = Path(outputs_dir) / folder_name(prompt), f"{prompt}\n".encode()
    folder, number = base, 1

    def is_taken() -> bool:
        if folder.name in (RESULTS, PREVIEW) or folder.is_file():
            return True
        other = folder / "caption.txt"
        return other.exists() and other.read_bytes() != caption

    while is_taken():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    with atomic_write(folder / "caption.txt") as file:
        file.write(caption)
    return folder


def save_images(
    images: Sequence[Image.Image], outputs_dir: str, format: str = "jpg", frames: Sequence[List[Image.Image]] = ()
) -> Path:
    """Save the images of one prompt, a grid of them, and a line for each in results.jsonl; print the folder.

    Args:
        images: with image_metadata as `info`.
        frames: images after each row of codes (previews.animation_frames); they are saved as forming.webp.

    Returns:
        The prompt's folder. Files are called <number>-seed-<seed>.<format>, numbered after those that exist.
    """
    folder = prompt_folder(images[0].info["prompt"], outputs_dir)
    numbers = [re.match(r"\d+(?=-seed-\d+\.(jpg|png)$)", path.name) for path in folder.iterdir()]
    first = max((int(number[0]) for number in numbers if number), default=-1) + 1

    def save(number: int, image: Image.Image) -> str:
        path = folder / f"{number}-seed-{image.info['seed']}.{format}"
        with atomic_write(path) as file:
            file.write(encode_image(image, image.info, format))
        relative = os.path.relpath(path, outputs_dir).replace(os.sep, "/")
        return json.dumps({"file": relative, **image.info}, ensure_ascii=False) + "\n"

    with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
        lines = list(pool.map(save, itertools.count(first), images))
    suffix = "" if first == 0 else f"-{first}"
    save_grid(images, folder / f"grid{suffix}.png")
    if frames:
        grids = [make_grid(frame) for frame in frames]
        durations = [MILLISECONDS] * (len(grids) - 1) + [LAST_MILLISECONDS]
        options = {"save_all": True, "duration": durations, "loop": 0, "lossless": True, "method": 3}
        with atomic_write(folder / f"forming{suffix}.webp") as file:
            grids[0].save(file, "WEBP", append_images=grids[1:], **options)
    path = Path(outputs_dir) / RESULTS
    with errors_name(path), open(path, "a", encoding="utf-8") as results:
        results.write("".join(lines))  # one write, because other processes append to the file, too
    tqdm.write(f"{len(images)} images of '{images[0].info['prompt']}' in {folder}")
    return folder


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    with atomic_write(path) as file:
        make_grid(images).save(file, "PNG")
