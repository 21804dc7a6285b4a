"""Pixels → files: pictures with what they were drawn from inside, grids, animations, results.jsonl.

A PNG carries it as text chunks, a JPEG as its comment: one JSON object with prompt, seed, settings and the
checkpoint's fingerprint.
"""

import io
import json
import os
import re
from pathlib import Path

from PIL import Image, PngImagePlugin

from utils.checkpoint import short
from utils.files import atomic_write

NAME_BYTES = 200  # of a folder's name; file systems allow 255
SUFFIXES = {"png": ".png", "jpg": ".jpg"}
RESULTS, PREVIEW = "results.jsonl", "preview.png"  # in the output folder, beside the prompts' folders


def as_picture(pixels):
    """Float (3, H, W) in [0, 1] → PIL, each value rounded, contrast untouched."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def grid_of(pictures, columns=None, gap=2):
    """PIL pictures of one size → one, row by row on white."""
    columns = columns or max(1, round(len(pictures) ** 0.5))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].width + gap, pictures[0].height + gap
    grid = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        grid.paste(picture, (gap + column * width, gap + row * height))
    return grid


def metadata(picture, loaded, scores=None):
    """What a picture was drawn from, plain values: as files carry it, and a line of results.jsonl begins."""
    side = loaded.side
    return {
        "prompt": picture.prompt,
        "seed": picture.seed,
        **picture.sampling,
        **({"kept_rows": len(picture.given) // side} if len(picture.given) else {}),
        "checkpoint": Path(loaded.path).name,
        "fingerprint": short(loaded.fingerprint),
        **({"scores": scores} if scores else {}),
    }


def encoded(image, about, format="png"):
    """A PIL picture → the bytes of a file, `about` (see metadata) inside. format: png or jpg."""
    said, file = json.dumps(about, ensure_ascii=False), io.BytesIO()
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("Description", about["prompt"])
        chunks.add_itxt("Software", "Mini DALL-E")
        chunks.add_itxt("Comment", said)
        image.save(file, "PNG", pnginfo=chunks)
    else:
        image.save(file, "JPEG", quality=95, subsampling=0, comment=said.encode())
    return file.getvalue()


def folder_name(prompt):
    """A prompt as one plain file name: _ for spaces and for what means something to a file system, 100 characters."""
    name = re.sub(r"[^\w.,'()+-]", "_", prompt)[:100].lstrip(".") or "prompt"
    return name.encode()[:NAME_BYTES].decode(errors="ignore")


def folder_of(prompt, outputs_dir):
    """The folder of a prompt's pictures, made where it is missing; it holds caption.txt, by which it is found again."""
    base, caption = Path(outputs_dir) / folder_name(prompt), f"{prompt}\n".encode()
    folder, number = base, 1
    taken = (RESULTS, PREVIEW)
    while (
        folder.name in taken
        or folder.is_file()
        or ((folder / "caption.txt").exists() and (folder / "caption.txt").read_bytes() != caption)
    ):
        number += 1  # another prompt has this name
        folder = base.with_name(f"{base.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "caption.txt", caption)
    return folder


def save_pictures(pictures, abouts, outputs_dir, format="jpg", forming=None):
    """PIL pictures of one prompt, each with its metadata → their folder.

    Files are numbered on after what is there: <number>-seed-<seed>.jpg, grid.png; with `forming` (previews.frames)
    forming.webp. One line a picture is added to results.jsonl of outputs_dir.
    """
    folder = folder_of(abouts[0]["prompt"], outputs_dir)
    numbers = [re.match(r"\d+(?=-seed-\d+\.(jpg|png)$)", path.name) for path in folder.iterdir()]
    first = max((int(number[0]) for number in numbers if number), default=-1) + 1
    lines = []
    for number, (image, about) in enumerate(zip(pictures, abouts), first):
        path = folder / f"{number}-seed-{about['seed']}{SUFFIXES[format]}"
        write(path, encoded(image, about, format))
        file = os.path.relpath(path, outputs_dir).replace(os.sep, "/")
        lines.append(json.dumps({"file": file, **about}, ensure_ascii=False) + "\n")
    after = "" if first == 0 else f"-{first}"
    save_grid(pictures, folder / f"grid{after}.png")
    if forming:
        write(folder / f"forming{after}.webp", animation([grid_of(frame) for frame in forming]))
    with open(Path(outputs_dir) / RESULTS, "a", encoding="utf-8") as results:  # in one piece, beside other processes
        results.write("".join(lines))
    return folder


def save_grid(pictures, path):
    file = io.BytesIO()
    grid_of(pictures).save(file, "PNG")
    write(path, file.getvalue())


def animation(frames, milliseconds=120, last=2500):
    """PIL pictures → the bytes of an animated WebP that begins anew after its last one."""
    file = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [last]
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True, method=3
    )
    return file.getvalue()


def write(path, contents):
    with atomic_write(path) as file:
        file.write(contents)
