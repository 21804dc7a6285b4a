"""Advance a run update by update, so that it can stop at any moment and resume exactly.

An update, its count and its log line are never separated by a signal. Validation and the end of an epoch may be
interrupted: the checkpoint then records that they are still to be done, and the resumed run begins with them. The
samples of an update are a function of seed and step, and its learning rate of step, epoch and earlier losses.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch

import log
from backends import OutOfMemory, memory_explained
from backends.base import DeviceLost, SamplesLost
from data.files import count
from data.loader import epoch_order, random_bits
from training import checkpoints, validation
from utils.interrupts import defer_signals, signal_pending
from utils.optimization import cosine

if TYPE_CHECKING:
    from training.run import Run

MAX_SKIPS = 10  # skipped updates in a row after which the run ends
RISES = 3  # of the validation loss in a row that are no accident

logger = logging.getLogger("minidalle")


@contextlib.contextmanager
def open_loop(run: Run) -> Iterator[Loop]:
    """Yield a run's loop; when the block ends for whatever reason, save what is worth saving and close the trackers."""
    loop = Loop(run)
    # Several processes stop after the same update, so that none waits for another that has left.
    deferral = defer_signals() if run.backend.world_size > 1 else contextlib.nullcontext()
    try:
        with contextlib.closing(loop.progress), deferral, memory_explained(describe_less(run)):
            yield loop
    except KeyboardInterrupt:
        hint = _save_at_stop(run)
        if not run.backend.rank:
            print(f"stopped after step {run.step}{hint}" if hint else "stopped")
        raise SystemExit(130) from None
    except (SamplesLost, ConnectionError, OutOfMemory) as error:
        raise type(error)(f"{error}{_save_at_stop(run) if run.step else ''}") from None
    except DeviceLost as error:
        raise DeviceLost(f"{error}{checkpoints.describe_last(run)}") from None
    finally:
        if run.dataset.lost:
            logger.warning("%s could not be read; other images were used instead", count(run.dataset.lost, "image"))
        run.trackers.close()
        run.trainer.close()


class Loop:
    """The updates of a run that are still to be made."""

    def __init__(self, run: Run):
        self.run = run
        self.skips = 0  # in a row
        self.overfitting = OverfittingMonitor()
        self.progress = log.Progress(run.steps, run.step, run.backend.samples_per_step * run.backend.world_size)

    def batches(self) -> Iterator[Any]:
        """Yield the batches of the remaining updates; compile the model before the first."""
        run = self.run
        order = RunOrder(run.batches, run.step, run.steps)
        compiled = False
        for batch in run.backend.loader(run.dataset, order) if len(order) else ():
            if not compiled:
                started = time.monotonic()
                run.trainer.compile(batch)
                logger.info("Compiled model in %.3f secs", time.monotonic() - started)
                self.progress.compiled()
                compiled = True
                if run.backend.compile_only:
                    logger.info("stopping here because of --compile-only")
                    return
                self._finish_interrupted()
            yield batch
        self._finish_interrupted()

    def update(self, batch: Any) -> Dict[str, float]:
        """Make one optimizer update and return its losses."""
        run = self.run
        run.trainer.set_lr(run.learning_rate())
        # Dropout depends only on seed, step and process, so no random state has to be stored.
        torch.manual_seed(random_bits(run.settings.random_seed, run.step, run.backend.rank) >> 1)
        return run.trainer.step(batch)

    def log(self, losses: Dict[str, float]) -> None:
        """Count and log the update that was just made; a non-finite one was skipped by the trainer."""
        run, epoch, lr = self.run, self.run.epoch(), self.run.learning_rate()
        skipped = not all(map(math.isfinite, losses.values()))
        self.skips = self.skips + 1 if skipped else 0
        run.skipped += skipped
        if not skipped:
            run.epoch_loss = run.epoch_loss[0] + losses["total"], run.epoch_loss[1] + 1
            self.overfitting.add(losses["total"])
        run.step += 1
        run.post_update_done = False
        rate = self.progress.step(run.step, epoch, losses, lr, skipped)
        more = {"epoch": epoch, "lr": lr, "samples_per_second": rate}
        if "grad_norm" in losses:
            more["grad_norm"] = losses["grad_norm"]
        if skipped:
            more["skipped"] = True
        run.trackers.log_losses("loss", run.step, losses, **more)

    def do_what_is_due(self, losses: Dict[str, float]) -> None:
        """Validate, save and sample if it is time to, and stop if a signal came or too many updates were skipped."""
        run = self.run
        if self.skips == MAX_SKIPS or (self.skips and "grad_norm" not in losses):
            raise ValueError(
                f"the loss is no longer finite at step {run.step}; use a lower --learning-rate, or "
                f"--max-grad-norm 1{checkpoints.describe_last(run)}"
            )
        with self.progress.paused():
            self._finish_update(changed=not self.skips)
        if run.backend.any_process(signal_pending()):
            raise KeyboardInterrupt

    def _finish_interrupted(self) -> None:
        if not self.run.post_update_done:
            self._finish_update()

    def _finish_update(self, changed: bool = True) -> None:
        run, settings, last = self.run, self.run.settings, self.run.step == self.run.steps
        plateau = settings.lr_scheduler == "ReduceLROnPlateau" and run.epoch_begins()
        losses = None
        if run.validation_set is not None and (run.step % settings.validation_steps == 0 or last or plateau):
            losses = validation.validate(run)
        with defer_signals():  # a checkpoint holds the outcome of both validation and epoch, or of neither
            best = losses is not None and self._log_validation(losses)
            if run.epoch_begins():
                run.end_epoch()
            run.post_update_done = True
            if best:  # saved only now, so that a run can resume from this file like from any other
                checkpoints.save(run, checkpoints.BEST)
        if changed or last:
            checkpoints.save_if_due(run)
        every = 0 if run.generated else settings.sample_steps
        if every and (run.step % every == 0 or last):
            validation.write_samples(run)

    def _log_validation(self, losses: Dict[str, float]) -> bool:
        run, total = self.run, losses["total"]
        logger.info(
            "step %d validation: total %.4f text %.4f image %.4f perplexity %.2f",
            *(run.step, total, losses["text"], losses["image"], losses["perplexity"]),
        )
        run.trackers.log_losses("held-out", run.step, losses, **{"held-out/perplexity": losses["perplexity"]})
        best = run.best_loss is None or total < run.best_loss
        run.validation_loss = total
        run.best_loss = total if best else run.best_loss
        if self.overfitting.validated(total):
            logger.warning(
                "the validation loss rises while the training loss falls: the model memorizes its images; %s is from "
                "before. More images, --ff-dropout 0.1 and fewer --max-steps help; evaluate.py --nearest shows copies",
                checkpoints.BEST,
            )
        return best


def describe_less(run: Run) -> str:
    """Say which flags make the same updates with less memory."""
    settings, size = run.settings, run.settings.batch_size
    less = [] if settings.recompute else ["--recompute"]
    if size > 1:
        smaller = max(rows for rows in range(1, size // 2 + 1) if size % rows == 0)
        accumulation = settings.gradient_accumulation * size // smaller
        less.insert(0, f"--batch-size {smaller} --gradient-accumulation {accumulation}")
    if not less:
        return "the model is too large for this device; --shard divides it among several"
    return f"{' or '.join(less)} makes the same updates with less"


def _save_at_stop(run: Run) -> str:
    """Save a run that ends early and return how to resume it, as the end of a sentence ("" if nothing was written)."""
    path = checkpoints.save(run, run.folder.unused_name(f"dalle_step_{run.step}.pt"))
    return f"; resume with --pretrained-checkpoint {path}" if path else ""


class OverfittingMonitor:
    """Notice that the validation loss rises while the training loss falls, validation after validation."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0
        self._means: List[Tuple[float, float]] = []  # training and validation loss of the latest validations
        self._warned = False

    def add(self, loss: float) -> None:
        """Take the training loss of an update."""
        self._sum, self._count = self._sum + loss, self._count + 1

    def validated(self, loss: float) -> bool:
        """Take a validation loss; return True once, when it has risen RISES times in a row while training's fell."""
        if self._count:
            self._means = [*self._means, (self._sum / self._count, loss)][-RISES - 1 :]
            self._sum, self._count = 0.0, 0
        steps = list(zip(self._means, self._means[1:]))
        overfits = len(steps) == RISES and all(after[0] < before[0] and after[1] > before[1] for before, after in steps)
        warn, self._warned = overfits and not self._warned, self._warned or overfits
        return warn


class EpochOrder:
    """The batches of every epoch, as lists of (epoch, index).

    The order of an epoch is a permutation that depends on (seed, epoch) alone. It is cut into global batches of
    batch_size × world_size samples, and process `rank` takes its own batch_size of each: N processes together see the
    batches that one process with an N times larger batch_size sees. The rest of an epoch is dropped.

    Raises:
        ValueError: the set is smaller than one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int = 42, rank: int = 0, world_size: int = 1):
        self.global_batch = batch_size * world_size
        if num_samples < self.global_batch:
            raise ValueError(f"one step takes {self.global_batch} samples, but the set has {num_samples}")
        self.num_samples, self.batch_size, self.seed, self.rank = num_samples, batch_size, seed, rank
        self.batches_per_epoch = num_samples // self.global_batch
        self._latest: Optional[Tuple[int, np.ndarray]] = None  # epoch and order used last
        self.enter(0, 0)

    def enter(self, step: int, samples_seen: int) -> None:
        """Let update `step` continue after the first `samples_seen` of the run, as `samples_seen` counts them."""
        epoch, taken = divmod(samples_seen, self.num_samples)
        if self.num_samples - taken < self.global_batch:  # too few are left in this epoch
            epoch, taken = epoch + 1, 0
        self._entered = step, epoch, taken
        self._left = (self.num_samples - taken) // self.global_batch  # batches in that epoch

    def place(self, step: int) -> Tuple[int, int]:
        """Return the epoch of update `step`, and how many samples of the epoch come before it."""
        first, epoch, taken = self._entered
        if step - first < self._left:
            return epoch, taken + (step - first) * self.global_batch
        epochs, number = divmod(step - first - self._left, self.batches_per_epoch)
        return epoch + 1 + epochs, number * self.global_batch

    def samples_seen(self, step: int) -> int:
        """Return how many samples come before update `step`, with those that were dropped at the ends of epochs."""
        epoch, taken = self.place(step)
        return epoch * self.num_samples + taken

    def equivalent_step(self, step: int) -> int:
        """Return the number that update `step` would have if the whole run had had batches of this size."""
        epoch, taken = self.place(step)
        return epoch * self.batches_per_epoch + taken // self.global_batch

    def steps_of(self, epochs: int) -> int:
        """Return the number of updates until `epochs` epochs have ended."""
        first, epoch, _ = self._entered
        return first + self._left + (epochs - epoch - 1) * self.batches_per_epoch if epochs > epoch else first

    def batch(self, epoch: int, taken: int) -> List[Tuple[int, int]]:
        """Return this process's keys (epoch, index) of the global batch after the first `taken` samples of an epoch."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, epoch_order(self.num_samples, self.seed, epoch)
        start = taken + self.rank * self.batch_size
        return [(epoch, index) for index in self._latest[1][start : start + self.batch_size].tolist()]


class RunOrder(Sequence):
    """The batches of a run from update `first` to before update `last`, epoch after epoch.

    A picklable sequence, so that a loader in another process can start anywhere in it.
    """

    def __init__(self, batches: EpochOrder, first: int, last: int):
        self.batches, self.first, self.last = batches, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, place: Any) -> List[Tuple[int, int]]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.batches.batch(*self.batches.place(self.first + place))


def multi_step(epoch: int, epochs: int, late: float = 0.1) -> float:
    """Warm up linearly over the first fifth of the epochs, then 1, then `late` for the second half of the rest."""
    warmup = int(0.2 * epochs)
    if epoch < warmup:
        return (1 + epoch) / (1 + warmup)
    return 1.0 if epoch < warmup + (epochs - warmup) / 2 else late


def trapezoid(step: int, steps: int, warmup: int) -> float:
    """Warm up linearly over `warmup` steps, then 1, then fall linearly towards 0 over the second half of the run."""
    return min((1 + step) / (1 + warmup), 1.0, 2 * (steps - step) / steps)


class LearningRate:
    """The learning rate of each update of a run of `steps` updates in `epochs` epochs.

    ReduceLROnPlateau (factor 0.5, patience 10, cooldown 10, minimum 1e-6) depends on the losses given to epoch_ended,
    the others only on step and epoch.
    """

    steps = epochs = 1

    def __init__(self, name: str, peak: float, warmup_steps: int = 0):
        """Take a value of --lr-scheduler and its flags."""
        self.name, self.peak, self.warmup_steps = name, peak, warmup_steps
        # torch's scheduler does the bookkeeping, on a parameter that is not trained.
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=peak)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, factor=0.5, patience=10, cooldown=10, min_lr=1e-6
        )

    def at(self, step: int, epoch: int) -> float:
        """Return the learning rate of update `step` in `epoch`, both from 0."""
        if self.name in ("multi_step", "constant"):
            return self.peak * multi_step(epoch, self.epochs, late=0.1 if self.name == "multi_step" else 1.0)
        if self.name in ("cosine", "trapezoid"):
            factor = cosine if self.name == "cosine" else trapezoid
            return self.peak * factor(step, self.steps, self.warmup_steps)
        return self._holder.param_groups[0]["lr"]

    def epoch_ended(self, loss: float) -> None:
        """Take the validation loss, or the mean training loss, of the epoch that ended."""
        if self.name == "ReduceLROnPlateau":
            self._plateau.step(loss)

    def state_dict(self) -> Dict[str, Any]:
        """Return the state in plain values."""
        plain = (int, float, list)
        state = {key: value for key, value in self._plateau.state_dict().items() if isinstance(value, plain)}
        return {"name": self.name, "lr": self._holder.param_groups[0]["lr"], "plateau": state}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load the state of a scheduler of the same name; ignore that of another.

        Of the reference application's plateau only the rate counts: it compared losses of single micro-batches.
        """
        if state.get("name") == self.name:
            self._holder.param_groups[0]["lr"] = state["lr"]
            self._plateau.load_state_dict(state["plateau"])
        elif self.name == "ReduceLROnPlateau" and isinstance(state.get("_last_lr"), list):
            self._holder.param_groups[0]["lr"] = float(state["_last_lr"][0])
