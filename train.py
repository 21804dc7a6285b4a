"""Trains a DALL-E: build → loop → save, the story of a run.

    python train.py --config NAME [flags]

What a step does on which machine is the backends' business; what a run is made of, training/'s; flags and
configurations are args.py's.
"""

import contextlib
import logging
import math
import time

import args
import log
from utils import interrupts

logger = logging.getLogger("minidalle")

SKIPS_IN_A_ROW = 10  # updates left out one after the other, after which nothing will come of the run


def main(argv=None):
    settings = args.train_arguments(argv)
    log.set_up()
    with log.sigterm_as_ctrl_c():  # around the last words, too
        try:
            with log.exit_on_bad_input():
                from training.run import build

                run = build(settings)
                if settings.dry_run:
                    from training import dry_run

                    return dry_run.tell(run)
        except KeyboardInterrupt:
            print("stopped before the first step")
            raise SystemExit(130) from None
        try:
            with log.exit_on_bad_input(), report_lost_samples(run):
                train(run)
        except KeyboardInterrupt:
            stopped(run)
        finally:
            close(run)


def train(run):
    """Updates to the end, with validation, checkpoints and pictures on the way. Before the first lies compilation."""
    from data.order import RunOrder

    progress = log.Progress(run.steps, run.step, run.backend.samples_per_step * run.backend.world_size)
    order = RunOrder(run.batches, run.step, run.steps)
    compiled, skips = False, 0
    # Several processes stop after the same update, so that none waits for another that has left.
    with contextlib.closing(
        progress
    ), interrupts.defer_signals() if run.backend.world_size > 1 else contextlib.nullcontext():
        for batch in run.backend.loader(run.dataset, order) if len(order) else ():
            if not compiled:
                compile(run, batch)
                progress.compiled()
                compiled = True
                if run.backend.compile_only:
                    logger.info("compiled only, as --compile-only says")
                    break
                if not run.post_update_done:  # a stop came before all that follows an update was done
                    after_update(run)
            epoch, lr = run.epoch(), run.schedule.at(run.step, run.epoch())
            with interrupts.defer_signals():  # an update counts, and is written down, as soon as it is made
                losses = update(run, batch, lr)
                skips = 0 if finite(losses) else skips + 1
                run.skipped += skips > 0
                run.step += 1
                run.post_update_done = False
                rate = progress.step(run.step, epoch, losses, lr, skipped=skips > 0)
                run.trackers.log_update(run.step, epoch, lr, losses, rate, skipped=skips > 0)
                if not skips:
                    run.epoch_loss = run.epoch_loss[0] + losses["total"], run.epoch_loss[1] + 1
            if skips == SKIPS_IN_A_ROW or (skips and "grad_norm" not in losses):
                raise ValueError(
                    f"the loss is no longer finite at step {run.step}; use a lower --learning-rate, or "
                    f"--max-grad-norm 1{last_file(run)}"
                )
            with progress.paused():
                after_update(run, changed=not skips)
            if run.backend.any_process(interrupts.signal_pending()):
                raise KeyboardInterrupt
        if not run.post_update_done:  # the same after the last update
            after_update(run)


def compile(run, batch):
    started = time.monotonic()
    run.trainer.compile(batch)
    logger.info("Compiled model in %.3f secs", time.monotonic() - started)


def update(run, batch, lr):
    """One update; a process that meets the end of another saves what it has."""
    import torch

    from data.order import random_bits

    run.trainer.set_lr(lr)
    # Dropout draws from the seed, the step and the process alone: nothing to remember, whenever a run is stopped.
    torch.manual_seed(random_bits(run.settings.random_seed, run.step, run.backend.rank) >> 1)
    try:
        return run.trainer.step(batch)
    except ConnectionError as error:
        raise ConnectionError(f"{error}{saved(run)}") from None


def finite(losses):
    return all(map(math.isfinite, losses.values()))


def after_update(run, changed=True):
    """What comes before the next update: losses of held-out pairs, an epoch's end, checkpoints and pictures, where they
    are due.

    A stop may come before the first two are done, together: the file of that moment says so, and a run that goes on
    from it begins here.
    """
    from training import samples, validation
    from training.checkpoints import BEST, save

    with_epochs = run.settings.lr_scheduler == "ReduceLROnPlateau" and run.epoch_begins()
    due = run.step % run.settings.validation_steps == 0 or run.step == run.steps or with_epochs
    losses = None
    if run.validation_set is not None and due:
        losses = validation.validate(run.trainer, run.backend, run.validation_set)
    with interrupts.defer_signals():
        best = losses is not None and validated(run, losses)
        if run.epoch_begins():
            epoch_ended(run)
        run.post_update_done = True
        if best:  # only now: what a file holds is what the next update begins with
            save(run, BEST)
    name = run.folder.due(run) if changed or run.step == run.steps else None
    if name and save(run, name) is None and run.step == run.steps:
        not_saved(run)
    if samples.due(run):
        samples.draw(run)


def validated(run, losses):
    """Note the losses of held-out pairs → whether they are the best so far."""
    run.validation_loss = losses["total"]
    log.log_validation(run.step, losses)
    run.trackers.log_validation(run.step, losses)
    best = run.best_loss is None or losses["total"] < run.best_loss
    if best:
        run.best_loss = losses["total"]
    return best


def epoch_ended(run):
    """The schedule learns of the held-out loss, or else of the mean of the training losses."""
    total, count = run.epoch_loss
    mean = total / count if count else None
    loss = mean if run.validation_set is None else run.validation_loss
    if loss is not None:
        run.schedule.epoch_ended(loss)
    run.epoch_loss = (0.0, 0)


def stopped(run):
    """Ctrl-C or SIGTERM came: save, and say how to go on."""
    how = saved(run)
    if not run.backend.rank:
        print(f"stopped after step {run.step}{how}" if how else "stopped")
    raise SystemExit(130) from None


def saved(run):
    """Save a run that ends here → how to go on, as the end of a line; "" where nothing was written."""
    from training.checkpoints import save

    path = save(run, f"dalle_step_{run.step}.pt")
    return f"; go on with --pretrained-checkpoint {path}" if path else ""


def not_saved(run):
    if run.folder.path is not None and not run.backend.rank:
        raise OSError(f"the run ended at step {run.step}, but its last checkpoint was not written{last_file(run)}")


def close(run):
    """Whatever ended the run: the last lines, the last plot, and trackers told that it is over."""
    with log.exit_on_interrupt():
        if run.metrics is not None:
            run.metrics.flush()
            run.plot.draw(at_end=True)
        run.trackers.close()


@contextlib.contextmanager
def report_lost_samples(run):
    """Within: a run that gets no more samples saves what it has; every run tells how many pictures it lost."""
    from backends.base import SamplesLost

    try:
        yield
    except SamplesLost as error:
        raise SamplesLost(f"{error}{saved(run) if run.step else ''}") from None
    finally:
        log.pictures_lost(run.dataset.lost)


def last_file(run):
    return f"; the last good checkpoint is {run.folder.written[-1]}" if run.folder.written else ""


if __name__ == "__main__":
    main()
