"""The logger, and a run's progress with the lines that benchmarks.yml reads.

Log lines go to stdout, the progress bar to stderr. benchmarks.yml looks for `throughput: X samples/sec`
(images/sec in generate.py), `loss: X` and `Compiled model in X secs`.
"""

import contextlib
import logging
import sys
import time
from typing import Dict, Iterator

from tqdm import tqdm

from utils.command_line import discard_output

LINE_SECONDS = 10  # between log lines of losses, at least; the bar moves with every update

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
        self.compiled()
        self.last_line = self.began

    def compiled(self) -> None:
        """Start the clock: what came before the first update says nothing about the time a run takes."""
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
        """Remove the bar."""
        self.bar.close()
