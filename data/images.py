"""Decode image files: one to an array, or a list to batches."""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from data.files import UNREADABLE, StoredImage, open_image, printable, report_skipped
from data.loader import MEMORY_ADVICE, SamplesLost, explain_dead_worker, read_batches

logger = logging.getLogger("minidalle")

ImagePath = Union[str, Path, StoredImage]
_SLOTS = 256  # workers of one DataLoader; more of them share slots, and the latest mark is kept
_BATCH = 64  # images that a worker hands over together


def load_image(path: ImagePath, size: int) -> np.ndarray:
    """Return an image as uint8 RGB (size, size, 3): upright by its EXIF tag, center square, resized bilinearly.

    The square is the one that torchvision's RandomResizedCrop cuts at scale 1 and ratio 1; PIL's bilinear filter is
    antialiased. Transparent parts become white; 16-bit gray is scaled to 8 bits.

    Raises:
        ValueError, OSError: it cannot be opened, is damaged, over PIL's pixel limit or no image; names the file.
    """
    try:
        with open_image(path) as image:
            return crop_square(image, size)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes PIL raise OSError, SyntaxError, struct.error, zlib.error and more
        reason = str(error).replace("\n", " ")
        named = reason if printable(path) in reason else f"{printable(path)}: cannot be read as an image ({reason})"
        raise ValueError(named) from error


def crop_square(image: Image.Image, size: int) -> np.ndarray:
    """Return what load_image returns, for an open image; raise whatever PIL raises for a damaged one."""
    image = image.copy()
    with contextlib.suppress(Exception):  # a damaged EXIF block; in place, since pixels are turned before it matters
        ImageOps.exif_transpose(image, in_place=True)
    if image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = _to_rgb(image)
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # PNG's 16-bit gray: "I;16", or "I" in older versions of PIL
        gray = np.clip(np.asarray(image), 0, 65535)
        white = gray == image.info["transparency"] if "transparency" in image.info else np.zeros_like(gray, dtype=bool)
        return Image.fromarray(np.where(white, 255, np.round(gray / 257)).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class WorkerTracker:
    """Which sample each worker process is reading, in memory that outlives the worker.

    Create it before the workers start.
    """

    def __init__(self) -> None:
        self._slots = torch.full((_SLOTS, 2), -1, dtype=torch.int64).share_memory_()  # process, index or -1

    def mark(self, index: int) -> None:
        """Note which sample this worker is reading from now on (-1: none); do nothing outside of workers."""
        worker = get_worker_info()
        if worker is not None:
            self._slots[worker.id % _SLOTS] = torch.tensor([os.getpid(), index])

    def of_dead(self, message: str) -> List[int]:
        """Return what the workers named in torch's error ("DataLoader worker (pid 12) is killed") were reading."""
        named = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", message)
        processes = {int(number) for number in named[1].split(",")} if named else set()
        return [index for process, index in self._slots.tolist() if process in processes and index >= 0]


class ImageBatch(NamedTuple):
    """Part of a list of images, decoded."""

    indices: List[int]
    pixels: Optional[torch.Tensor]  # uint8 (B, 3, size, size); None if no image of the batch can be read
    unreadable: Dict[int, str]  # index of each other image -> the reason


class WorkerImages(Dataset):
    """A dataset of images that notes which of them a worker is reading, and which killed one."""

    def __init__(self, paths: Sequence[ImagePath]):
        self.paths, self.tracker = paths, WorkerTracker()
        self.deadly: Set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def exclude_images_of(self, message: str) -> List[str]:
        """Never read again what the dead workers of torch's error message were reading; return the names."""
        indices = self.tracker.of_dead(message)
        self.deadly.update(indices)
        return [printable(self.paths[index]) for index in indices]

    def read(
        self, batches: Iterable[Sequence[int]], workers: int, collate: Callable[[List[Any]], Any]
    ) -> Iterator[Any]:
        """Yield the collated items of each batch, read in `workers` processes or in this one (0).

        Raises:
            SamplesLost: a worker was killed that was not reading an image.
        """

        def exclude(error: Exception) -> None:
            reason, names = explain_dead_worker(error, self)
            if not names:
                raise SamplesLost(reason + MEMORY_ADVICE)
            logger.warning("%s; new workers continue without it", reason)

        return read_batches(self, batches, workers, exclude, collate_fn=collate)


def read_images(
    paths: Sequence[ImagePath], size: int, batches: Iterable[Sequence[int]], workers: int = 0
) -> Iterator[ImageBatch]:
    """Decode batches of indices into `paths`, in `workers` processes or in this one (0).

    An image that kills the worker reading it is returned as unreadable.
    """
    return _Decoded(paths, size).read(batches, workers, _collate)


class _Decoded(WorkerImages):
    def __init__(self, paths: Sequence[ImagePath], size: int):
        super().__init__(paths)
        self.size = size

    def __getitem__(self, index: int) -> Tuple[int, Union[torch.Tensor, str]]:
        if index in self.deadly:
            return index, f"{printable(self.paths[index])}: reading it killed a process"
        self.tracker.mark(index)
        try:
            pixels = load_image(self.paths[index], self.size)
        except (ValueError, OSError) as error:
            return index, str(error)
        finally:
            self.tracker.mark(-1)
        return index, torch.from_numpy(pixels).permute(2, 0, 1)  # (size, size, 3) -> (3, size, size)


def _collate(items: List[Tuple[int, Union[torch.Tensor, str]]]) -> ImageBatch:
    pixels = {index: content for index, content in items if isinstance(content, torch.Tensor)}
    unreadable = {index: content for index, content in items if isinstance(content, str)}
    return ImageBatch(list(pixels), torch.stack(list(pixels.values())) if pixels else None, unreadable)


def load_images(paths: Sequence[ImagePath], size: int, workers: int = 0) -> torch.Tensor:
    """Return all images that can be read as uint8 (N, 3, size, size), ValueError if none; log how many cannot."""
    batches = [range(start, min(start + _BATCH, len(paths))) for start in range(0, len(paths), _BATCH)]
    images, count, unreadable = torch.empty((len(paths), 3, size, size), dtype=torch.uint8), 0, []
    with tqdm(total=len(paths), desc="reading images", unit="image", leave=False, disable=None) as bar:
        for batch in read_images(paths, size, batches, min(workers, len(paths) // _BATCH)):
            if batch.pixels is not None:  # copied, because a worker's tensors each keep a file open
                images[count : count + len(batch.pixels)] = batch.pixels
            count += len(batch.indices)
            unreadable += [paths[index] for index in batch.unreadable]
            bar.update(len(batch.indices) + len(batch.unreadable))
    if unreadable:
        report_skipped({UNREADABLE: [Path(str(path)) for path in unreadable]})
    if not count:
        raise ValueError(f"{common_folder(paths)}: none of {len(paths)} images can be read")
    return images[:count]


def common_folder(paths: Sequence[ImagePath]) -> str:
    """Return the folder that all images are in, for a message."""
    return printable(os.path.commonpath([str(path) for path in paths]))
