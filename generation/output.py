"""Image files: PNG and JPEG with the settings that generated them, grids, animations and results.jsonl."""

import io
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from PIL import Image, PngImagePlugin
from torch import Tensor

from generation.batching import ImageSpec
from generation.loading import LoadedModel
from utils.checkpoint import short
from utils.files import atomic_write, errors_name

NAME_BYTES = 200  # of a folder's name; file systems allow 255
SUFFIXES = {"png": ".png", "jpg": ".jpg"}
RESULTS, PREVIEW = "results.jsonl", "preview.png"  # files in the output folder; each prompt has a folder there
MILLISECONDS, LAST_MILLISECONDS = 120, 2500  # that an animation shows a frame, and the complete image


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


def encode_image(image: Image.Image, metadata: Dict[str, Any], format: str = "png") -> bytes:
    """Return the bytes of a PNG or JPEG file that has the metadata as JSON in its comment.

    Args:
        format: png or jpg.
    """
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
    images: Sequence[Image.Image],
    metadata: Sequence[Dict[str, Any]],
    outputs_dir: str,
    format: str = "jpg",
    frames: Optional[List[List[Image.Image]]] = None,
) -> Path:
    """Save the images of one prompt, a grid of them, and a line for each in results.jsonl.

    Args:
        metadata: see image_metadata; the same order as images.
        frames: images after each row of codes (previews.animation_frames); they are saved as forming.webp.

    Returns:
        The prompt's folder. Files are called <number>-seed-<seed>.<format>, numbered after those that exist.
    """
    folder = prompt_folder(metadata[0]["prompt"], outputs_dir)
    numbers = [re.match(r"\d+(?=-seed-\d+\.(jpg|png)$)", path.name) for path in folder.iterdir()]
    first = max((int(number[0]) for number in numbers if number), default=-1) + 1

    def save(number: int, image: Image.Image, about: Dict[str, Any]) -> str:
        path = folder / f"{number}-seed-{about['seed']}{SUFFIXES[format]}"
        with atomic_write(path) as file:
            file.write(encode_image(image, about, format))
        relative = os.path.relpath(path, outputs_dir).replace(os.sep, "/")
        return json.dumps({"file": relative, **about}, ensure_ascii=False) + "\n"

    with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
        lines = list(pool.map(save, itertools.count(first), images, metadata))
    suffix = "" if first == 0 else f"-{first}"
    save_grid(images, folder / f"grid{suffix}.png")
    if frames:
        save_animation([make_grid(frame) for frame in frames], folder / f"forming{suffix}.webp")
    path = Path(outputs_dir) / RESULTS
    with errors_name(path), open(path, "a", encoding="utf-8") as results:
        results.write("".join(lines))  # one write, because other processes append to the file, too
    return folder


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    """Save make_grid's image as a PNG file."""
    with atomic_write(path) as file:
        make_grid(images).save(file, "PNG")


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Save frames as an animated WebP file that starts over after the last one."""
    durations = [MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    options = {"save_all": True, "duration": durations, "loop": 0, "lossless": True, "method": 3}
    with atomic_write(path) as file:
        frames[0].save(file, "WEBP", append_images=frames[1:], **options)
