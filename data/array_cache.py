"""Arrays on disk about the files of a folder: what was made of each file is kept and found again while the file stays
the same. What is made is the business of codes.py and captions.py; here it is numbers, some for each file.

A cache is one or more pairs of files, each written once under a name of its own and never changed:

    <kind>-…-<number>.npy    values, those of one file after those of another
    <kind>-…-<number>.json   what made them, their checksum, and for each file: name, bytes, mtime, and how many values

The number begins with the checksum of the .json. That is renamed into place after the .npy, so a pair is either whole
or not there, whenever a process stops. An interrupted process leaves the pairs it finished; when nothing is missing,
they are joined into one.

Processes that work on one folder at the same time share the work, whoever started them: each claims what it is about
to make in a lock file, which the system clears when a process ends, however it ends. Where a file system has no locks,
they make the same things twice, and only ever add pairs.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from pathlib import Path
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

import numpy as np
from tqdm import tqdm

from data.pairs import File, printable

logger = logging.getLogger("minidalle")

FLUSH_SECONDS = 60.0  # at most this much work is lost to a kill
# Bytes of the lock file, beside one for each file from 0 on.
_JOINING = 1 << 40
_PRESENT = _JOINING + 1

# Indices of files, their values along the first axis, and how many each has (None: one each).
Made = Tuple[Sequence[int], np.ndarray, Optional[Sequence[int]]]


class Part(NamedTuple):
    path: Path  # of the .json
    files: List[File]
    starts: np.ndarray  # int64 (files + 1,): file i has values[starts[i] : starts[i + 1]]
    values: np.ndarray  # mapped from the .npy


class ArrayCache:
    """One cache: the parts of it that are on disk, and those to come. `file in arrays` says whether a file is there."""

    def __init__(
        self, cache_dir: Union[str, Path], name: str, folder: Union[str, Path], dtype: type, key: Dict[str, Any]
    ):
        """name: how the names of its files begin; they tell caches apart at a glance, key is what is believed.
        folder: what the names of files are relative to; moved together with a cache inside it, the cache stays valid.

        Raises OSError when there is a `cache_dir` that cannot be read.
        """
        self.folder, self.cache_dir, self.dtype = Path(folder), Path(cache_dir), np.dtype(dtype)
        place = os.path.relpath(os.path.realpath(folder), os.path.realpath(cache_dir))
        self.key = {**key, "folder": place}
        self.prefix = f"{name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}-"
        self._parts: List[Part] = []  # also those that were on disk once; what is mapped stays readable
        self._numbers: Dict[File, int] = {}  # place among the files of all parts; a later part outdoes an earlier one
        self._on_disk: List[Path] = []  # of the parts that were there when last looked
        self._damaged: List[Path] = []
        self._others: Set[Path] = set()  # of other caches
        self._stamp = -1  # the folder's mtime when last looked
        self.refresh()

    def __contains__(self, file: Optional[File]) -> bool:
        return file in self._numbers

    def refresh(self) -> None:
        """Take up the parts that other processes have added."""
        try:
            stamp = os.stat(self.cache_dir).st_mtime_ns
        except FileNotFoundError:
            return
        while stamp != self._stamp:
            self._stamp, vanished = stamp, False
            paths = sorted(self.cache_dir / name for name in self._names() if name.endswith(".json"))
            known = {part.path for part in self._parts} | self._others | set(self._damaged)
            for path in paths:
                if path not in known:
                    vanished |= not self._read(path)
            here = {part.path for part in self._parts}
            self._on_disk = [path for path in paths if path in here]
            # Where another process joined its parts while we looked, look again for the joined one.
            stamp = -2 if vanished else stamp

    def fill(
        self,
        files: Sequence[File],
        make: Callable[[Iterator[List[int]]], Iterable[Made]],
        *,
        batch_size: int,
        doing: str,
        unit: str,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Have make() make what is missing, and return when all is there, whichever process made it.

        make: batches of indices into `files`, at most batch_size each → what it made of them, in the same order. What
        it leaves out is not asked for again.

        Whatever ends this, what was made is kept. Raises OSError when `cache_dir` cannot be written.
        """
        missing = [i for i, file in enumerate(files) if file not in self]
        if not missing:
            return
        logger.info("%s: %s, once", doing, f"{len(missing):,} {unit}s")
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # A process that is not to log shows no bar; None: a bar on a terminal only.
        hidden = None if logger.isEnabledFor(logging.INFO) else True
        before, left_out = len(self._numbers), set()
        with self._lock() as lock, tqdm(total=len(missing), desc=doing, unit=unit, disable=hidden) as bar:
            while missing:
                claimed: List[int] = []
                busy: List[List[int]] = []
                made: List[Made] = []
                flushed = time.monotonic()
                try:
                    for some in make(self._claims(files, missing, batch_size, lock, claimed, busy)):
                        made.append(some)
                        if time.monotonic() - flushed >= flush_seconds:
                            self._flush(files, made, lock)
                            flushed = time.monotonic()
                        done = len(self._numbers) - before + len(left_out) + sum(len(indices) for indices, _, _ in made)
                        bar.update(min(done, bar.total) - bar.n)
                finally:
                    self._flush(files, made, lock)
                    _release(lock)
                left_out.update(i for i in claimed if files[i] not in self)
                if busy:  # by now perhaps no longer
                    _wait(lock, busy[0])
                self.refresh()
                missing = [i for i in missing if i not in left_out and files[i] not in self]
            bar.update(bar.total - bar.n)

    def load(self, files: Sequence[File]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(values, starts, stops): file i has values[starts[i] : stops[i]]. values are mapped from disk, read-only; the
        starts of files that were filled in the order of `files` rise from 0 without a gap.

        KeyError for a file that is not there. Joins the parts, so OSError when there are several and `cache_dir` cannot
        be written.
        """
        self.refresh()
        part = self._only_part(files)
        if part is None:
            with self._lock() as lock:
                _wait(lock, [_JOINING], keep=True)
                self.refresh()
                part = self._only_part(files) or self._join(files)
        number_of = {file: number for number, file in enumerate(part.files)}
        numbers = np.array([number_of[file] for file in files], dtype=np.int64)
        return part.values, part.starts[numbers], part.starts[numbers + 1]

    def _only_part(self, files: Sequence[File]) -> Optional[Part]:
        """The part on disk, where there is just one, and it holds all of `files`."""
        if len(self._on_disk) != 1 or self._damaged:
            return None
        (part,) = [part for part in self._parts if part.path == self._on_disk[0]]
        return part if set(part.files).issuperset(files) else None

    def _claims(
        self,
        files: Sequence[File],
        missing: List[int],
        batch_size: int,
        lock: BinaryIO,
        claimed: List[int],
        busy: List[List[int]],
    ) -> Iterator[List[int]]:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            if not _claim(lock, batch):
                busy.append(batch)
                continue
            self.refresh()
            batch = [i for i in batch if files[i] not in self]  # without what another process has made meanwhile
            claimed += batch
            if batch:
                yield batch

    def _flush(self, files: Sequence[File], made: List[Made], lock: BinaryIO) -> None:
        if not made:
            return
        values = np.concatenate([values for _, values, _ in made])
        lengths = None if made[0][2] is None else [length for _, _, lengths in made for length in lengths]
        self._write([files[i] for indices, _, _ in made for i in indices], values, lengths)
        for indices, _, _ in made:
            _release(lock, indices)
        made.clear()

    def _join(self, files: Sequence[File]) -> None:
        """One part in the order of `files`; after it comes what is known of files that were not asked for this time.

        An older state of a file asked for is left out. The parts that were joined are removed once theirs is in place.
        """
        names = {file[0] for file in files}
        kept = [file for file in files if file in self] + [file for file in self._numbers if file[0] not in names]
        numbers = np.array([self._numbers[file] for file in kept])
        starts = np.concatenate([part.starts[:-1] for part in self._parts])[numbers]
        stops = np.concatenate([part.starts[1:] for part in self._parts])[numbers]
        places = np.searchsorted(np.cumsum([len(part.files) for part in self._parts]), numbers, side="right")
        values = [np.asarray(part.values) for part in self._parts]
        spans = zip(places.tolist(), starts.tolist(), stops.tolist())
        joined = np.concatenate([values[place][start:stop] for place, start, stop in spans])
        part = self._write(kept, joined, (stops - starts).tolist() if joined.ndim == 1 else None)
        for path in self._on_disk + self._damaged:
            # Another process may have joined it too, or the system may hold it open: then it is just taken up again.
            with contextlib.suppress(OSError):
                path.unlink()
                path.with_suffix(".npy").unlink()
        self._on_disk, self._damaged = [part.path], []
        return part

    def _write(self, files: List[File], values: np.ndarray, lengths: Optional[List[int]]) -> Part:
        names, sizes, mtimes = zip(*files)
        index = {**self.key, "crc32": zlib.crc32(values), "names": names, "sizes": sizes, "mtimes": mtimes}
        if lengths is not None:
            index["lengths"] = lengths
        content = json.dumps(index).encode("ascii")
        path = self.cache_dir / f"{self.prefix}{zlib.crc32(content):08x}{uuid.uuid4().hex[:8]}.json"
        write_whole(path.with_suffix(".npy"), lambda file: np.save(file, values, allow_pickle=False))
        write_whole(path, lambda file: file.write(content))
        part = Part(path, files, _starts(lengths, len(files)), _mapped(path.with_suffix(".npy")))
        self._add(part)
        return part

    def _add(self, part: Part) -> None:
        first = sum(len(part.files) for part in self._parts)
        self._numbers.update((file, first + number) for number, file in enumerate(part.files))
        self._parts.append(part)

    def _read(self, path: Path) -> bool:
        """Add a part that another run or process wrote; False where it is gone. A damaged one is told and left out."""
        try:
            content = path.read_bytes()
            if not path.name.startswith(f"{self.prefix}{zlib.crc32(content):08x}"):
                raise ValueError("checksum differs")
            index = json.loads(content)
            if {name: index.get(name) for name in self.key} == self.key:
                self._add(self._checked(path, index))
            else:
                self._others.add(path)
        except Exception as error:  # damage shows as whatever the layer that meets it raises
            if not path.exists():
                return False
            logger.warning("%s: damaged, what it held is made again (%s)", printable(path), error)
            unheard_of = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            self._others.add(path) if unheard_of else self._damaged.append(path)
        return True

    def _checked(self, path: Path, index: Dict[str, Any]) -> Part:
        files = list(zip(index["names"], index["sizes"], index["mtimes"]))
        values, starts = _mapped(path.with_suffix(".npy")), _starts(index.get("lengths"), len(files))
        if len(starts) != len(files) + 1 or starts[-1] != len(values) or values.dtype != self.dtype:
            raise ValueError(f"{values.dtype} {values.shape} for {len(files)} files")
        if zlib.crc32(values) != index["crc32"]:
            raise ValueError("checksum differs")
        return Part(path, files, starts, values)

    def _names(self) -> List[str]:
        return [name for name in os.listdir(self.cache_dir) if name.startswith(self.prefix)]

    @contextlib.contextmanager
    def _lock(self) -> Iterator[BinaryIO]:
        """The lock file. The last to leave removes it, and what processes that were killed have left half-done."""
        path = self.cache_dir / f"{self.prefix}lock"
        lock = _open_lock(path)
        with lock:
            try:
                yield lock
            finally:
                with contextlib.suppress(OSError):
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all of it: nobody else is here
                    names = self._names()
                    for name in names:
                        if name.endswith(".tmp") or (name.endswith(".npy") and f"{name[:-4]}.json" not in names):
                            (self.cache_dir / name).unlink()
                    path.unlink()


def _open_lock(path: Path) -> BinaryIO:
    while True:
        lock = open(path, "a+b")  # noqa: SIM115 (closed by the caller)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_SH, 1, _PRESENT)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()  # it was removed since


def _claim(lock: BinaryIO, indices: Sequence[int]) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, indices[-1] + 1 - indices[0], indices[0])
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _release(lock: BinaryIO, indices: Optional[Sequence[int]] = None) -> None:
    start, length = (indices[0], indices[-1] + 1 - indices[0]) if indices else (0, _JOINING)
    with contextlib.suppress(OSError):
        fcntl.lockf(lock, fcntl.LOCK_UN, length, start)


def _wait(lock: BinaryIO, indices: Sequence[int], keep: bool = False) -> None:
    """Return when no other process claims any of them; `keep`: having claimed them."""
    with contextlib.suppress(OSError):
        fcntl.lockf(lock, fcntl.LOCK_EX, indices[-1] + 1 - indices[0], indices[0])
    if not keep:
        _release(lock, indices)


def _starts(lengths: Optional[Sequence[int]], files: int) -> np.ndarray:
    return np.arange(files + 1) if lengths is None else np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
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


def pickled_by_name(array: np.ndarray) -> Union[np.ndarray, Tuple[str, int]]:
    """The file and the rows of an array that load() gave, so that a process it is sent to maps it, too; else itself."""
    try:
        if isinstance(array, np.memmap) and np.array_equal(_mapped(array.filename)[: len(array)], array):
            return str(array.filename), len(array)
    except (OSError, ValueError):  # another process has joined it since
        pass
    return array


def unpickled(array: Union[np.ndarray, Tuple[str, int]]) -> np.ndarray:
    return _mapped(Path(array[0]))[: array[1]] if isinstance(array, tuple) else array
