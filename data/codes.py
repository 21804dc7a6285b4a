"""Encode a folder's images once: the VQGAN is frozen and the crop is fixed, so their codes never change.

The caller passes the function from pixels to codes; this module never sees a model. Codes are kept in a cache, in which
an image's entry is valid while the file's size and mtime stay the same. A cache consists of these files:

    NAME.json    what the cache holds, and which file each row belongs to; replaced as a whole when files are added
    NAME.rows    one record per row: a checksum of the file's state and the values, then the values
    NAME.lock    held while NAME.json is replaced
    NAME.locks/  one lock per share of the rows, while they are being filled; processes divide the work by shares

A row whose checksum does not match is missing. This covers rows that were never written, damaged or cut off, and rows
of an earlier state of a file, so a process may be killed at any moment. NAME.locks/ only prevents double work, but
without NAME.lock another process may give its row to another file, whose values then do not count as this one's.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from tqdm import tqdm

from data.files import File, printable
from data.images import ImagePath, read_images
from utils.files import AnyPath, atomic_write, hold_lock

logger = logging.getLogger("minidalle")

PRECISION = "fp32"  # of the encoder on every machine; TF32 changes one code in 1,500, bf16 one in 220
CROP = "upright, middle square, bilinear"  # what load_image does; a change there must change this
SHARES = 16  # more processes than this cannot fill one cache together

Encode = Callable[[torch.Tensor], torch.Tensor]  # float32 (B, 3, S, S) in [0, 1] -> integers (B, image_seq_len)
Computed = Tuple[Sequence[int], np.ndarray]  # indices of files, and their values (len(indices), width)
Compute = Callable[[Iterator[List[int]]], Iterable[Computed]]


class MappedRows:
    """The rows of a cache, mapped from disk; pickled as the name of the file, which the receiving process maps too."""

    def __init__(self, path: Path, record: np.dtype):
        self._path, self._record = path, record
        count = path.stat().st_size // record.itemsize
        self._values = np.memmap(path, record, mode="r", shape=(count,))["values"]
        self.shape: Tuple[int, ...] = self._values.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self._values[rows])

    def __reduce__(self) -> Tuple[Any, ...]:
        return MappedRows, (self._path, self._record)


class CodeCache:
    """The codes of a folder's images. `file in cache` tells whether those of a file, as it is now, are there."""

    def __init__(self, folder: AnyPath, cache_dir: AnyPath, vae: Any):
        """Open the cache of an image tokenizer's codes, which may not exist yet; OSError if it cannot be read.

        Args:
            folder: what file names are relative to. A cache inside it stays valid when the folder is moved.
        """
        self.folder, self.width, fingerprint = Path(folder), vae.image_seq_len, vae.fingerprint()
        self.key = {"version": 2, "vqgan": fingerprint, "precision": PRECISION, "crop": CROP}
        self.key.update(image_size=vae.image_size, num_codes=vae.num_tokens)
        name = f"codes-{re.sub('[^A-Za-z0-9]', '', fingerprint)[:12]}-{vae.image_size}"
        self._path = cache_path(cache_dir, name, folder, {**self.key, "width": self.width}, ".json")
        self._rows_path = self._path.with_suffix(".rows")
        dtype = "<u2" if vae.num_tokens <= 65536 else "<u4"
        self._record = np.dtype([("checksum", "<u4"), ("values", dtype, (self.width,))])
        self.refresh()

    def __contains__(self, file: Any) -> bool:
        row = self._rows.get(file)
        return row is not None and bool(self._present[row])

    def refresh(self) -> None:
        """Read the cache again, with what other processes have added."""
        try:
            index = json.loads(self._path.read_bytes())
            self._take(list(zip(index["names"], index["sizes"], index["mtimes"])))
        except FileNotFoundError:
            self._take([])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: damaged, computing its content again (%s)", printable(self._path), error)
            self._take([])

    def _take(self, files: List[File]) -> None:
        self._files = files  # the file of each row
        self._rows = {file: row for row, file in enumerate(files)}
        self._present = np.zeros(len(files), dtype=bool)  # per row
        self._check(range(len(files)))

    def fill(self, files: Sequence[File], compute: Compute, batch_size: int) -> None:
        """Compute and store what is missing; return when all is there, whichever process computed it.

        Args:
            compute: takes batches of at most batch_size indices into `files`, yields the values of each. What it leaves
                out is not asked for again.
        """
        missing = [i for i, file in enumerate(files) if file not in self]
        if not missing:
            return
        logger.info("encoding images: %s images, once", f"{len(missing):,}")
        self._add(files)
        self._rows_path.touch()
        # A process that does not log shows no bar; None: a bar on a terminal only.
        hidden = None if logger.isEnabledFor(logging.INFO) else True
        busy: List[int] = []
        with tqdm(total=len(missing), desc="encoding images", unit="image", disable=hidden) as bar:
            # What others work on comes second, when they have finished it or have died; no lock is held by then.
            for left, wait in ((missing, False), (busy, True)):
                with contextlib.ExitStack() as held:
                    claimed = self._claim(files, left, batch_size, held, wait, busy)
                    for indices, values in compute(claimed) if left else ():
                        self._write([files[i] for i in indices], values)
                        bar.update(len(indices))
            bar.update((bar.total or 0) - bar.n)
        shutil.rmtree(self._path.with_suffix(".locks"), ignore_errors=True)
        self.refresh()

    def load(self, files: Sequence[File]) -> Tuple[MappedRows, np.ndarray]:
        """Return all rows, mapped from disk, and the row of each file: int64 (files,), -1 for a file without one."""
        rows = np.array([self._rows[file] if file in self else -1 for file in files], dtype=np.int64)
        return MappedRows(self._rows_path, self._record), rows

    def _add(self, files: Sequence[File]) -> None:
        """Give each file a row. Rows keep their numbers; a file that changed keeps its row."""
        with hold_lock(self._path.with_suffix(".lock")):
            self.refresh()
            new = [file for file in files if file not in self._rows]
            if not new:
                return
            row_of_name = {name: row for row, (name, _, _) in enumerate(self._files)}
            for file in new:
                row = row_of_name.setdefault(file[0], len(self._files))
                self._files[row : row + 1] = [file]
            names, sizes, mtimes = zip(*self._files)
            with atomic_write(self._path, text=True, sync=True) as index:
                json.dump({"key": self.key, "names": names, "sizes": sizes, "mtimes": mtimes}, index)
            self.refresh()

    def _claim(
        self,
        files: Sequence[File],
        missing: Sequence[int],
        batch_size: int,
        held: contextlib.ExitStack,
        wait: bool,
        busy: List[int],
    ) -> Iterator[List[int]]:
        """Yield batches of the shares that no other process is working on, and add the others to `busy`.

        If `wait`, wait for the others instead; all processes do so in the order of the shares.
        """
        locks = self._path.with_suffix(".locks")
        size = -(-len(self._files) // (SHARES * batch_size)) * batch_size  # rows in a share: whole batches
        shares: Dict[int, List[int]] = {}
        for i in missing:
            shares.setdefault(self._rows[files[i]] // size, []).append(i)
        for share, indices in sorted(shares.items()):
            if not held.enter_context(hold_lock(locks / str(share), wait)):
                busy += indices
                continue
            self._check(self._rows[files[i]] for i in indices)  # another process may have worked on it before
            indices = [i for i in indices if files[i] not in self]
            for start in range(0, len(indices), batch_size):
                yield indices[start : start + batch_size]

    def _write(self, files: Sequence[File], values: np.ndarray) -> None:
        records = np.zeros(len(files), self._record)
        records["values"] = values
        with open(self._rows_path, "r+b") as content:
            for file, record in zip(files, records):
                record["checksum"] = zlib.crc32(record["values"].tobytes(), _state_checksum(file))
                content.seek(self._rows[file] * self._record.itemsize)
                content.write(record.tobytes())
        for file in files:
            self._present[self._rows[file]] = True

    def _check(self, rows: Iterable[int]) -> None:
        """Note which of these rows are whole and belong to the present state of their file."""
        size = self._record.itemsize
        try:
            count = self._rows_path.stat().st_size // size
        except FileNotFoundError:
            return
        if not count:
            return
        records = np.asarray(np.memmap(self._rows_path, np.uint8, mode="r", shape=(count, size)))
        checksums = records[:, :4].copy().view("<u4")[:, 0].tolist()
        for row in rows:
            if row < count and not self._present[row]:
                checksum = zlib.crc32(records[row, 4:].tobytes(), _state_checksum(self._files[row]))
                self._present[row] = checksum == checksums[row]


def load_codes(
    images: Sequence[File],
    encode: Encode,
    cache: CodeCache,
    *,
    paths: Optional[Sequence[ImagePath]] = None,
    batch_size: int = 16,
    workers: int = 0,
) -> Tuple[MappedRows, np.ndarray]:
    """Return the codes of every image, after encoding those that the cache lacks.

    An image whose size in bytes or modification time changed is encoded again. `workers` processes decode images (0:
    this one); `encode` runs in this process. Several processes that call this at once divide the work.

    Args:
        paths: where each image can be read; None: under its name in the cache's folder.

    Returns:
        The rows of the cache, and the row of each image: int64 (images,), -1 for an image that cannot be read.

    Raises:
        ValueError, OSError: no image can be read, the cache cannot be written, or `encode` returned no codes.
    """
    if not images:
        raise ValueError(f"{printable(cache.folder)}: no image to encode")
    reasons: Dict[int, str] = {}

    def compute(batches: Iterator[List[int]]) -> Iterator[Computed]:
        places = paths or [os.path.join(cache.folder, name) for name, _, _ in images]
        for batch in read_images(places, cache.key["image_size"], batches, workers):
            reasons.update(batch.unreadable)
            if batch.pixels is not None:
                codes = encode(batch.pixels.float().div_(255))
                yield batch.indices, _check_codes(codes, (len(batch.indices), cache.width), cache.key["num_codes"])

    cache.fill(images, compute, batch_size)
    if not any(image in cache for image in images):
        reason = next(iter(reasons.values()), "another process has replaced the cache")
        raise ValueError(f"{printable(cache.folder)}: none of {len(images)} images can be read ({reason})")
    return cache.load(images)


def _check_codes(codes: torch.Tensor, shape: Tuple[int, int], num_codes: int) -> np.ndarray:
    if tuple(codes.shape) != shape or codes.is_floating_point():
        raise ValueError(f"encode returned {codes.dtype} {tuple(codes.shape)} instead of integers {shape}")
    if codes.min() < 0 or codes.max() >= num_codes:
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"encode returned codes {found}; the codebook has {num_codes}")
    return codes.cpu().numpy()


def cache_path(cache_dir: AnyPath, name: str, folder: AnyPath, key: Dict[str, Any], suffix: str) -> Path:
    """Return the path of a cache: `name`, then a hash of the key and of where `folder` lies.

    Raises:
        OSError: the folder exists and cannot be listed; a cache in it would look empty.
    """
    with contextlib.suppress(FileNotFoundError):
        os.listdir(cache_dir)
    place = os.path.realpath(folder)
    with contextlib.suppress(ValueError):  # another drive of Windows
        place = os.path.relpath(place, os.path.realpath(cache_dir))
    content = json.dumps({**key, "folder": place}, sort_keys=True)
    path = Path(cache_dir) / f"{name}-{hashlib.sha256(content.encode('ascii')).hexdigest()[:16]}{suffix}"
    if not path.exists() and any(path.parent.glob(f"{name}-*.npy")):
        logger.info("%s: cache files of an older version are ignored: %s-*.npy", printable(cache_dir), name)
    return path


def _state_checksum(file: File) -> int:
    name, size, mtime = file
    return zlib.crc32(os.fsencode(name) + f"/{size}/{mtime}".encode("ascii"))
