"""Reading a folder of photograph-sized pictures with captions: to pixels, and to codes that were made before.

The pictures are drawn by the benchmark, 640 × 480 JPEGs of some 80 KB. The peer is dalle-pytorch's loader; where
torchvision, which it needs, cannot be imported, a plain loop of PIL's in its place, and the table says so.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from backends.native.backend import NativeTrainingBackend
from benchmarks import peer
from benchmarks.network import settings_of
from data.loader import TextImageDataset
from data.order import EpochOrder, RunOrder
from data.shapes import make_sample
from data.tokenizer import load_tokenizer

SIDE, CODES = 256, 256
WINDOWS = 5


def write_pictures(folder, count):
    """Pictures with detail at every scale, so that a JPEG is as large as a photograph's, and five captions each."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((480, 640, 3), dtype=np.float32)
        for size, strength in (((8, 6), 70.0), ((80, 60), 25.0), ((640, 480), 6.0)):
            noise = random.normal(0, strength, (size[1], size[0], 3)).astype(np.float32)
            layers = [Image.fromarray(noise[..., c]).resize((640, 480), Image.Resampling.BICUBIC) for c in range(3)]
            pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
        Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)
        captions = make_sample("train", number, size=32)[1]
        (folder / f"{number:04d}.txt").write_text("\n".join(list(captions)[:5]) + "\n", encoding="utf-8")


def workers():
    return os.cpu_count() or 1


def batches_wanted(steps):
    """For seconds_a_sample, and what workers still read ahead at its end."""
    return steps * (2 + WINDOWS) + 4 * workers()


def seconds_a_sample(batches, rows, steps):
    """Of windows of `steps` batches each, after two that do not count. A window is no shorter than what workers read
    ahead.
    """
    batches = iter(batches)

    def read(count):
        for batch in itertools.islice(batches, count):
            for _ in batch:  # a micro-batch is read when it is asked for
                pass

    read(2 * steps)
    found = []
    for _ in range(WINDOWS):
        started = time.perf_counter()
        read(steps)
        found.append((time.perf_counter() - started) / (rows * steps))
    return found


def with_folder(function, quick):
    """function(folder of pictures, how many)."""
    count = 16 if quick else 128
    with tempfile.TemporaryDirectory() as name:
        write_pictures(Path(name), count)
        return function(Path(name), count)


def loading(quick, codes):
    """Through the backend's loader, as training reads."""
    rows = 2 if quick else 16
    settings = settings_of(quick, batch_size=rows, dataloader_workers=workers())
    backend = NativeTrainingBackend(settings)
    steps = 4 if quick else 100 if codes else 8

    def measure(folder, count):
        tokenizer = load_tokenizer(settings.bpe_path)
        dataset = TextImageDataset(folder, tokenizer, text_seq_len=settings.text_seq_len, image_size=SIDE)
        if codes:
            path = folder / "codes.npy"
            np.save(path, np.random.default_rng(0).integers(0, 1024, (count, CODES)).astype(np.uint16))
            dataset.attach_codes(np.load(path, mmap_mode="r", allow_pickle=False))
        order = RunOrder(EpochOrder(count, rows, seed=0), 0, batches_wanted(steps))
        return seconds_a_sample(backend.loader(dataset, order), rows, steps)

    return with_folder(measure, quick), None


class PlainPictures(Dataset):
    """(a caption's tokens, pixels) with PIL alone: what any loader must do."""

    def __init__(self, folder, tokenizer, text_seq_len):
        self.paths = sorted(folder.glob("*.jpg"))
        self.tokenizer, self.text_seq_len = tokenizer, text_seq_len

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        caption = self.paths[index].with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0]
        with Image.open(self.paths[index]) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return self.tokenizer.tokenize([caption], self.text_seq_len)[0], pixels


def their_loading(quick):
    """In torch's DataLoader with as many workers as ours."""
    rows = 2 if quick else 16
    settings = settings_of(quick)

    def measure(folder, count):
        tokenizer, theirs = load_tokenizer(settings.bpe_path), peer.loader()
        if theirs is None:
            dataset = PlainPictures(folder, tokenizer, settings.text_seq_len)
        else:
            dataset = theirs(
                str(folder), text_len=settings.text_seq_len, image_size=SIDE, tokenizer=tokenizer, shuffle=True
            )
        steps = 4 if quick else 8
        order = RandomSampler(dataset, replacement=True, num_samples=rows * batches_wanted(steps))
        return seconds_a_sample(DataLoader(dataset, rows, sampler=order, num_workers=workers()), rows, steps)

    return with_folder(measure, quick)


def peer_name():
    return "dalle-pytorch's loader" if peer.loader() is not None else "a plain PIL loop"
