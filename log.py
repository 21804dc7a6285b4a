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

LOG = logging.getLogger("minidalle")
LINE_SECONDS = 10  # at most one log line of losses in so much time; the bar moves with every step


class _AroundTheBar(logging.StreamHandler):
    """Writes a line above a progress bar that is being drawn, not into it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def set_up(level=logging.INFO):
    """Send the program's log to stdout, with the time. Further calls change the level only."""
    LOG.setLevel(level)
    if not LOG.handlers:
        handler = _AroundTheBar()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
        LOG.propagate = False


@contextlib.contextmanager
def bad_input_exits():
    """Within: ValueError and OSError, raised for bad input, end the program with one line and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        LOG.debug("where it was noticed:", exc_info=True)
        program = sys.argv[0].rpartition("/")[2]
        print(f"{program}: error: {reason(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def reason(error):
    """What an exception says, in one line, without Python's number of the error."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(said.split())


@contextlib.contextmanager
def interrupt_exits():
    """Within: Ctrl-C ends the program with one line and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def termination_interrupts():
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
        LOG.warning("%d %s could not be read while training; others took the place", count, noun)


def weights_and_biases(settings):
    """A run at Weights & Biases that records `settings`; None without --wandb. ValueError where it cannot begin."""
    if not settings.wandb:
        return None
    try:
        from wandb import errors, init
    except ImportError:  # also where `wandb` is the folder that an earlier run left
        raise ValueError(
            "--wandb: the package wandb is not installed; pip install wandb, or leave the flag out"
        ) from None
    try:
        return init(project=settings.wandb_project_name, name=settings.wandb_run_name, config=vars(settings))
    except errors.Error as error:  # no login, no network
        raise ValueError(f"--wandb: {error}; WANDB_MODE=offline records without a login") from None


def validated(step, losses, tracker=None):
    """The line of a validation after update `step`; losses: total, text, image and perplexity."""
    LOG.info(
        "step %d held-out: total %.4f text %.4f image %.4f perplexity %.2f",
        *(step, losses["total"], losses["text"], losses["image"], losses["perplexity"]),
    )
    if tracker is not None:
        tracker.log({f"held-out/{name}": value for name, value in losses.items()}, step)


class Progress:
    """Bar and log lines of a run: losses, learning rate, samples a second since the last line. The same goes to
    `tracker` (a Weights & Biases run or None) with every step.
    """

    def __init__(self, steps, first_step, samples_per_step, tracker=None):
        self.steps, self.samples_per_step, self.tracker = steps, samples_per_step, tracker
        quiet = None if LOG.isEnabledFor(logging.INFO) else True  # None: no bar where there is no terminal
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", desc="training", disable=quiet, dynamic_ncols=True
        )
        self.last_line, self.steps_since = time.monotonic(), 0

    def step(self, step, epoch, losses, lr):
        """After update `step` (counted from 1); losses: total, text and image."""
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {losses['total']:.3f} (text {losses['text']:.3f}, image {losses['image']:.3f}), lr {lr:.2e}"
        )
        if self.tracker is not None:
            self.tracker.log(
                {"lr": lr, "epoch": epoch, **{f"loss/{name}": loss for name, loss in losses.items()}}, step
            )
        self.steps_since += 1
        seconds = time.monotonic() - self.last_line
        if seconds < LINE_SECONDS and step != self.steps:
            return
        LOG.info(
            "step %d/%d epoch %d loss: %.3f text %.3f image %.3f lr %.2e throughput: %.2f samples/sec",
            step,
            self.steps,
            epoch,
            losses["total"],
            losses["text"],
            losses["image"],
            lr,
            self.steps_since * self.samples_per_step / max(seconds, 1e-9),
        )
        self.last_line, self.steps_since = time.monotonic(), 0

    def skipped(self, step):
        self.bar.update()
        LOG.warning("step %d: loss or gradient is not finite, the update is left out", step)

    def close(self):
        self.bar.close()
        if self.tracker is not None:
            self.tracker.finish()
