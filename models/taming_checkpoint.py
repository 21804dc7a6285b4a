"""Read the weights of a torch or Lightning checkpoint without running code that is pickled in it.

A pickle may call any function by name. Here only the functions that describe tensors can be called; any other name
becomes an inert `Name`. Lightning files keep their callbacks' classes that way, which `weights_only=True` refuses.
"""

import errno
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from utils.files import first_line

DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Untyped": torch.uint8,
    "Bool": torch.bool,
}
STREAM_HEADER = [0x1950A86A20F9469CFC6C, 1001]  # magic number and version of the format before torch 1.6
LARGEST_COUNT = 1 << 48  # more elements than any file holds; keeps products of sizes far from overflow


class Storage(NamedTuple):
    """Elements in the file that one or more tensors share."""

    key: str
    dtype: torch.dtype
    length: int

    @property
    def byte_count(self) -> int:
        return self.length * torch.empty(0, dtype=self.dtype).element_size()


class TensorRecord(NamedTuple):
    """A strided view of a storage that has not been read yet."""

    storage: Storage
    offset: int
    size: Tuple[int, ...]
    stride: Tuple[int, ...]


class Name:
    """A function or class that the file names. It may be stored as data; only FUNCTIONS can be called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name not in FUNCTIONS:
            raise ValueError(f"wants to run {self.name}")
        return FUNCTIONS[self.name](*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"wants to change {self.name}")


class StateDict(dict):
    """A dict in place of OrderedDict, without the attributes that Module.state_dict sets."""

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: Union[str, Path], skip: Sequence[str] = ()) -> Dict[str, torch.Tensor]:
    """Read a state dict, or the one that is stored as "state_dict", to the CPU.

    Args:
        path: a file of torch.save, in the zip format or the older stream format.
        skip: prefixes of names to leave out; their tensors are not read.

    Raises:
        ValueError: not such a file, damaged, or one that wants to run code. One line that names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            opened = _open_zip(file) if file.read(4) == b"PK\x03\x04" else _open_stream(file)
            return _read_tensors(*opened, tuple(skip))
    except Exception as error:  # damage shows as whatever the layer that meets it raises
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a damaged offset, not the disk
            raise
        raise ValueError(f"{path}: not a VQGAN checkpoint, or damaged ({first_line(error)})") from error


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]  # C's allocates what a forged memo index asks for
    def __init__(self, file: Any):
        super().__init__(file, encoding="latin-1")
        self.storages: Dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> Storage:
        """Return the storage that torch.save describes as ("storage", type, key, device, element count)."""
        tag, kind, key, _, count, *view = reference
        dtype = DTYPES.get(kind.name.rpartition(".")[2].replace("Storage", ""))
        if tag != "storage" or dtype is None or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError("refers to something that is not a storage")
        storage = Storage(key, dtype, _check_counts((count,))[0])
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"describes storage {key} in two ways")
        return storage


def _open_zip(file: BinaryIO) -> Tuple[Any, Callable[[Storage], bytearray]]:
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()) or any(entry.compress_type for entry in entries.values()):
        raise ValueError("holds a name twice or compressed data, which torch.save never writes")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip file without the data.pkl of torch.save")
    folder = pickles[0].partition("/")[0]
    if f"{folder}/byteorder" in entries and archive.read(f"{folder}/byteorder") != b"little":
        raise ValueError("written by a big-endian machine")

    def read(storage: Storage) -> bytearray:
        entry = entries[f"{folder}/data/{storage.key}"]
        if entry.file_size != storage.byte_count:
            raise ValueError(f"storage {storage.key} has {entry.file_size} bytes, not {storage.byte_count}")
        return bytearray(archive.read(entry))  # compares the checksum

    return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), read


def _open_stream(file: BinaryIO) -> Tuple[Any, Callable[[Storage], bytearray]]:
    """Open five pickles (magic, version, machine, object, storage keys), then count and elements of each storage."""
    file.seek(0)
    if [_Unpickler(file).load(), _Unpickler(file).load()] != STREAM_HEADER:
        raise ValueError("a pickle, but not of torch.save")
    if _Unpickler(file).load()["little_endian"] is not True:
        raise ValueError("written by a big-endian machine")
    unpickler = _Unpickler(file)
    saved = unpickler.load()
    positions = {}
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        if struct.unpack("<q", file.read(8))[0] != storage.length:
            raise ValueError(f"storage {key} does not have {storage.length} elements")
        positions[key] = file.tell()
        file.seek(storage.byte_count, io.SEEK_CUR)
    if file.tell() > file.seek(0, io.SEEK_END):
        raise EOFError("cut short")

    def read(storage: Storage) -> bytearray:
        file.seek(positions[storage.key])
        return bytearray(file.read(storage.byte_count))

    return saved, read


def _read_tensors(saved: Any, read: Callable[[Storage], bytearray], skip: Tuple[str, ...]) -> Dict[str, torch.Tensor]:
    """Read the tensors that are not skipped; those that share a storage share memory again."""
    state_dict = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if state_dict is None or not isinstance(state_dict, dict):
        raise ValueError("holds no state dict")
    weights: Dict[str, torch.Tensor] = {}
    storages: Dict[Storage, torch.Tensor] = {}
    for name, record in state_dict.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise ValueError(f"{name[:60]!r} is not a tensor" if isinstance(name, str) else "a name is not text")
        if name.startswith(skip):
            continue
        storage = record.storage
        if storage not in storages:
            content = read(storage) if storage.length else None
            none = torch.empty(0, dtype=storage.dtype)
            storages[storage] = torch.frombuffer(content, dtype=storage.dtype) if content else none
        weights[name] = torch.as_strided(storages[storage], record.size, record.stride, record.offset)
    return weights


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> TensorRecord:
    offset, size, stride = _check_counts((offset,))[0], _check_counts(size), _check_counts(stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or math.prod(size) > LARGEST_COUNT:
        raise ValueError("a tensor without storage, or of an impossible size")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if 0 not in size and last >= storage.length:
        raise ValueError(f"a tensor reaches element {last} of a storage of {storage.length}")
    return TensorRecord(storage, offset if 0 not in size else 0, size, stride)


def _check_counts(values: Any) -> Tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        type(value) is int and 0 <= value <= LARGEST_COUNT for value in values
    ):
        raise ValueError("a tensor's size is not made of counts")
    return tuple(values)


def _first_argument(data: Optional[TensorRecord], *_: Any) -> Optional[TensorRecord]:
    return data


FUNCTIONS: Dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first_argument,
    "collections.OrderedDict": StateDict,
    "torch.Size": _check_counts,
}
