"""Rows about loading: captions with photograph-sized images, or with codes that were computed before.

The benchmark makes the images, 640 × 480 JPEGs of about 80 KB. The peer is a plain loop with PIL.
"""

import contextlib
import itertools
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from backends.native.backend import NativeTrainingBackend
from benchmarks.limits import Measurement
from benchmarks.networks import parse_settings
from data.dataset import TextImageDataset
from data.loader import EpochOrder, RunOrder
from data.shapes import make_sample
from data.tokenizer import load_tokenizer

SIDE, CODES = 256, 256
WINDOWS = 5
WORKERS = os.cpu_count() or 1


@contextlib.contextmanager
def image_folder(count: int) -> Iterator[Path]:
    """Yield a folder of `count` images, as large in JPEG as photographs, with five captions each."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            pixels = np.full((480, 640, 3), 128.0, dtype=np.float32)
            for size, strength in (((8, 6), 70.0), ((80, 60), 25.0), ((640, 480), 6.0)):
                for channel in range(3):
                    noise = random.normal(0, strength, (size[1], size[0])).astype(np.float32)
                    pixels[..., channel] += np.asarray(
                        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
                    )
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)
            captions = make_sample("train", number, size=32)[1]
            (folder / f"{number:04d}.txt").write_text("\n".join(captions[:5]) + "\n", encoding="utf-8")
        yield folder


def count_batches(steps: int) -> int:
    """Return how many batches time_batches and the workers that read ahead of it need."""
    return steps * (2 + WINDOWS) + 4 * WORKERS


def time_batches(batches: Iterable[Any], rows: int, steps: int) -> List[float]:
    """Return the seconds per sample of windows of `steps` batches each, after two windows for warm-up.

    A window must not be shorter than what workers read ahead.
    """
    iterator, seconds = iter(batches), []
    for _ in range(2 + WINDOWS):
        started = time.perf_counter()
        for batch in itertools.islice(iterator, steps):
            for _ in batch:  # a micro-batch is read when it is asked for
                pass
        seconds.append((time.perf_counter() - started) / (rows * steps))
    return seconds[2:]


def choose_sizes(quick: bool, codes: bool = False) -> Tuple[int, int, int]:
    """Return the number of images, rows of a batch and batches of a window."""
    return (16, 2, 4) if quick else (128, 16, 100 if codes else 8)


def pack(folder: Path) -> None:
    """Replace the files of a folder by a tar shard of them."""
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for path in sorted(folder.glob("[0-9]*.*")):
            if path.suffix != ".tar":
                archive.add(path, path.name)
                path.unlink()


def load(quick: bool, codes: bool, in_tar: bool = False) -> Measurement:
    """Measure reading through the backend's loader, as training does."""
    count, rows, steps = choose_sizes(quick, codes)
    settings = parse_settings(quick, "--batch-size", rows, "--dataloader-workers", WORKERS)
    with image_folder(count) as folder:
        if in_tar:
            pack(folder)
        tokenizer = load_tokenizer(settings.bpe_path)
        dataset = TextImageDataset(folder, tokenizer, text_seq_len=settings.text_seq_len, image_size=SIDE)
        if codes:
            np.save(folder / "codes.npy", np.random.default_rng(0).integers(0, 1024, (count, CODES)).astype(np.uint16))
            dataset.attach_codes(np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False))
        order = RunOrder(EpochOrder(count, rows, seed=0), 0, count_batches(steps))
        return time_batches(NativeTrainingBackend(settings).loader(dataset, order), rows, steps), None


class PlainImages(Dataset):
    """Pairs of a caption's tokens and pixels, read with PIL alone: the least that a loader must do."""

    def __init__(self, folder: Path, tokenizer: Any, text_seq_len: int):
        self.paths = sorted(folder.glob("*.jpg"))
        self.tokenizer, self.text_seq_len = tokenizer, text_seq_len

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Tensor, Tensor]:
        caption = self.paths[index].with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0]
        with Image.open(self.paths[index]) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        tokens = torch.tensor(self.tokenizer.encode(caption))
        return F.pad(tokens, (0, self.text_seq_len - len(tokens))), pixels


def load_peer(quick: bool) -> List[float]:
    """Measure PlainImages in torch's DataLoader, with as many workers as ours."""
    count, rows, steps = choose_sizes(quick)
    settings = parse_settings(quick)
    with image_folder(count) as folder:
        dataset = PlainImages(folder, load_tokenizer(settings.bpe_path), settings.text_seq_len)
        order = RandomSampler(dataset, replacement=True, num_samples=rows * count_batches(steps))
        return time_batches(DataLoader(dataset, rows, sampler=order, num_workers=WORKERS), rows, steps)
