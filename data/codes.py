"""The codes of a folder's pictures: the VQGAN is frozen and the crop fixed, so each picture is encoded once.

Encoding is the caller's: `load_codes` is handed a function from pixels to codes and never sees a model. How codes lie
on disk, and how processes share the work, is arrays.py's.
"""

import os
import re
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.array_cache import FLUSH_SECONDS, ArrayCache, Made
from data.images import load_image
from data.pairs import File, printable
from utils.interrupts import ignore_interrupts_in_worker

CROP = "upright, middle square, bilinear"  # what load_image does; a change there must change this


def open_code_cache(
    folder: Union[str, Path], cache_dir: Union[str, Path], *, image_size: int, num_codes: int, fingerprint: str
) -> ArrayCache:
    """The cache of `folder`'s pictures in `cache_dir`, uint16 (uint32 when num_codes > 65536); it may be empty.

    fingerprint: names the VQGAN's weights; codes of another one are neither used nor touched.

    Raises OSError when there is a `cache_dir` that cannot be read.
    """
    key = {"version": 1, "vqgan": fingerprint, "crop": CROP, "image_size": image_size, "num_codes": num_codes}
    vqgan = re.sub("[^A-Za-z0-9]", "", fingerprint)[:12]
    dtype = np.uint16 if num_codes <= 65536 else np.uint32
    return ArrayCache(cache_dir, f"codes-{vqgan}-{image_size}", folder, dtype, key)


def load_codes(
    pictures: Sequence[File],
    encode: Callable[[torch.Tensor], torch.Tensor],
    cache: ArrayCache,
    *,
    batch_size: int = 16,
    workers: int = 0,
    flush_seconds: float = FLUSH_SECONDS,
) -> Tuple[np.ndarray, Dict[int, str]]:
    """Codes of every picture, from the cache where it has them and through `encode` where it does not.

    encode: float32 (B, 3, image_size, image_size) in [0, 1] on the CPU → integers (B, codes per picture) in [0,
    num_codes).

    A picture whose size in bytes or modification time changed is encoded again. Pictures are decoded by `workers`
    processes, or in this one with 0; `encode` runs in this one. Several processes that call this share the pictures.

    Returns (codes, bad): bad maps the indices of the pictures that could not be read to the reason; codes are those of
    all others, in order: uint16 (uint32 when num_codes > 65536), (len(pictures) - len(bad), codes per picture),
    read-only and mapped from disk where it can be.

    Raises ValueError when no picture can be read or `encode` gives other than it should, and OSError when the cache
    cannot be written.
    """
    if not pictures:
        raise ValueError(f"{printable(cache.folder)}: no picture to encode")
    bad: Dict[int, str] = {}

    def make(batches: Iterator[List[int]]) -> Iterator[Made]:
        loader = DataLoader(
            _Pixels(pictures, str(cache.folder), cache.key["image_size"]),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=ignore_interrupts_in_worker,
        )
        for samples in loader:
            readable = [(index, pixels) for index, pixels in samples if not isinstance(pixels, str)]
            bad.update((index, reason) for index, reason in samples if isinstance(reason, str))
            if readable:
                images = torch.stack([pixels for _, pixels in readable])  # (B, 3, size, size)
                codes = _checked(encode(images.float().div_(255)), len(readable), cache.key["num_codes"])
                yield [index for index, _ in readable], codes.astype(cache.dtype), None

    cache.fill(
        pictures, make, batch_size=batch_size, doing="encoding pictures", unit="picture", flush_seconds=flush_seconds
    )
    encoded = [picture for picture in pictures if picture in cache]
    if not encoded:
        reason = next(iter(bad.values()))
        raise ValueError(f"{printable(cache.folder)}: none of {len(pictures)} pictures can be read ({reason})")
    # Of a picture that this process could not read, another may have made the codes meanwhile.
    bad = {index: reason for index, reason in bad.items() if pictures[index] not in cache}
    codes, rows, _ = cache.load(encoded)
    in_order = np.array_equal(rows, np.arange(len(rows)))
    return codes[: len(rows)] if in_order else codes[rows], bad


class _Pixels(Dataset):
    """Pictures as uint8 (3, size, size), or the reason why not as a string."""

    def __init__(self, pictures: Sequence[File], folder: str, size: int):
        self.pictures = pictures
        self.folder = folder
        self.size = size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tuple[int, Union[torch.Tensor, str]]:
        try:
            pixels = load_image(os.path.join(self.folder, self.pictures[index][0]), self.size)
        except (ValueError, OSError) as error:
            return index, str(error)
        return index, torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _checked(codes: torch.Tensor, count: int, num_codes: int) -> np.ndarray:
    if codes.ndim != 2 or len(codes) != count or codes.is_floating_point():
        raise ValueError(
            f"encode gave {codes.dtype} {tuple(codes.shape)} for {count} pictures; integers ({count}, L) are needed"
        )
    if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(f"encode gave codes {int(codes.min())} to {int(codes.max())}; the codebook has {num_codes}")
    return codes.cpu().numpy()
