"""End quietly when the program that reads this one's output has ended, as `head` does."""

import contextlib
import os
import select
import sys
from typing import Iterator

EXIT_STATUS = 141  # what a shell reports for SIGPIPE
_discarded = False


def discard_output() -> None:
    """Let further output to stdout vanish."""
    global _discarded
    _discarded = True
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _is_closed() -> bool:
    """Return whether nobody reads stdout any more; True if this cannot be found out."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll, or a stdout that is no file
        return True


@contextlib.contextmanager
def exit_on_closed_output() -> Iterator[None]:
    """End the program, without a message, if this block writes to a stdout that nobody reads any more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not (_discarded or _is_closed()):  # another pipe broke
            raise
        discard_output()
        raise SystemExit(EXIT_STATUS) from None
