"""Pictures without captions, as train_vqgan.py wants them: a folder to uint8 batches without end.

A set that fits into memory is decoded once; a larger one is decoded again in every epoch, by worker processes.
"""

import logging
import os
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.order import EpochOrder, Key
from data.pairs import IMAGE_SUFFIXES, UNREADABLE, open_image, printable, report_skipped
from utils.interrupts import ignore_interrupts_in_worker

logger = logging.getLogger("minidalle")

_AT_ONCE = 64  # pictures that a worker hands over together


def load_image(path: Union[str, Path], size: int) -> np.ndarray:
    """One picture as uint8 RGB (size, size, 3): turned upright by its EXIF tag, the middle square, resized bilinearly.

    The square is what torchvision's RandomResizedCrop cuts at scale 1 and ratio 1, and PIL's bilinear filter widens
    when it shrinks (antialiasing). Transparent parts show white; 16-bit grey is scaled, not cut off.

    Raises FileNotFoundError or PermissionError naming the file when it cannot be had, ValueError naming it for
    everything else: not a picture, truncated, damaged, over PIL's pixel limit.
    """
    try:
        with open_image(path) as image:
            return crop_square(image, size)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes PIL raise OSError, SyntaxError, struct.error, zlib.error and more
        reason = str(error).replace("\n", " ")
        named = reason if printable(path) in reason else f"{printable(path)}: cannot be read as a picture ({reason})"
        raise ValueError(named) from error


def crop_square(image: Image.Image, size: int) -> np.ndarray:
    """load_image of an opened picture. Raises whatever PIL does for a damaged one."""
    image.load()
    image = _upright(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:
        image = image.crop((left, top, left + side, top + side))
    image = _to_rgb(image)
    if side != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block raises many things, and the pixels are sound without it
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # PNG's 16-bit grey: "I;16", or "I" with an older PIL
        grey = np.clip(np.asarray(image), 0, 65535)
        white = grey == image.info["transparency"] if "transparency" in image.info else np.zeros_like(grey, dtype=bool)
        return Image.fromarray(np.where(white, 255, np.round(grey / 257)).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def find_images(folder: Union[str, Path]) -> List[Path]:
    """Every picture file below `folder`, sorted by its path relative to it. Links to folders are not followed.

    Raises FileNotFoundError or NotADirectoryError naming the folder, ValueError when there is no picture in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{printable(folder)}: no such folder; give one with pictures")
    if not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)}: not a folder; give one with pictures")
    found = [
        (Path(place) / name).relative_to(folder)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not found:
        raise ValueError(f"{printable(folder)}: no pictures in it (looked for {', '.join(IMAGE_SUFFIXES)}, also below)")
    return [folder / name for name in sorted(found)]


class _Decoded(Dataset):
    """Path i as (i, uint8 (3, size, size)); None for the pixels where the file cannot be read."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Tuple[int, Optional[torch.Tensor]]:
        index = key[1] if isinstance(key, tuple) else key
        try:
            pixels = load_image(self.paths[index], self.size)
        except (ValueError, OSError):
            return index, None
        return index, torch.from_numpy(pixels).permute(2, 0, 1)  # (size, size, 3) -> (3, size, size)


def _readable(items: List[Tuple[int, Optional[torch.Tensor]]]) -> Tuple[Optional[torch.Tensor], List[int]]:
    """The pictures of a batch that could be read, stacked, and the indices of the others."""
    pictures = [pixels for _, pixels in items if pixels is not None]
    return torch.stack(pictures) if pictures else None, [index for index, pixels in items if pixels is None]


def load_images(paths: Sequence[Path], size: int, workers: int = 0) -> torch.Tensor:
    """uint8 (N, 3, size, size) of all that can be read; the others are counted in the log.

    Raises ValueError when none can be read.
    """
    loader = DataLoader(
        _Decoded(paths, size),
        batch_size=_AT_ONCE,
        collate_fn=_readable,
        num_workers=min(workers, len(paths) // _AT_ONCE),
        worker_init_fn=ignore_interrupts_in_worker,
    )
    batches, broken = [], []
    with tqdm(total=len(paths), desc="reading pictures", unit="pictures", leave=False, disable=None) as bar:
        for pictures, missing in loader:
            batches += [] if pictures is None else [pictures]
            broken += missing
            bar.update(_AT_ONCE)
    if broken:
        report_skipped({UNREADABLE: [paths[index] for index in broken]})
    if not batches:
        raise ValueError(f"{printable(os.path.commonpath(paths))}: none of {len(paths)} pictures can be read")
    return torch.cat(batches)


def endless_batches(
    pictures: Union[torch.Tensor, Sequence[Path]], batch_size: int, *, size: int, seed: int, workers: int = 0
) -> Iterator[torch.Tensor]:
    """uint8 (B, 3, size, size), epoch after epoch in an order that depends on `seed` alone.

    `pictures` in memory, as load_images gives them, or paths, which are decoded by `workers` processes. B is
    batch_size, or all of a smaller set; a batch of paths lacks those that cannot be read.

    Raises ValueError when a whole epoch of paths has given nothing.
    """
    order = EpochOrder(len(pictures), min(batch_size, len(pictures)), seed=seed)
    if isinstance(pictures, torch.Tensor):
        for _ in _epochs(order):
            for keys in order:
                yield pictures[[index for _, index in keys]]
    loader = DataLoader(
        _Decoded(pictures, size),
        batch_sampler=order,
        collate_fn=_readable,
        num_workers=workers,
        worker_init_fn=ignore_interrupts_in_worker,
        persistent_workers=workers > 0,
    )
    told = set()
    for _ in _epochs(order):
        any_read = False
        for batch, missing in loader:
            for index in set(missing) - told:
                logger.warning("%s: cannot be read and is left out", printable(pictures[index]))
            told.update(missing)
            if batch is not None:
                any_read = True
                yield batch
        if not any_read:
            raise ValueError(f"{printable(os.path.commonpath(pictures))}: none of {len(pictures)} pictures can be read")


def _epochs(order: EpochOrder) -> Iterator[int]:
    epoch = 0
    while True:
        order.set_epoch(epoch)
        yield epoch
        epoch += 1
