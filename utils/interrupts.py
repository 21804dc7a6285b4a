"""Treat SIGTERM like Ctrl-C, and defer both and SIGCHLD until an update, a checkpoint or a batch is complete."""

import contextlib
import signal
import threading
import time
from types import FrameType
from typing import Iterator, List, Optional, Tuple

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_PRESS = 1.0  # seconds; launchers forward a Ctrl-C that the terminal has sent too, so one press may arrive twice

_pending: List[Tuple[int, float]] = []  # (signal, time) received while deferred
_deferring = False


def _note(number: int, frame: Optional[FrameType]) -> None:
    if number == signal.SIGINT and any(time.monotonic() - when > SAME_PRESS for _, when in _pending):
        raise SystemExit(130)  # the user pressed again: stop at once, without saving
    _pending.append((number, time.monotonic()))


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of this block, which raises the first of them again.

    A second Ctrl-C, more than a second after the first, ends the program at once. Nested blocks, and blocks outside
    the main thread, change nothing.
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
    """Return whether a deferred signal is waiting."""
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


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which launchers and schedulers send, like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
