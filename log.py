"""The logger, the progress bar with the lines that benchmarks.yml reads, and how bad input ends a command.

Log lines go to stdout, the bar and errors to stderr. The lines read by regular expression are
`throughput: X samples/sec` (of generate.py: images/sec), `loss: X` and `Compiled model in X secs`.
"""

import contextlib
import logging
import signal
import sys
import time

from tqdm import tqdm

logger = logging.getLogger("minidalle")
LINE_SECONDS = 10  # at most one log line of losses in so much time; the bar moves with every step


class _AroundTheBar(logging.StreamHandler):
    """Writes a line above a progress bar that is being drawn, not into it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def set_up(level=logging.INFO):
    """Send the program's log to stdout, with the time. Further calls change the level only."""
    logger.setLevel(level)
    if not logger.handlers:
        handler = _AroundTheBar()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


@contextlib.contextmanager
def exit_on_bad_input():
    """Within: ValueError and OSError, raised for bad input, end the program with one line and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        logger.debug("where it was noticed:", exc_info=True)
        program = sys.argv[0].rpartition("/")[2]
        print(f"{program}: error: {describe_error(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def describe_error(error):
    """What an exception says, in one line, without Python's number of the error."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(said.split())


@contextlib.contextmanager
def exit_on_interrupt():
    """Within: Ctrl-C ends the program with one line and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def sigterm_as_ctrl_c():
    """Within: SIGTERM, by which launchers and schedulers end a run, is taken like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def pictures_lost(count):
    """The line at a run's end about pictures that went bad while it trained."""
    if count:
        noun = "picture" if count == 1 else "pictures"
        logger.warning("%d %s could not be read while training; others took the place", count, noun)


def log_validation(step, losses):
    """The line of a validation after update `step`; losses: total, text, image and perplexity."""
    logger.info(
        "step %d held-out: total %.4f text %.4f image %.4f perplexity %.2f",
        *(step, losses["total"], losses["text"], losses["image"], losses["perplexity"]),
    )


class Progress:
    """Bar and log lines of a run: losses, learning rate, samples a second, and the time that is left.

    Samples a second are those of the last LINE_SECONDS or somewhat more, without what lies between updates: validation,
    checkpoints, pictures. The time left counts that in.
    """

    def __init__(self, steps, first_step, samples_per_step):
        self.steps, self.first_step, self.samples_per_step = steps, first_step, samples_per_step
        quiet = None if logger.isEnabledFor(logging.INFO) else True  # None: no bar where there is no terminal
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=quiet,
            dynamic_ncols=True,
            smoothing=0,  # the time left by the mean of the run
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self.began = self.updated = self.last_line = time.monotonic()
        self.not_training = 0.0  # seconds
        self.marks = [(0.0, first_step)]  # seconds of training and step: at the last line, and at the one before

    @contextlib.contextmanager
    def paused(self):
        """Within: what is no update, so that it does not count as one's time."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.not_training += seconds
            self.updated += seconds

    def compiled(self):
        """The first update begins: what came before does not tell how long the run takes."""
        self.began = self.updated = time.monotonic()
        self.not_training = 0.0
        self.bar.unpause()

    def step(self, step, epoch, losses, lr, skipped=False):
        """After update `step` (counted from 1) → its samples a second; losses: total, text and image."""
        now = time.monotonic()
        seconds, self.updated = now - self.updated, now
        trained = now - self.began - self.not_training
        since, step_then = self.marks[0]
        throughput = (step - step_then) * self.samples_per_step / max(trained - since, 1e-9)
        self.bar.set_postfix_str(
            f"{throughput:,.1f} samples/s, loss {losses['total']:.3f} "
            f"(text {losses['text']:.3f}, image {losses['image']:.3f}), lr {lr:.2e}",
            refresh=False,
        )
        self.bar.update()
        if skipped:
            logger.warning("step %d: loss or gradient is not finite, the update is left out", step)
        if not skipped and (now - self.last_line >= LINE_SECONDS or step == self.steps):
            left = (self.steps - step) * (now - self.began) / (step - self.first_step)
            logger.info(
                "step %d/%d epoch %d loss: %.3f text %.3f image %.3f lr %.2e throughput: %.2f samples/sec, %s left",
                *(step, self.steps, epoch, losses["total"], losses["text"], losses["image"], lr, throughput),
                tqdm.format_interval(left),
            )
            self.last_line = now
            self.marks = [*self.marks, (trained, step)][-2:]
        return self.samples_per_step / max(seconds, 1e-9)

    def close(self):
        self.bar.close()
