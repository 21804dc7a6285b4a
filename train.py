"""Trains a DALL-E: build → loop → save, the story of a run.

    python train.py --config NAME [flags]

What a step does on which machine is the backends' business; what a run is made of, training/'s; flags and
configurations are args.py's.
"""

import contextlib
import math
import time

import args
import log
from utils import interrupts

SKIPS_IN_A_ROW = 20  # updates left out one after the other, after which nothing will come of the run


def main(argv=None):
    settings = args.train_arguments(argv)
    log.set_up()
    try:
        with log.bad_input_exits():
            from training.build import build

            run = build(settings)
            if settings.dry_run:
                from training import dry_run

                return dry_run.tell(run)
    except KeyboardInterrupt:
        print("stopped before the first step")
        raise SystemExit(130) from None
    with log.termination_interrupts():  # around the last words, too
        try:
            with log.bad_input_exits(), samples_accounted_for(run):
                train(run)
        except KeyboardInterrupt:
            stopped(run)


def train(run):
    """Updates to the end, with validation and checkpoints on the way. Before the first lies compilation."""
    from data.order import RunBatches
    from training.checkpoints import save

    progress = log.Progress(run.steps, run.step, run.backend.samples_per_step * run.backend.world_size, run.tracker)
    order = RunBatches(run.batches, run.step, run.steps)
    compiled, skips = False, 0
    # Several processes stop after the same update, so that none waits for another that has left.
    with interrupts.held() if run.backend.world_size > 1 else contextlib.nullcontext():
        for batch in run.backend.loader(run.dataset, order) if len(order) else ():
            if not compiled:
                compile(run, batch)
                compiled = True
            if run.backend.compile_only:
                log.LOG.info("compiled only, as --compile-only says")
                break
            epoch, lr = run.epoch(), run.schedule.at(run.step, run.epoch())
            with interrupts.held():  # an update counts as soon as it is made
                losses = update(run, batch, lr)
                skips = 0 if finite(losses) else skips + 1
                run.skipped += skips > 0
                run.step += 1
            if skips == SKIPS_IN_A_ROW or (skips and "grad_norm" not in losses):
                raise ValueError(
                    f"the loss is no longer finite at step {run.step}; use a lower --learning-rate, or "
                    f"--max-grad-norm 1{last_file(run)}"
                )
            if skips:
                progress.skipped(run.step)
            else:
                progress.step(run.step, epoch, losses, lr)
                run.epoch_loss = run.epoch_loss[0] + losses["total"], run.epoch_loss[1] + 1
            validate(run)
            if run.epoch_begins():
                epoch_ended(run)
            name = run.folder.due(run)
            if name:
                save(run, name)
            if run.backend.agreed(interrupts.asked()):
                raise KeyboardInterrupt
    progress.close()


def compile(run, batch):
    started = time.monotonic()
    run.trainer.compile(batch)
    log.LOG.info("Compiled model in %.3f secs", time.monotonic() - started)


def update(run, batch, lr):
    """One update; a process that meets the end of another saves what it has."""
    import torch

    from data.order import random_bits
    from training.checkpoints import save

    run.trainer.set_lr(lr)
    # Dropout draws from the seed, the step and the process alone: nothing to remember, whenever a run is stopped.
    torch.manual_seed(random_bits(run.settings.random_seed, run.step, run.backend.rank) >> 1)
    try:
        return run.trainer.step(batch)
    except ConnectionError as error:
        path = save(run, f"dalle_step_{run.step}.pt")
        raise ConnectionError(f"{error}; go on with --pretrained-checkpoint {path}" if path else error) from None


def finite(losses):
    return all(map(math.isfinite, losses.values()))


def validate(run):
    """Losses of held-out pairs where they are due, and the best checkpoint by them."""
    from training import validation
    from training.checkpoints import BEST, save

    with_epochs = run.settings.lr_scheduler == "ReduceLROnPlateau" and run.epoch_begins()
    due = run.step % run.settings.validation_steps == 0 or run.step == run.steps or with_epochs
    if run.held_out is None or not due:
        return
    losses = validation.validate(run.trainer, run.backend, run.held_out)
    run.held_out_loss = losses["total"]
    log.validated(run.step, losses, run.tracker)
    if run.best_loss is None or losses["total"] < run.best_loss:
        run.best_loss = losses["total"]
        save(run, BEST)


def epoch_ended(run):
    """The schedule learns of the held-out loss, or else of the mean of the training losses."""
    total, count = run.epoch_loss
    loss = run.held_out_loss if run.held_out is not None else total / max(count, 1)
    if loss is not None and (count or run.held_out is not None):
        run.schedule.epoch_ended(loss)
    run.epoch_loss = (0.0, 0)


def stopped(run):
    """Ctrl-C or SIGTERM came: save, and say how to go on."""
    from training.checkpoints import save

    path = save(run, f"dalle_step_{run.step}.pt")
    if not run.backend.rank:
        print(f"stopped after step {run.step}; go on with --pretrained-checkpoint {path}" if path else "stopped")
    raise SystemExit(130) from None


@contextlib.contextmanager
def samples_accounted_for(run):
    """Within: a run that gets no more samples saves what it has; every run tells how many pictures it lost."""
    from backends.base import SamplesLost
    from training.checkpoints import save

    try:
        yield
    except SamplesLost as error:
        path = save(run, f"dalle_step_{run.step}.pt") if run.step else None
        raise SamplesLost(f"{error}; go on with --pretrained-checkpoint {path}" if path else error) from None
    finally:
        log.pictures_lost(run.dataset.lost)


def last_file(run):
    return f"; the last good checkpoint is {run.folder.written[-1]}" if run.folder.written else ""


if __name__ == "__main__":
    main()
