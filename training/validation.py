"""Look at a run from outside: losses on the validation set, and sample images for the same captions every time."""

from __future__ import annotations

import logging
import math
import textwrap
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from PIL import Image, ImageDraw, ImageFont

from data.images import load_image
from generation.images import to_image
from models.sampling import Sampling
from utils.errors import describe_error
from utils.files import atomic_write

if TYPE_CHECKING:
    from training.run import Run

MAX_PAIRS = 8  # in a sample grid
SIDES = 160, 256  # pixels; smaller images are enlarged, larger ones reduced
ROWS = "real", "VQGAN", "model"
GAP, MARGIN, FONT_SIZE, MAX_LINES = 6, 80, 15, 5

logger = logging.getLogger("minidalle")


def validate(run: Run) -> Dict[str, float]:
    """Return total, text and image loss of the validation set, each image with its first caption, and `perplexity`."""
    backend, dataset = run.backend, run.validation_set
    samples = backend.evaluation_samples(math.ceil(len(dataset) / backend.world_size))
    order = split_among_processes(len(dataset), samples, backend.rank, backend.world_size)
    return add_perplexity(run.trainer.evaluate(backend.loader(dataset, order, samples)))


def split_among_processes(
    length: int, samples_per_step: int, rank: int, world_size: int
) -> List[List[Tuple[int, int]]]:
    """Return this process's share of a dataset as batches of keys (0, index).

    All processes have the same number of batches; the last ones may be shorter, or empty.
    """
    mine = [(0, index) for index in range(rank, length, world_size)]
    count = math.ceil(math.ceil(length / world_size) / samples_per_step)
    return [mine[number * samples_per_step : (number + 1) * samples_per_step] for number in range(count)]


def add_perplexity(losses: Dict[str, float]) -> Dict[str, float]:
    """Add `perplexity`, the number of equally likely codes that would give the same image loss."""
    return {**losses, "perplexity": math.exp(min(losses["image"], 700))}  # a float overflows above


class Samples(NamedTuple):
    """What the sample images of a run show, the same at every step; images are float (N, 3, S, S) in [0, 1]."""

    captions: List[str]
    tokens: torch.Tensor  # (N, text_seq_len)
    real: torch.Tensor
    reconstructed: torch.Tensor  # by the VQGAN


def write_samples(run: Run) -> None:
    """Write samples/step_<step>.png and captions.txt, one caption a line, and log the image to the trackers.

    Rank 0 samples, and the other processes wait for it before their next update. An error is logged and the run
    continues.
    """
    if run.backend.rank or not (run.folder.path or run.trackers.trackers):
        return
    try:
        grid = _sample_grid(run)
        if grid is None:
            return
        if run.folder.path:
            folder = run.folder.path / "samples"
            with atomic_write(folder / "captions.txt", text=True) as file:
                file.writelines(f"{text}\n" for text in run.samples.captions)
            with atomic_write(folder / f"step_{run.step}.png") as file:
                grid.save(file, "PNG")
    except (ValueError, OSError, RuntimeError) as error:  # the last one if memory runs out
        logger.warning("no sample images of step %d: %s", run.step, describe_error(error))
        return
    run.trackers.log_image(run.step, grid)


@torch.no_grad()
def _sample_grid(run: Run) -> Any:
    sampler = run.trainer.sampler()
    if sampler is None:  # this machine cannot sample while it trains
        return None
    if run.samples is None:
        run.samples = read_samples(run)
    captions, tokens, real, reconstructed = run.samples
    noise = [torch.Generator().manual_seed(run.settings.random_seed + number) for number in range(len(captions))]
    sampling = Sampling().override(vars(run.settings))
    sampled = run.backend.decode(run.vae)(sampler(tokens, sampling, generator=noise))
    return make_sample_grid(captions, (real, reconstructed, sampled), f"step {run.step:,}")


def read_samples(run: Run) -> Samples:
    """Read the first pairs of the validation set, else of the training set; ValueError if no image can be read."""
    dataset = run.dataset if run.validation_set is None else run.validation_set
    tokens, pixels = [], []
    for index in range(len(dataset)):
        try:
            pixels.append(torch.from_numpy(load_image(dataset.image(index), run.vae.image_size)))
        except (ValueError, OSError):  # removed or damaged since the run began
            continue
        tokens.append(dataset.first_caption(index))
        if len(tokens) == MAX_PAIRS:
            break
    if not tokens:
        raise ValueError(f"{dataset.folder}: none of its images can be read")
    real = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    captions = [" ".join(run.tokenizer.decode(ids[ids != 0]).split()) for ids in tokens]
    reconstructed = run.backend.decode(run.vae)(run.backend.encode(run.vae)(real))
    return Samples(captions, torch.stack(tokens), real, reconstructed)


def make_sample_grid(
    captions: Sequence[str], rows: Sequence[torch.Tensor], title: str, names: Sequence[str] = ROWS
) -> Image.Image:
    """Return one image: a row of images (N, 3, S, S) for each name, and under each column a caption."""
    font = ImageFont.load_default(FONT_SIZE)
    side = min(max(rows[0].shape[-1], SIDES[0]), SIDES[1])
    pitch = side + GAP
    letters = int(side / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27)
    texts = ["\n".join(textwrap.wrap(text, letters, max_lines=MAX_LINES, placeholder=" …")) for text in captions]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    below = max(pen.multiline_textbbox((0, 0), text, font)[3] for text in texts) + 2 * GAP
    above = FONT_SIZE + 2 * GAP
    grid = Image.new("RGB", (MARGIN + len(captions) * pitch, above + len(rows) * pitch + int(below)), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((MARGIN, GAP), title, "#222222", font)
    for row, (name, images) in enumerate(zip(names, rows)):
        top = above + row * pitch
        pen.text((MARGIN - GAP, top + side / 2), name, "#555555", font, anchor="rm")
        for column, pixels in enumerate(images):  # pixels of enlarged images stay sharp squares
            resampling = Image.Resampling.NEAREST if side > pixels.shape[-1] else Image.Resampling.LANCZOS
            grid.paste(to_image(pixels).resize((side, side), resampling), (MARGIN + column * pitch, top))
    for column, text in enumerate(texts):
        pen.multiline_text((MARGIN + column * pitch, above + len(rows) * pitch + GAP), text, "#222222", font)
    return grid
