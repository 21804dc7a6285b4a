"""The logger, a run's progress with the lines that benchmarks.yml reads, and metrics.jsonl with its plot loss.png.

Log lines go to stdout, the progress bar to stderr. benchmarks.yml looks for `throughput: X samples/sec`
(images/sec in generate.py), `loss: X` and `Compiled model in X secs`. A line of metrics.jsonl is an object with `step`,
the number of updates so far, and the metrics of that update or validation; null stands for a value that is not finite.
Imports nothing heavy, because commands import this before they check their flags.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Deque, Dict, Iterator, List, Sequence, Tuple

from tqdm import tqdm

from utils.command_line import discard_output
from utils.errors import describe_error
from utils.files import atomic_write, defer_signals

if TYPE_CHECKING:
    from PIL.Image import Image

LINE_SECONDS = 10  # between log lines of losses, at least; the bar moves with every update
FLUSH_SECONDS = 5  # between writes of metrics.jsonl, at least
MAX_LINES = 100_000  # that wait in memory while the disk is full
PLOT_SHARE = 0.01  # of a run's time, at most, for plots
PLOT_POINTS = 5000  # updates shown of a long run
COLORS = {"text": "#4f9a63", "image": "#d9772b", "total": "#1f4e8c"}
LOG_SCALE_FROM = 8  # ratio of the largest to the smallest loss

Metrics = Dict[str, Any]

logger = logging.getLogger("minidalle")


class _AboveTheBar(logging.StreamHandler):
    """Write log lines above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()  # so that what is logged while the program ends raises no further error
            raise


def set_up(level: int = logging.INFO) -> None:
    """Send the program's log to stdout, with the time; later calls only change the level."""
    logger.setLevel(level)
    if not logger.handlers:
        handler = _AboveTheBar()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


class Progress:
    """Progress bar and log lines of a run: losses, learning rate, samples a second, and the time left.

    Samples a second are measured over the last LINE_SECONDS or a little more, without the time that validation,
    checkpoints and samples take. The time left includes it.
    """

    def __init__(self, steps: int, first_step: int, samples_per_step: int):
        self.steps, self.first_step, self.samples_per_step = steps, first_step, samples_per_step
        hidden = None if logger.isEnabledFor(logging.INFO) else True  # None: hidden if stderr is no terminal
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=hidden,
            dynamic_ncols=True,
            smoothing=0,  # estimate the time left from the mean of the whole run
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self.marks = [(0.0, first_step)]  # (seconds of training, step) at the last two log lines
        self.start_clock()
        self.last_line = self.began

    def start_clock(self) -> None:
        """Measure time from now on: compilation before the first update says nothing about the time a run takes."""
        self.began = self.updated = time.monotonic()
        self.not_training = 0.0  # seconds
        self.bar.unpause()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude this block's time from that of the updates."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.not_training += seconds
            self.updated += seconds

    def step(self, step: int, epoch: int, losses: Dict[str, float], lr: float, skipped: bool = False) -> float:
        """Show update `step`, counted from 1, and return its samples a second; losses: total, text and image."""
        now = time.monotonic()
        seconds, self.updated = now - self.updated, now
        trained = now - self.began - self.not_training
        trained_then, step_then = self.marks[0]
        throughput = (step - step_then) * self.samples_per_step / max(trained - trained_then, 1e-9)
        self.bar.set_postfix_str(
            f"{throughput:,.1f} samples/s, loss {losses['total']:.3f} "
            f"(text {losses['text']:.3f}, image {losses['image']:.3f}), lr {lr:.2e}",
            refresh=False,
        )
        self.bar.update()
        if skipped:
            logger.warning("step %d: loss or gradient is not finite, update skipped", step)
        elif now - self.last_line >= LINE_SECONDS or step == self.steps:
            left = (self.steps - step) * (now - self.began) / (step - self.first_step)
            logger.info(
                "step %d/%d epoch %d loss: %.3f text %.3f image %.3f lr %.2e throughput: %.2f samples/sec, %s left",
                *(step, self.steps, epoch, losses["total"], losses["text"], losses["image"], lr, throughput),
                tqdm.format_interval(left),
            )
            self.last_line = now
            self.marks = [*self.marks, (trained, step)][-2:]
        return self.samples_per_step / max(seconds, 1e-9)

    def close(self) -> None:
        self.bar.close()


class Tracker:
    """Something that records metrics and images; a subclass overrides what it needs, the rest does nothing."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics after update `step`: ints, floats or bools."""

    def log_image(self, step: int, image: Image) -> None:
        """Record the sample images of a step."""

    def flush(self) -> None:
        """Write everything to disk; a checkpoint follows."""

    def close(self) -> None:
        """Write everything; the run is over."""


class Trackers(Tracker):
    """All trackers of a run; if one raises an error, this is logged once and the run continues without it."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self.trackers = list(trackers)

    def log(self, step: int, metrics: Metrics) -> None:
        self._each("log", step, metrics)

    def log_losses(self, group: str, step: int, losses: Dict[str, float], **more: Any) -> None:
        """Record the losses of an update (group "loss") or of a validation ("held-out"), and further metrics."""
        self.log(step, {**{f"{group}/{name}": losses[name] for name in ("total", "text", "image")}, **more})

    def log_image(self, step: int, image: Image) -> None:
        self._each("log_image", step, image)

    def flush(self) -> None:
        self._each("flush")

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in self.trackers[:]:
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # other people's packages may raise anything
                self.trackers.remove(tracker)
                reason = describe_error(error)
                logger.warning("%s: %s; the run continues without it", type(tracker).__name__, reason)


class MetricsFile(Tracker):
    """metrics.jsonl, with loss.png next to it; lines after `step`, and one cut short by a kill, are removed first.

    If the file cannot be written, this is logged once; the lines wait until there is room again.
    """

    def __init__(self, path: Path, step: int):
        self.path, self.plot_path = path, path.with_name("loss.png")
        self.lines: Deque[str] = collections.deque(maxlen=MAX_LINES)
        self.flushed_at = self.plot_due_at = time.monotonic()
        self.writable = self.can_plot = True
        try:
            _truncate_after(path, step)
        except OSError as error:
            self._log_error(error)

    def log(self, step: int, metrics: Metrics) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.lines.append(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        if time.monotonic() - self.flushed_at > FLUSH_SECONDS:
            self._write()

    def flush(self) -> None:
        self._write()
        if time.monotonic() >= self.plot_due_at:
            self._plot()

    def close(self) -> None:
        self._write()
        self._plot()

    def _write(self) -> None:
        if not self.lines:
            return
        self.flushed_at = time.monotonic()
        with defer_signals():  # lines that are written are also forgotten
            try:
                _append(self.path, "".join(self.lines).encode("ascii"))
            except OSError as error:
                self._log_error(error)
            else:
                self.lines.clear()
                self.writable = True

    def _log_error(self, error: OSError) -> None:
        if self.writable:
            logger.warning("%s: cannot be written (%s); the run continues", self.path, error.strerror or error)
        self.writable = False

    def _plot(self) -> None:
        if not self.can_plot or not self.path.exists():
            return
        started = time.monotonic()
        try:
            plot_metrics(self.path, self.plot_path)
        except Exception as error:  # a run does not need its plots
            reason = "matplotlib is not installed" if isinstance(error, ImportError) else describe_error(error)
            logger.warning("no %s: %s", self.plot_path, reason)
            self.can_plot = isinstance(error, OSError)  # a disk may have room again
        now = time.monotonic()
        self.plot_due_at = now + (now - started) / PLOT_SHARE


def _append(path: Path, content: bytes) -> None:
    """Append all bytes to a file, or none of them if the disk is full."""
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(28, os.strerror(28), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _truncate_after(path: Path, step: int) -> None:
    """Remove the lines of later steps and those that are damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        with atomic_write(path, sync=True) as file:
            file.writelines(kept)


def _step_of(line: bytes) -> float:
    try:
        metrics = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        metrics = None
    step = metrics.get("step") if isinstance(metrics, dict) else None
    return step if isinstance(step, int) else math.inf


def read_curves(path: Path, points: int = PLOT_POINTS) -> Dict[str, Tuple[List[int], List[float]]]:
    """Read the steps and values of each metric; NaN for null.

    Of a long run about `points` updates are read, evenly spaced, and all validations and skipped updates.
    """
    curves: Dict[str, Tuple[List[int], List[float]]] = {}
    with open(path, "rb") as lines:
        count = sum(1 for _ in lines)
        lines.seek(0)
        for number, line in enumerate(lines):
            chosen = number % (1 + count // points) == 0 or number == count - 1
            if not (chosen or b'"held-out/' in line or b'"skipped"' in line):
                continue
            try:
                metrics = json.loads(line)
                step = metrics.pop("step")
            except (ValueError, KeyError, AttributeError):  # cut short
                continue
            for name, value in metrics.items():
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else value)
    return curves


def smooth(values: Sequence[float]) -> Any:
    """Return means over a Hann window of a fifteenth of the curve, an array."""
    import numpy as np

    window = np.hanning(len(values) // 30 * 2 + 3)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def plot_metrics(metrics_path: Path, path: Path) -> None:
    """Plot training and validation losses, and the learning rate below; ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(metrics_path)
    figure = Figure(figsize=(10, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (5, 1)})
    shown: List[float] = []
    for name, color in COLORS.items():
        for group, style, label in (("loss", "-", name), ("held-out", "--", f"{name}, validation")):
            known = [pair for pair in zip(*curves.get(f"{group}/{name}", ([], []))) if math.isfinite(pair[1])]
            if known:
                steps, values = zip(*known)
                line = smooth(values) if group == "loss" else values
                losses.plot(steps, line, style, color=color, linewidth=1.8, label=f"{label}: {line[-1]:.3g}")
                shown.extend(line)
    skipped, _ = curves.get("skipped", ([], []))
    if skipped:
        at_bottom = {"transform": losses.get_xaxis_transform(), "label": f"{len(skipped)} skipped updates"}
        losses.plot(skipped, [0.01] * len(skipped), "|", color="#b00020", **at_bottom)
    if shown:
        log_scale = min(shown) > 0 and max(shown) > LOG_SCALE_FROM * min(shown)
        losses.set_yscale("log" if log_scale else "linear")
        losses.legend(frameon=False)
    losses.set_ylabel("loss")
    rates.plot(*curves.get("lr", ((), ())), color="#555555")
    rates.set(ylim=(0, None), ylabel="learning rate", xlabel="updates")
    for axes in (losses, rates):
        axes.grid(color="#e3e3e3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
