"""The codes of a folder's pictures on disk: the VQGAN is frozen and the crop fixed, so each picture is encoded once.

Encoding is the caller's: `cached_codes` is handed a function from pixels to codes and never sees a model.

On disk a cache is one or more pairs of files, each written once under a name of its own and never changed:

    codes-<VQGAN>-<size>-<folder>-<number>.npy    uint16 or uint32 (rows, codes per picture)
    codes-<VQGAN>-<size>-<folder>-<number>.json   what made them, a checksum, and each row's picture: name, bytes, mtime

The .json is renamed into place after the .npy, so a pair is either whole or not there, whenever a process stops; and
processes that encode at the same time only ever add pairs. An interrupted run leaves the pairs it finished, a completed
one joins them into one and removes the others.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import uuid
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.loader import leave_interrupts_to_the_parent, load_picture
from data.pairs import printable

log = logging.getLogger("minidalle")

CROP = "upright, middle square, bilinear"  # what load_picture does; a change there must change this
_FLUSH_SECONDS = 60.0  # at most this much encoding is lost to a kill

_Picture = Tuple[str, int, int]  # name relative to the folder, bytes, mtime in nanoseconds


class _Part(NamedTuple):
    path: Path  # of the .json
    pictures: List[_Picture]
    codes: np.ndarray  # (rows, codes per picture), mapped from the .npy


def cached_codes(
    pictures: Sequence[Path],
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    folder: Union[str, Path],
    cache_dir: Union[str, Path],
    image_size: int,
    num_codes: int,
    fingerprint: str,
    batch_size: int = 16,
    workers: int = 0,
) -> Tuple[np.ndarray, Dict[Path, str]]:
    """Codes of every picture, from the cache where it has them and through `encode` where it does not.

    encode: float32 (B, 3, image_size, image_size) in [0, 1] on the CPU → integers (B, codes per picture) in [0,
    num_codes).
    folder: what the pictures' names are relative to; a folder moved together with a cache inside it stays valid.
    fingerprint: names the VQGAN's weights; codes of another one are neither used nor touched.

    A picture whose size in bytes or modification time changed is encoded again. Pictures are decoded by `workers`
    processes, or in this one with 0; `encode` runs in this one.

    Returns (codes, bad): codes uint16 (uint32 when num_codes > 65536), (len(pictures), codes per picture), read-only
    and mapped from disk where it can be; bad maps the pictures that could not be read to the reason, and their rows are
    zeros.

    Raises ValueError when no picture can be read or `encode` gives other than it should, and OSError when `cache_dir`
    cannot be written.
    """
    folder, cache_dir = Path(folder), Path(cache_dir)
    if not pictures:
        raise ValueError(f"{printable(folder)}: no picture to encode")
    cache_dir.mkdir(parents=True, exist_ok=True)
    made_by = {
        "version": 1,
        "vqgan": fingerprint,
        "crop": CROP,
        "image_size": image_size,
        "num_codes": num_codes,
        "folder": os.path.relpath(os.path.realpath(folder), os.path.realpath(cache_dir)),
    }
    parts = _read_parts(cache_dir, made_by)
    row_of = _number_rows(parts)
    wanted, bad = _stat(pictures, folder)
    missing = [i for i, picture in enumerate(wanted) if picture is not None and picture not in row_of]
    if missing:
        paths, names = [pictures[i] for i in missing], [wanted[i] for i in missing]
        new_parts, unreadable = _encode(paths, names, encode, cache_dir, made_by, batch_size, workers)
        bad.update(unreadable)
        parts += new_parts
        row_of = _number_rows(parts)
    if not any(picture in row_of for picture in wanted):
        raise ValueError(
            f"{printable(folder)}: none of {len(pictures)} pictures can be read ({next(iter(bad.values()))})"
        )
    if len(parts) > 1:
        parts = [_join(parts, row_of, wanted, cache_dir, made_by)]
        row_of = _number_rows(parts)

    codes = parts[0].codes
    rows = np.array([row_of.get(picture, -1) for picture in wanted])
    if np.array_equal(rows, np.arange(len(rows))):
        return codes[: len(rows)], bad
    gathered = codes[rows]
    gathered[rows < 0] = 0
    return gathered, bad


def _number_rows(parts: Sequence[_Part]) -> Dict[Optional[_Picture], int]:
    """Picture → its row when the parts' codes are laid end to end; a later part outdoes an earlier one."""
    return {picture: row for row, picture in enumerate(picture for part in parts for picture in part.pictures)}


def _stat(pictures: Sequence[Path], folder: Path) -> Tuple[List[Optional[_Picture]], Dict[Path, str]]:
    """Name, bytes and mtime of each picture; None, and a reason, for those that are gone."""
    prefix = os.path.join(str(folder), "")
    wanted: List[Optional[_Picture]] = []
    bad = {}
    for path in pictures:
        name = str(path)
        try:
            status = os.stat(name)
        except OSError as error:
            wanted.append(None)
            bad[path] = str(error)
            continue
        name = name[len(prefix) :] if name.startswith(prefix) else os.path.relpath(name, folder)
        wanted.append((name.replace(os.sep, "/"), status.st_size, status.st_mtime_ns))
    return wanted, bad


class _Pixels(Dataset):
    """Pictures as uint8 (3, size, size), or the reason why not as a string."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths = paths
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[int, Union[torch.Tensor, str]]:
        try:
            pixels = load_picture(self.paths[index], self.size)
        except (ValueError, OSError) as error:
            return index, str(error)
        return index, torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _as_list(samples: list) -> list:
    return samples


def _encode(
    paths: Sequence[Path],
    pictures: Sequence[_Picture],
    encode: Callable[[torch.Tensor], torch.Tensor],
    cache_dir: Path,
    made_by: Dict[str, Any],
    batch_size: int,
    workers: int,
) -> Tuple[List[_Part], Dict[Path, str]]:
    """Encode the pictures and write them in parts; what is finished is kept, whatever ends this."""
    parts: List[_Part] = []
    bad: Dict[Path, str] = {}
    done: List[_Picture] = []
    rows: List[np.ndarray] = []

    def flush() -> None:
        if done:
            parts.append(_write_part(cache_dir, made_by, list(done), np.concatenate(rows)))
            done.clear()
            rows.clear()

    loader = DataLoader(
        _Pixels(paths, made_by["image_size"]),
        batch_size,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=leave_interrupts_to_the_parent,
    )
    log.info("%d pictures to encode, once", len(paths))
    flushed = time.monotonic()
    try:
        with tqdm(total=len(paths), desc="encoding pictures", unit="picture", disable=None) as bar:
            for samples in loader:
                readable = [(index, pixels) for index, pixels in samples if not isinstance(pixels, str)]
                bad.update((paths[index], reason) for index, reason in samples if isinstance(reason, str))
                if readable:
                    images = torch.stack([pixels for _, pixels in readable])  # (B, 3, size, size)
                    codes = encode(images.float().div_(255))
                    rows.append(_checked(codes, len(readable), made_by["num_codes"]))
                    done += [pictures[index] for index, _ in readable]
                bar.update(len(samples))
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    flush()
                    flushed = time.monotonic()
    finally:
        flush()
    return parts, bad


def _checked(codes: torch.Tensor, count: int, num_codes: int) -> np.ndarray:
    if codes.ndim != 2 or len(codes) != count or codes.is_floating_point():
        raise ValueError(
            f"encode gave {codes.dtype} {tuple(codes.shape)} for {count} pictures; integers ({count}, L) are needed"
        )
    if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(f"encode gave codes {int(codes.min())} to {int(codes.max())}; the codebook has {num_codes}")
    return codes.cpu().numpy().astype(_dtype(num_codes))


def _dtype(num_codes: int) -> type:
    return np.uint16 if num_codes <= 65536 else np.uint32


def _join(
    parts: Sequence[_Part],
    row_of: Dict[Optional[_Picture], int],
    wanted: Sequence[Optional[_Picture]],
    cache_dir: Path,
    made_by: Dict[str, Any],
) -> _Part:
    """One part in the order of `wanted`; after it come pictures of the folder that were not asked for this time.

    An older state of a picture asked for is left out. The parts that were joined are removed once theirs is in place.
    """
    pictures = [picture for picture in wanted if picture in row_of]
    names = {picture[0] for picture in pictures}
    pictures += [picture for picture in row_of if picture[0] not in names]
    rows = [row_of[picture] for picture in pictures]
    joined = _write_part(cache_dir, made_by, pictures, np.concatenate([part.codes for part in parts])[rows])
    for part in parts:
        for path in (part.path, part.path.with_suffix(".npy")):
            # Another process may have joined it too, or the system may hold it open: then it is just taken up again.
            with contextlib.suppress(OSError):
                path.unlink()
    return joined


def _prefix(made_by: Dict[str, Any]) -> str:
    """How the names of a cache's files begin; they tell caches apart at a glance, the .json is what is believed."""
    vqgan = re.sub("[^A-Za-z0-9]", "", made_by["vqgan"])[:12]
    place = hashlib.sha256(os.fsencode(made_by["folder"])).hexdigest()[:8]
    return f"codes-{vqgan}-{made_by['image_size']}-{place}-"


def _write_part(cache_dir: Path, made_by: Dict[str, Any], pictures: List[_Picture], codes: np.ndarray) -> _Part:
    path = cache_dir / f"{_prefix(made_by)}{uuid.uuid4().hex[:12]}.json"
    names, sizes, mtimes = zip(*pictures)
    index = {**made_by, "crc32": zlib.crc32(codes), "names": names, "sizes": sizes, "mtimes": mtimes}
    array_path = path.with_suffix(".npy")
    _write_whole(array_path, lambda file: np.save(file, codes, allow_pickle=False))
    _write_whole(path, lambda file: file.write(json.dumps(index).encode("ascii")))
    return _Part(path, pictures, np.load(array_path, mmap_mode="r", allow_pickle=False))


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside the final name, wait for the disk, rename: the name never shows half a file."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def _read_parts(cache_dir: Path, made_by: Dict[str, Any]) -> List[_Part]:
    """The parts of this cache that are whole. A damaged one is told and left out, so its pictures are encoded again."""
    while True:
        parts, vanished = [], False
        for path in sorted(cache_dir.glob(f"{_prefix(made_by)}*.json")):
            try:
                part = _read_part(path, made_by)
            except Exception as error:  # damage shows as whatever the layer that meets it raises
                if not path.exists():
                    vanished = True  # another process joined its parts while we looked: look again for the joined one
                    break
                log.warning("%s: damaged, its pictures are encoded again (%s)", printable(path), error)
                continue
            if part is not None:
                parts.append(part)
        if not vanished:
            return parts


def _read_part(path: Path, made_by: Dict[str, Any]) -> Optional[_Part]:
    index = json.loads(path.read_bytes().decode("ascii"))
    if {key: index.get(key) for key in made_by} != made_by:
        return None
    pictures = list(zip(index["names"], index["sizes"], index["mtimes"]))
    codes = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    if codes.ndim != 2 or len(codes) != len(pictures) or codes.dtype != _dtype(made_by["num_codes"]):
        raise ValueError(f"{codes.dtype} {codes.shape} for {len(pictures)} pictures")
    if zlib.crc32(codes) != index["crc32"]:
        raise ValueError("checksum differs")
    return _Part(path, pictures, codes)
