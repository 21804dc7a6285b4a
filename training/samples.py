"""Pictures for the same captions as a run goes on: real, as the VQGAN gives them back, and as the model draws them.

The captions are the first of the held-out pairs, else of those that are learnt; noise is the same every time. Drawing
is the trainer's, the settings are those that generate.py takes for the run's checkpoints.
"""

import logging
import os
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

import log
from data.images import load_image
from data.loader import TextImageDataset
from generation.output import to_image
from models.sampling import Sampling

logger = logging.getLogger("minidalle")

PAIRS = 8
SIDES = 160, 256  # pixels; smaller pictures are shown larger, larger ones smaller
ROWS = "real", "VQGAN", "drawn"
GAP, MARGIN, FONT_SIZE, LINES = 6, 64, 15, 5


def due(run):
    every = run.settings.sample_steps
    drawable = isinstance(run.dataset, TextImageDataset)  # made-up samples show nothing
    return drawable and every > 0 and (run.step % every == 0 or run.step == run.steps)


@torch.no_grad()
def draw(run):
    """samples/step_<step>.png in the output folder, and to the trackers. Rank 0 draws; the others wait for it before
    the next update.

    What goes wrong is told, and the run goes on.
    """
    if run.backend.rank or not (run.folder.path or run.trackers.trackers):
        return
    try:
        sampler = run.trainer.sampler()
        if sampler is None:
            return
        if run.pairs is None:
            run.pairs = first_pairs(run)
        captions, text, real, again = run.pairs
        noise = [torch.Generator().manual_seed(run.settings.random_seed + place) for place in range(len(captions))]
        sampling = Sampling().override(vars(run.settings))
        drawn = run.backend.decode(run.vae)(sampler(text, sampling, generator=noise))
        grid = grid_of(captions, (real, again, drawn), f"step {run.step:,}")
        if run.folder.path:
            save(grid, captions, run.folder.path / "samples", run.step)
    except (ValueError, OSError, RuntimeError) as error:  # the last is memory's
        logger.warning("no sample pictures of step %d: %s", run.step, log.describe_error(error))
        return
    run.trackers.picture(run.step, grid)


def first_pairs(run):
    """(captions, their tokens, pictures, what the VQGAN makes of them), pixels float (N, 3, S, S) in [0, 1], of up to
    PAIRS pairs.

    ValueError where no picture can be read.
    """
    dataset = run.dataset if run.validation_set is None else run.validation_set
    tokens, pixels = [], []
    for index, (name, _, _) in enumerate(dataset.images):
        try:
            pixels.append(torch.from_numpy(load_image(dataset.folder / name, run.vae.image_size)))
        except (ValueError, OSError):  # gone, or gone bad, since the scan
            continue
        tokens.append(dataset.first_caption(index))
        if len(tokens) == PAIRS:
            break
    if not tokens:
        raise ValueError(f"{dataset.folder}: none of its pictures can be read")
    real = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    captions = [" ".join(run.tokenizer.decode(ids[ids != 0]).split()) for ids in tokens]
    return captions, torch.stack(tokens), real, run.backend.decode(run.vae)(run.backend.encode(run.vae)(real))


def grid_of(captions, rows, title):
    """One picture: a column a caption, which stands below it, and a row each of ROWS; rows float (N, 3, S, S)."""
    font = ImageFont.load_default(FONT_SIZE)
    side = min(max(rows[0].shape[-1], SIDES[0]), SIDES[1])
    letters = int(side / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27)
    texts = ["\n".join(textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …")) for text in captions]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    below = max(pen.multiline_textbbox((0, 0), text, font)[3] for text in texts) + 2 * GAP
    above = FONT_SIZE + 2 * GAP
    size = MARGIN + len(captions) * (side + GAP), above + len(rows) * (side + GAP) + below
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    pen.text((MARGIN, GAP), title, "#222222", font)
    for row, (name, pictures) in enumerate(zip(ROWS, rows)):
        top = above + row * (side + GAP)
        pen.text((MARGIN - GAP, top + side / 2), name, "#555555", font, anchor="rm")
        for column, pixels in enumerate(pictures):
            small = side > pixels.shape[-1]  # pixels of small pictures stay sharp squares
            picture = to_image(pixels)
            picture = picture.resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
            grid.paste(picture, (MARGIN + column * (side + GAP), top))
    for column, text in enumerate(texts):
        pen.multiline_text((MARGIN + column * (side + GAP), size[1] - below + GAP), text, "#222222", font)
    return grid


def save(grid, captions, folder, step):
    """step_<step>.png and captions.txt, one a line, written beside their names and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = ("captions.txt", lambda file: file.write("".join(f"{text}\n" for text in captions).encode()))
    for name, write in (contents, (f"step_{step}.png", lambda file: grid.save(file, "PNG"))):
        beside = folder / f"{name}.tmp"
        try:
            with open(beside, "wb") as file:
                write(file)
            os.replace(beside, folder / name)
        finally:
            if beside.exists():
                beside.unlink()
