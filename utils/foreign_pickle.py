"""Read the weights of other programs' checkpoints without running code that is pickled in them.

A pickle may call any function by name. Here only the functions that describe tensors are called. Any other name becomes
a class of `Inert` objects, so that a file's settings, callbacks and paths do no harm and need no packages;
`weights_only=True` refuses such files. torch.load with an unpickler of our own would not do: it believes the sizes that
a file states, and reads memory past the end of a storage.
"""

import contextlib
import errno
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, NamedTuple, Sequence, Tuple, Union

import torch
from safetensors import safe_open

from utils.errors import first_line, ran_out_of_memory

Tensors = Dict[str, torch.Tensor]

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
MODULE_DEPTH = 32  # of modules in modules
MOST_MODULES = 100_000  # a few that refer to each other many times would take forever
MOST_DICTS = 1000  # that are searched for a state dict
MOST_VALUES = 128  # in a list or dict of plain values; lists in a list may be one list many times
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


class Inert:
    """What a file describes as an object of another program: it has perhaps a state, and does nothing."""

    state: Any = None

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Inert":
        return super().__new__(cls)

    def __call__(self, *arguments: Any) -> "Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, *item: Any) -> None:
        """Ignore an item; a pickle adds some to objects in these ways."""

    __init__ = add = extend = update = __setitem__ = append  # type: ignore[assignment]


class Function:
    """A function of FUNCTIONS that the file names."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        return FUNCTIONS[self.name](*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"wants to change {self.name}")


class StateDict(dict):
    """A dict in place of OrderedDict, without the attributes that Module.state_dict sets."""

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: Union[str, Path], anchor: str, skip: Sequence[str] = ()) -> Tensors:
    """Read a state dict, up to three dicts deep in a file, to the CPU.

    Args:
        path: a file of torch.save, in the zip format or the older stream format, or .safetensors.
        anchor: name of a tensor that the wanted state dict has. If it has a prefix such as "module.", only names with
            that prefix are read, and it is removed.
        skip: prefixes of names to leave out; their tensors are not read.

    Raises:
        ValueError: not such a file, damaged, or without the anchor. One line that names the file.
    """
    path, skip = Path(path), tuple(skip)
    with _describing_damage(path, "VQGAN checkpoint"), path.open("rb") as file:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt", device="cpu") as tensors:
                names = _wanted(dict.fromkeys(tensors.keys()), skip, anchor)
                return {name: tensors.get_tensor(stored) for name, stored in names.items()}
        saved, read = _open(file)
        state_dict = _find_state_dict(saved, anchor)
        names = _wanted(state_dict, skip, anchor)
        return _read_tensors({name: state_dict[stored] for name, stored in names.items()}, read)


def read_entries(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a dict's plain values and the state dict in its entry "weights"; ValueError as for read_weights."""
    path = Path(path)
    with _describing_damage(path, "checkpoint"), path.open("rb") as file:
        saved, read = _open(file)
        if not isinstance(saved, dict) or not isinstance(saved.get("weights"), dict):
            raise ValueError("holds no weights")
        entries = {key: plain(value) for key, value in saved.items() if isinstance(key, str)}
        return {**entries, "weights": _read_tensors(saved["weights"], read)}


def read_module(path: Union[str, Path]) -> Tensors:
    """Read the weights of a pickled module, as torch.save(module) writes it; ValueError as for read_weights."""
    path = Path(path)
    with _describing_damage(path, "module"), path.open("rb") as file:
        saved, read = _open(file)
        return _read_tensors(dict(_parameters(saved)), read)


@contextlib.contextmanager
def _describing_damage(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever the layer that meets damage raises into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        is_io = isinstance(error, OSError) and error.errno != errno.EINVAL  # EINVAL: a damaged offset, not the disk
        if is_io or ran_out_of_memory(error):
            raise
        raise ValueError(f"{path}: not a {kind}, or damaged ({first_line(error)})") from error


def _open(file: BinaryIO) -> Tuple[Any, Callable[[Storage], bytearray]]:
    try:
        return _open_zip(file) if file.read(4) == b"PK\x03\x04" else _open_stream(file)
    except MemoryError:  # sizes of storages are compared with the file, those of other values are not
        raise ValueError("holds a value that is too large") from None


def _find_state_dict(saved: Any, anchor: str) -> Dict[str, Any]:
    """Return the first dict that has the anchor, wide before deep."""
    if not isinstance(saved, dict):
        raise ValueError("holds no state dict")
    level = [saved]
    for _ in range(3):
        for one in level:
            if any(isinstance(name, str) and name.endswith(anchor) for name in one):
                return one
        level = [value for one in level for value in one.values() if isinstance(value, dict)][:MOST_DICTS]
    raise ValueError(f"no tensor of it is named {anchor}")


def _wanted(state_dict: Dict[str, Any], skip: Tuple[str, ...], anchor: str) -> Dict[str, str]:
    """Return the names of the tensors to read, without the anchor's prefix, and their names in the file."""
    found = [name[: -len(anchor)] for name in state_dict if isinstance(name, str) and name.endswith(anchor)]
    if not found:
        raise ValueError(f"no tensor of it is named {anchor}")
    prefix = min(found, key=lambda name: ("ema" in name, len(name)))  # averaged copies come second
    if not all(isinstance(name, str) for name in state_dict):
        raise ValueError("a name is not text")
    names = {name[len(prefix) :]: name for name in state_dict if name.startswith(prefix)}
    return {name: stored for name, stored in names.items() if not name.startswith(skip)}


def _parameters(module: Any) -> Iterator[Tuple[str, Any]]:
    """Yield names and records of a pickled module's parameters and buffers."""
    waiting, count = [("", module, MODULE_DEPTH)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        state = module.state if isinstance(module, Inert) else None
        if not isinstance(state, dict) or not isinstance(state.get("_modules"), dict) or not depth:
            raise ValueError(f"{prefix or 'it'} is not a module")
        for kind in ("_parameters", "_buffers"):
            for name, record in dict(state.get(kind) or {}).items():
                if record is not None:
                    yield f"{prefix}{name}", record
        waiting += [(f"{prefix}{name}.", child, depth - 1) for name, child in state["_modules"].items()]
        count += 1
        if count > MOST_MODULES or len(waiting) > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_MODULES} modules")


def plain(value: Any, depth: int = 3) -> Any:
    """Return numbers, texts, and tuples, lists and short dicts of them; None for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and depth and len(value) <= MOST_VALUES:
        return tuple(plain(one, depth - 1) for one in value)
    if isinstance(value, dict) and depth and len(value) <= MOST_VALUES:
        return {key: plain(one, depth - 1) for key, one in value.items() if isinstance(key, str)}
    return None


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]  # C's allocates what a forged memo index asks for
    def __init__(self, file: Any):
        super().__init__(file, encoding="latin-1")
        self.storages: Dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        return Function(name) if name in FUNCTIONS else type(name, (Inert,), {})

    def persistent_load(self, reference: Any) -> Any:
        """Return the storage that torch.save describes as ("storage", type, key, device, element count)."""
        if reference[0] == "module":  # a class with its source text, of a file with a whole module
            return reference[1]
        tag, kind, key, _, count, *view = reference
        dtype = DTYPES.get(kind.__name__.rpartition(".")[2].replace("Storage", ""))
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


def _read_tensors(state_dict: Dict[Any, Any], read: Callable[[Storage], bytearray]) -> Tensors:
    """Read the tensors of a state dict; those that share a storage share memory again."""
    weights: Tensors = {}
    storages: Dict[Storage, torch.Tensor] = {}
    for name, record in state_dict.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise ValueError(f"{str(name)[:60]!r} is not a tensor, but {type(record).__name__[:60]}")
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


FUNCTIONS: Dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "collections.OrderedDict": StateDict,
    "torch.Size": _check_counts,
}
