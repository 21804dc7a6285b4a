"""Leave nothing half done: files and folders appear complete or not at all, and signals wait until a step is over."""

import codecs
import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any, Iterable, Iterator, List, Optional, Tuple, TypeVar, Union

T = TypeVar("T")
AnyPath = Union[str, Path]
_BYTE_ORDER_MARKS = (  # UTF-32's little-endian one begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_PRESS = 1.0  # seconds; launchers forward a Ctrl-C that the terminal has sent too, so one press may arrive twice

_pending: List[Tuple[int, float]] = []  # (signal, time) received while deferred
_deferring = False


@contextlib.contextmanager
def errors_name(path: AnyPath) -> Iterator[None]:
    """Let errors of this block that name no file, such as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: AnyPath, text: bool = False, sync: bool = False) -> Iterator[IO[Any]]:
    """Yield a temporary file that is renamed to `path` when the block ends, or removed after an error.

    Code that needs a path instead of a file may write to the `name` of what is yielded.

    Args:
        path: missing parent folders are created.
        text: yield a UTF-8 text file with "\\n" line ends; otherwise a binary one.
        sync: flush to disk before the rename, so that the file survives a power failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        form = {"mode": "w", "encoding": "utf-8", "newline": "\n"} if text else {"mode": "wb"}
        with errors_name(path), open(temporary, **form) as file:  # type: ignore[call-overload]
            yield file
        if sync:
            with open(temporary, "rb+") as written:  # opened again: the block may have replaced the file by name
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what atomic_write left of files (glob patterns) when a process was killed; nobody may be writing them."""
    for name in names:
        for path in folder.glob(f"{name}.*.tmp"):
            path.unlink()


@contextlib.contextmanager
def replace_folder(folder: AnyPath) -> Iterator[Path]:
    """Yield a new, empty folder that takes the place of `folder` when the block ends, or is removed after an error."""
    target = Path(os.path.realpath(folder))
    draft, old = (target.with_name(f"{target.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_writable(folder: AnyPath, flag: str) -> None:
    """Create and remove a file in the folder; if that fails, ValueError, before hours of work are lost."""
    probe = Path(folder) / f".writable.{os.getpid()}.tmp"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written ({error.strerror}); give another folder") from None


@contextlib.contextmanager
def hold_lock(path: AnyPath, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of the file `path`, which stays, and yield True; yield False if another process holds it.

    Processes are not kept apart on Windows, if the file cannot be written, or on file systems without locks.

    Args:
        wait: until no other process holds the lock.
    """
    is_ours = True
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # POSIX only

            Path(path).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
            # Unlike flock's, this lock is not inherited by workers, which outlive a killed process by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except (ImportError, OSError):
            pass
        yield is_ours


def claim_folder(folder: AnyPath, flag: str) -> contextlib.ExitStack:
    """Check that a folder can be written, and keep other runs out of it until what is returned is closed.

    The claim also ends when this process ends, however it does.

    Raises:
        ValueError: the folder cannot be written, or another process has claimed it.
    """
    check_writable(folder, flag)
    claim = contextlib.ExitStack()
    if not claim.enter_context(hold_lock(Path(folder) / ".lock", wait=False)):
        raise ValueError(f"{flag} {folder}: another run is writing to it; give another folder")
    return claim


def decode_text(content: bytes) -> str:
    """Return the text of a file in UTF-8, UTF-16, or UTF-32 with a byte order mark; ValueError for anything else."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and content.count(0) > len(content) // 4:  # UTF-16 of mostly ASCII has one in two
        encoding = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
    text = content.decode(encoding)
    if "\0" in text:
        raise ValueError("has zero bytes, so it is not a text")
    return text


def _note(number: int, frame: Optional[FrameType]) -> None:
    if number == signal.SIGINT and any(time.monotonic() - when > SAME_PRESS for _, when in _pending):
        raise SystemExit(130)  # the user pressed again: stop at once, without saving
    _pending.append((number, time.monotonic()))


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of this block, which raises the first of them again.

    A second Ctrl-C, more than a second after the first, ends the program at once. Nested blocks, and blocks outside
    the main thread, change nothing. An exception that leaves the block discards the signals.
    """
    global _deferring
    if _deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
        for number, handler in before.items():
            signal.signal(number, handler)
        received = _pending[:]
        _pending.clear()
    if received:
        signal.raise_signal(received[0][0])


def signal_pending() -> bool:
    return bool(_pending)


def raise_if_pending() -> None:
    """Raise KeyboardInterrupt if a deferred signal is waiting; call it only when nothing is half done."""
    if _pending:
        raise KeyboardInterrupt


@contextlib.contextmanager
def defer_sigchld() -> Iterator[None]:
    """Defer SIGCHLD, so that torch reports a dead DataLoader worker only after this block."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: List[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    if received:
        signal.raise_signal(signal.SIGCHLD)


def ignore_interrupts_in_worker(worker: int = 0) -> None:
    """Make a worker process ignore Ctrl-C, which reaches it too; the parent ends it by SIGTERM (a `worker_init_fn`)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start_workers(loader: Iterable[T]) -> Iterator[T]:
    """Return the iterator of a DataLoader; Ctrl-C does not reach its new workers before they ignore it."""
    with defer_signals():  # a process inherits the handlers
        return iter(loader)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which launchers and schedulers send, like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
