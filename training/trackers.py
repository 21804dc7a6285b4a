"""Where the figures and pictures of a run go while it trains: Weights & Biases, TensorBoard, metrics.jsonl.

A tracker has values(step, figures by name), picture(step, a PIL image) and close(). Their packages are optional, and
imported only where their flag asks for them.
"""

import importlib
import logging
import os

import log

logger = logging.getLogger("minidalle")

GRID = "samples"  # what trackers call the pictures
LOGIN_SECONDS = "60"  # that Weights & Biases waits for somebody to log in


class Trackers:
    """All trackers of a run as one. What goes wrong in one of them is told once, and the run goes on without it."""

    def __init__(self, trackers):
        self.trackers = list(trackers)

    def log_update(self, step, epoch, lr, losses, samples_per_second, skipped=False):
        """An update. losses: total, text, image, and grad_norm where the machine gives it."""
        figures = {"epoch": epoch, **named("loss", losses), "lr": lr, "samples_per_second": samples_per_second}
        if "grad_norm" in losses:
            figures["grad_norm"] = losses["grad_norm"]
        if skipped:
            figures["skipped"] = True
        self.values(step, figures)

    def log_validation(self, step, losses):
        """A validation after update `step`. losses: total, text, image and perplexity."""
        self.values(step, {**named("held-out", losses), "held-out/perplexity": losses["perplexity"]})

    def values(self, step, figures):
        self.each("values", step, figures)

    def picture(self, step, image):
        self.each("picture", step, image)

    def close(self):
        self.each("close")

    def each(self, name, *given):
        for tracker in self.trackers[:]:
            try:
                getattr(tracker, name)(*given)
            except Exception as error:  # of other people's packages, which raise anything
                self.trackers.remove(tracker)
                logger.warning("%s: %s; the run goes on without it", type(tracker).__name__, log.describe_error(error))


def named(group, losses):
    return {f"{group}/{name}": losses[name] for name in ("total", "text", "image")}


def chosen(settings, folder, step):
    """The trackers of --wandb and --tensorboard, for a run that has had `step` updates. folder: Path or None.

    ValueError where a package is missing.
    """
    wandb = package("wandb", "init", "--wandb", "wandb") if settings.wandb else None
    if settings.tensorboard and folder:
        package("tensorboard", "__version__", "--tensorboard", "tensorboard")
        yield TensorBoard(settings, folder / "tensorboard", step)
    run = wandb and wandb_run(wandb, settings)
    if run:
        yield WeightsAndBiases(wandb, run)


def package(name, has, flag, install):
    """An optional package; ValueError in one line where it is missing, or a mere folder has its name."""
    try:
        found = importlib.import_module(name)
        getattr(found, has)
    except (ImportError, AttributeError):
        raise ValueError(
            f"{flag}: the package {name} is not installed; pip install {install}, or leave the flag out"
        ) from None
    return found


def wandb_run(wandb, settings):
    """A run at Weights & Biases. Without a login, which a terminal is asked for, or a network: one that is kept on this
    machine; None where neither works.
    """
    given = {"project": settings.wandb_project_name, "name": settings.wandb_run_name, "config": vars(settings)}
    os.environ.setdefault("WANDB_LOGIN_TIMEOUT", LOGIN_SECONDS)
    try:
        return wandb.init(**given)
    except Exception as error:
        reason = log.describe_error(error).rstrip(".")
        logger.warning("--wandb: %s; recorded offline, `wandb sync` sends it later", reason)
    try:
        return wandb.init(mode="offline", **given)
    except Exception as error:
        logger.warning("--wandb: %s; the run goes on without it", log.describe_error(error))
        return None


class WeightsAndBiases:
    def __init__(self, wandb, run):
        self.wandb, self.run = wandb, run

    def values(self, step, figures):
        self.run.log(figures, step)

    def picture(self, step, image):
        self.run.log({GRID: self.wandb.Image(image)}, step)

    def close(self):
        self.run.finish()


class TensorBoard:
    """Event files. Events of later steps, which a run that was killed wrote, are marked as void."""

    def __init__(self, settings, folder, step):
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        lines = [f"| {name} | {value} |" for name, value in sorted(vars(settings).items())]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]), step)

    def values(self, step, figures):
        for name, value in figures.items():
            self.writer.add_scalar(name, float(value), step)

    def picture(self, step, image):
        import numpy as np

        self.writer.add_image(GRID, np.asarray(image), step, dataformats="HWC")

    def close(self):
        self.writer.close()
