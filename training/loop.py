"""Advance a run update by update; it can stop at any moment and resume exactly.

An update, its count and its log line are never separated by a signal. Validation and the end of an epoch may be
interrupted: the checkpoint then records that they are still to be done, and the resumed run begins with them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Tuple

import torch

import log
from backends import OutOfMemory, explain_out_of_memory
from backends.base import DeviceLost
from data.files import count
from data.loader import RunOrder, SamplesLost, random_bits
from training import checkpoints, validation
from utils.files import defer_signals, signal_pending

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
        with contextlib.closing(loop.progress), deferral, explain_out_of_memory(describe_less(run)):
            yield loop
    except KeyboardInterrupt:
        hint = _save_at_stop(run)
        if not run.backend.rank:
            print(f"stopped after step {run.step}{hint}" if hint else "stopped")
        raise SystemExit(130) from None
    except (SamplesLost, ConnectionError, OutOfMemory) as error:
        # A sharded state needs all processes, and the others do not know that this one stops.
        hint = checkpoints.describe_last(run) if run.settings.shard else _save_at_stop(run) if run.step else ""
        raise type(error)(f"{error}{hint}") from None
    except DeviceLost as error:
        raise DeviceLost(f"{error}{checkpoints.describe_last(run)}") from None
    finally:
        if run.dataset.lost:
            logger.warning("%s could not be read; other images were used instead", count(run.dataset.lost, "image"))
        run.trackers.close()
        run.trainer.close()
        run.folder.claim.close()


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
                self.progress.start_clock()
                compiled = True
                if run.backend.compile_only:
                    logger.info("stopping here because of --compile-only")
                    return
                self._finish_interrupted()
            yield batch
        self._finish_interrupted()

    def update(self, batch: Any) -> Dict[str, float]:
        run = self.run
        run.trainer.set_lr(run.learning_rate())
        # Dropout depends only on seed, step and process, so no random state has to be stored.
        torch.manual_seed(random_bits(run.settings.random_seed, run.step, run.backend.rank) >> 1)
        return run.trainer.step(batch)

    def record(self, losses: Dict[str, float]) -> None:
        """Count and log the update that was just made; the trainer skipped it if a loss is not finite."""
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
