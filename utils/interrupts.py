"""Ctrl-C and SIGTERM that wait until what must be whole is whole: an update, a checkpoint.

What is done about them, and what is said, is the commands' business (log.py, train.py).
"""

import contextlib
import signal
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPATIENT = 1.0  # seconds; launchers hand on a Ctrl-C that a terminal has sent already, so one press may come twice

_waiting = []  # (signal, when) since held() was entered
_depth = 0


def _note(number, frame):
    if number == signal.SIGINT and any(time.monotonic() - when > IMPATIENT for _, when in _waiting):
        raise SystemExit(130)  # asked for again: at once, and nothing is saved
    _waiting.append((number, time.monotonic()))


@contextlib.contextmanager
def held():
    """Within: Ctrl-C and SIGTERM are only noted. On leaving, what came is raised again; a second Ctrl-C, a second or
    more after the first, ends the program at once.
    """
    global _depth
    if _depth or threading.current_thread() is not threading.main_thread():
        yield  # whoever holds them already lets them go
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
        came = _waiting[:]
        _waiting.clear()
    for number, _ in came[:1]:
        signal.raise_signal(number)


def asked():
    """Whether one is waiting."""
    return bool(_waiting)


def check():
    """A place where nothing is half done: KeyboardInterrupt if one is waiting."""
    if _waiting:
        raise KeyboardInterrupt


@contextlib.contextmanager
def children_held():
    """Within: what is to be done when a child process ends waits; torch, for one, raises its error about a worker then
    and there. On leaving, it is done.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: ended.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    if ended:
        signal.raise_signal(signal.SIGCHLD)
