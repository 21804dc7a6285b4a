"""Reads the tensors of a torch / Lightning checkpoint without running anything that is pickled in it.

A checkpoint is a pickle, a small program that may call any function by name. Here that program is read by a machine
that knows the handful of instructions which torch.save writes and four functions, those that describe a tensor; every
other name in the file becomes an inert marker. Markers may lie about as data (Lightning keeps its callbacks under
their classes); the first attempt to call one ends the reading. Nothing is imported, and tensors are read only when
their name is wanted, so optimizer states and discriminators cost no memory.

Both of torch.save's formats are read: the zip archive (torch ≥ 1.6) and the stream of pickles before it.
"""

import errno
import io
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Sequence, Tuple, Union

import torch

# The name under which a storage's type is pickled -> dtype of its elements.
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value of the stream format
LEGACY_VERSION = 1001
LARGEST_COUNT = 1 << 48  # more elements than any file holds; keeps products of sizes far from overflow

# Damage shows as whatever the layer that meets it raises; none of it may reach the user as a traceback.
_DAMAGE = (
    AttributeError, EOFError, LookupError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


class Marker(NamedTuple):
    """A name in the pickle that stands for something of Python's. It is never looked up."""

    name: str


class Storage(NamedTuple):
    """Where a tensor's elements lie in the file."""

    key: str
    dtype: torch.dtype
    count: int  # elements


class TensorRecord(NamedTuple):
    """A strided view of a storage, not yet read."""

    storage: Storage
    offset: int
    size: Tuple[int, ...]
    stride: Tuple[int, ...]


class Refused(ValueError):
    """What the file asks for is not something that a checkpoint of tensors needs."""


def read_weights(path: Union[str, Path], skip: Sequence[str] = ()) -> Dict[str, torch.Tensor]:
    """The state dict of a checkpoint: name -> tensor on the CPU, in the dtype it was saved with.

    Args:
        path: a file that torch.save wrote: a state dict, or a dict that holds one as "state_dict" (Lightning's).
        skip: names that begin with one of these are left out, and their tensors not read.

    Raises:
        ValueError: not such a file, damaged, or one that wants to run code. One line that names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_zip(file, tuple(skip))
            return _read_stream(file, tuple(skip))
    except Refused as error:
        raise ValueError(f"{path}: {_one_line(error)}: not a VQGAN checkpoint") from error
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # of the disk; EINVAL is a damaged directory that points to before the beginning of the file
        raise ValueError(f"{path}: damaged, or no checkpoint at all ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The two file formats


def _read_zip(file: BinaryIO, skip: Tuple[str, ...]) -> Dict[str, torch.Tensor]:
    """An archive of <name>/data.pkl, <name>/data/<storage key>, … stored without compression."""
    file_size = file.seek(0, io.SEEK_END)  # no member can be longer, whatever the directory says
    with zipfile.ZipFile(file) as archive:
        entries = {}
        for entry in archive.infolist():
            if entry.filename in entries:
                raise Refused(f"holds {entry.filename} twice")
            if entry.compress_type != zipfile.ZIP_STORED:  # torch.save never compresses; a bomb would
                raise Refused(f"holds {entry.filename} compressed")
            entries[entry.filename] = entry
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("is a zip file without the data.pkl of torch.save")
        folder = pickles[0].rpartition("/")[0]
        byteorder = f"{folder}/byteorder"
        if byteorder in entries and archive.read(byteorder) != b"little":
            raise Refused("was written by a big-endian machine")

        def read(storage: Storage) -> bytearray:
            entry = entries[f"{folder}/data/{storage.key}"]
            if entry.file_size != _byte_count(storage) or entry.file_size > file_size:
                raise ValueError(f"storage {storage.key} has {entry.file_size} bytes, not {_byte_count(storage)}")
            with archive.open(entry) as member:
                return _read_exactly(member, entry.file_size)

        return _tensors(_Machine(io.BytesIO(archive.read(pickles[0]))).run(), read, skip)


def _read_stream(file: BinaryIO, skip: Tuple[str, ...]) -> Dict[str, torch.Tensor]:
    """Five pickles (magic, version, machine, the object, storage keys), then count and elements of each storage."""
    file_size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(1) != b"\x80":
        raise Refused("does not begin like a file of torch.save")
    file.seek(0)
    if _Machine(file).run() != LEGACY_MAGIC or _Machine(file).run() != LEGACY_VERSION:
        raise Refused("is a pickle, but not one of torch.save")
    machine = _Machine(file).run()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("was written by a big-endian machine")
    reader = _Machine(file)
    saved = reader.run()
    positions = {}  # storage key -> where its elements begin
    for key in _Machine(file).run():
        storage = reader.storages[key]
        if struct.unpack("<q", file.read(8))[0] != storage.count:
            raise ValueError(f"storage {key} does not have {storage.count} elements")
        positions[key] = file.tell()
        if positions[key] + _byte_count(storage) > file_size:
            raise EOFError("a tensor is cut short")
        file.seek(_byte_count(storage), io.SEEK_CUR)

    def read(storage: Storage) -> bytearray:
        file.seek(positions[storage.key])
        return _read_exactly(file, _byte_count(storage))

    return _tensors(saved, read, skip)


def _byte_count(storage: Storage) -> int:
    return storage.count * torch.empty(0, dtype=storage.dtype).element_size()


def _read_exactly(file: Any, length: int) -> bytearray:
    content, done = bytearray(length), 0
    view = memoryview(content)
    while done < length:
        got = file.readinto(view[done:])
        if not got:
            raise EOFError("a tensor is cut short")
        done += got
    return content


def _tensors(saved: Any, read: Callable[[Storage], bytearray], skip: Tuple[str, ...]) -> Dict[str, torch.Tensor]:
    """Reads the wanted tensors; those that share a storage share memory again."""
    state_dict = saved.get("state_dict", saved) if isinstance(saved, dict) else saved
    if not isinstance(state_dict, dict):
        raise Refused("holds no state dict")
    weights, storages = {}, {}  # type: Dict[str, torch.Tensor], Dict[Storage, torch.Tensor]
    for name, record in state_dict.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise Refused(f"holds {name!r} where a tensor and its name should be")
        if name.startswith(skip):
            continue
        storage, dtype = record.storage, record.storage.dtype
        if storage not in storages:
            content = read(storage)
            storages[storage] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        weights[name] = torch.as_strided(storages[storage], record.size, record.stride, record.offset)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# The four functions that a pickle may call. Each only describes.


def _rebuild_tensor(storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> TensorRecord:
    """torch._utils._rebuild_tensor and _v2; whether gradients were wanted, and hooks, are of no interest."""
    size, stride = _counts(size), _counts(stride)
    offset = _counts([offset])[0]
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError("a tensor without storage, size and stride")
    elements = 1
    for length in size:
        elements *= length
        if elements > LARGEST_COUNT:
            raise ValueError(f"a tensor of size {size}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if elements and last >= storage.count:
        raise ValueError(f"a tensor reaches element {last} of a storage of {storage.count}")
    return TensorRecord(storage, offset if elements else 0, size, stride)


def _counts(values: Any) -> Tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise ValueError("a tensor's size is not a tuple")
    for value in values:
        if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
            raise ValueError("a tensor's size is not made of counts")
    return tuple(values)


def _rebuild_parameter(data: TensorRecord, *_: Any) -> TensorRecord:
    return data


def _ordered_dict(pairs: Sequence = ()) -> Dict:
    return {_key(name): value for name, value in pairs}


FUNCTIONS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _counts,
}  # type: Dict[str, Callable]


def _key(value: Any) -> Any:
    # Nested tuples would be hashed recursively, without a limit on the depth.
    if not isinstance(value, (str, bytes, int, float, bool, Marker, type(None))):
        raise Refused(f"uses a {type(value).__name__} as a dictionary key")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The pickle machine

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_NUMBERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_STRINGS = frozenset({"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
_BYTES = frozenset({"SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})
_MARK = object()


class _Machine:
    """Runs one pickle to its end. `pickletools` splits the bytes into instructions; what they do is decided here.

    Attributes:
        storages: every storage that was named, by key.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.stack = []  # type: List[Any]
        self.memo = {}  # type: Dict[int, Any]
        self.storages = {}  # type: Dict[str, Storage]

    def run(self) -> Any:
        """The pickled value, made of dict, list, tuple, str, bytes, numbers, None, Marker and TensorRecord.

        Raises:
            Refused: an instruction or a call outside those. ValueError, IndexError, KeyError, TypeError: damage.
        """
        for opcode, argument, _ in pickletools.genops(self.file):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        if len(self.stack) != 1:
            raise ValueError("a pickle that ends in the middle")
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _NUMBERS or name in _STRINGS or name in _BYTES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "LIST"):
            items = self.since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(self.values(int(name[-1])))]
        elif name == "DICT":
            items = self.since_mark()
            stack.append(_ordered_dict(zip(items[::2], items[1::2])))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self.top(dict).update(_ordered_dict(zip(items[::2], items[1::2])))
        elif name in ("APPEND", "APPENDS"):
            items = self.since_mark() if name == "APPENDS" else [stack.pop()]
            self.top(list).extend(items)
        elif name == "GLOBAL":
            stack.append(Marker(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [Marker(".".join(self.values(2)))]  # a TypeError unless both are text
        elif name == "REDUCE":
            function, arguments = self.values(2)
            stack[-2:] = [_call(function, arguments)]
        elif name == "BUILD":  # an OrderedDict's attributes (a state dict's _metadata): not needed
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise Refused(f"wants to set up {_name(stack[-1])}")
        elif name == "BINPERSID":
            stack[-1] = self.storage(stack[-1])
        elif name in ("NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"):
            raise Refused(f"wants to make {self.asked_for(name, argument)}")
        else:
            raise Refused(f"has the pickle instruction {name}, which torch.save never writes")

    def since_mark(self) -> List[Any]:
        """Takes the values above the topmost mark, and the mark, from the stack."""
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("a pickle without the mark it needs")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def values(self, count: int) -> List[Any]:
        """The topmost `count` values; they stay."""
        if len(self.stack) < count or any(value is _MARK for value in self.stack[-count:]):
            raise ValueError("a pickle with too few values")
        return self.stack[-count:]

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise Refused(f"puts items into {_name(self.stack[-1])}")
        return self.stack[-1]

    def asked_for(self, name: str, argument: Any) -> str:
        """The class that an instruction for making an object names."""
        if name == "INST":
            return argument.replace(" ", ".", 1)
        if name == "OBJ":
            return _name(self.since_mark()[0])
        return _name(self.stack[-2 if name == "NEWOBJ" else -3])

    def storage(self, reference: Any) -> Storage:
        """("storage", type, key, device, element count) as torch.save refers to a storage; the device is ignored."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise Refused("refers to something that is no storage")
        kind, key, count = reference[1], reference[2], reference[4]
        if len(reference) == 6 and reference[5] is not None:
            raise Refused("holds a view of a storage, as torch before 0.4 wrote them")
        module, _, kind_name = _name(kind).rpartition(".")
        if module not in ("torch", "torch.storage") or kind_name not in STORAGE_DTYPES or not isinstance(key, str):
            raise Refused(f"holds tensors of type {_name(kind)}")
        storage = Storage(key, STORAGE_DTYPES[kind_name], _counts([count])[0])
        if self.storages.setdefault(key, storage) != storage:
            raise Refused(f"describes storage {key} in two ways")
        return storage


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Marker) or function.name not in FUNCTIONS:
        raise Refused(f"wants to run {_name(function)}")
    if not isinstance(arguments, tuple):
        raise ValueError("a call without arguments")
    return FUNCTIONS[function.name](*arguments)


def _name(value: Any) -> str:
    return value.name if isinstance(value, Marker) else f"a {type(value).__name__}"
