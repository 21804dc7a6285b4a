"""metrics.jsonl of an output folder: a line for every update and every validation, which survives a kill.

A line is an object of `step`, the number of updates so far, and the figures that trackers.py names; null stands for
what is not finite. How the figures look is plot.py's.
"""

import collections
import json
import logging
import math
import os
import time
from pathlib import Path

from utils import interrupts

logger = logging.getLogger("minidalle")

FLUSH_SECONDS = 5
KEPT_LINES = 100_000  # that wait for a disk to have room again


class MetricsFile:
    """The lines of a run that has had `step` updates: those of later steps, and one cut short by a kill, are removed.

    A file that cannot be written is told once; the run goes on, and so do the lines when there is room again.
    """

    def __init__(self, path, step):
        self.path = Path(path)
        self.lines = collections.deque(maxlen=KEPT_LINES)
        self.flushed_at, self.told = time.monotonic(), False
        try:
            cut(self.path, step)
        except OSError as error:
            self.tell(error)

    def values(self, step, figures):
        """Figures after update `step`, by name: whole numbers, floats or bools."""
        self.lines.append(line_of(step, figures))
        if time.monotonic() - self.flushed_at > FLUSH_SECONDS:
            self.flush()

    def picture(self, step, image):
        """Pictures have files of their own."""

    def flush(self):
        """Every line on disk, also after a power cut: before a checkpoint is written, which must not be ahead of it."""
        if not self.lines:
            return
        self.flushed_at = time.monotonic()
        with interrupts.defer_signals():  # between writing lines and forgetting them
            try:
                append(self.path, "".join(self.lines).encode("ascii"))
            except OSError as error:
                self.tell(error)
            else:
                self.lines.clear()
                self.told = False

    def tell(self, error):
        if not self.told:
            logger.warning("%s: cannot be written (%s); the run goes on", self.path, error.strerror or error)
        self.told = True

    def close(self):
        self.flush()


def line_of(step, figures):
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False) + "\n"


def append(path, content):
    """Bytes at the end of a file, all of them or none; OSError."""
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(28, os.strerror(28), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def cut(path, step):
    """Keep the lines of steps up to this one: the file is written anew beside its name, and renamed."""
    if not path.exists():
        return
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with open(path, "rb") as lines, open(beside, "wb") as kept:
            kept.writelines(line for line in lines if step_of(line) <= step)
            kept.flush()
            os.fsync(kept.fileno())
        if beside.stat().st_size != path.stat().st_size:
            os.replace(beside, path)
    finally:
        if beside.exists():
            beside.unlink()


def step_of(line):
    """The step of a line; infinite where it is none of ours, or cut short."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        found = None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else math.inf
