"""Send a run's metrics and sample images to Weights & Biases and TensorBoard, whose packages are optional."""

from __future__ import annotations

import importlib
import logging
import os
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any, List, Optional

import numpy as np
from PIL.Image import Image

from log import Metrics, Tracker
from utils.errors import describe_error

LOGIN_SECONDS = "60"  # that wandb waits for somebody to log in

logger = logging.getLogger("minidalle")


def open_trackers(settings: Namespace, folder: Optional[Path], step: int) -> List[Tracker]:
    """Return the trackers of --wandb and --tensorboard for a run of `step` updates; ValueError without a package."""
    found: List[Tracker] = []
    wandb = _import_package("wandb", "init", "--wandb") if settings.wandb else None
    if settings.tensorboard and folder:
        _import_package("tensorboard", "__version__", "--tensorboard")
        found.append(TensorBoard(settings, folder / "tensorboard", step))
    run = _start_wandb(wandb, settings) if wandb else None
    return [*found, WeightsAndBiases(wandb, run)] if run else found


def _import_package(name: str, attribute: str, flag: str) -> ModuleType:
    try:
        package = importlib.import_module(name)
        getattr(package, attribute)  # which a mere folder of that name lacks
    except (ImportError, AttributeError):
        raise ValueError(f"{flag}: the package {name} is not installed; pip install {name}, or omit the flag") from None
    return package


def _start_wandb(wandb: Any, settings: Namespace) -> Any:
    """Start a run at Weights & Biases; recorded offline if there is no login or network, None if that fails too."""
    options = {"project": settings.wandb_project_name, "name": settings.wandb_run_name, "config": vars(settings)}
    os.environ.setdefault("WANDB_LOGIN_TIMEOUT", LOGIN_SECONDS)
    try:
        return wandb.init(**options)
    except Exception as error:
        reason = describe_error(error).rstrip(".")
        logger.warning("--wandb: %s; recording offline, `wandb sync` uploads it later", reason)
    try:
        return wandb.init(mode="offline", **options)
    except Exception as error:
        logger.warning("--wandb: %s; the run continues without it", describe_error(error))
        return None


class WeightsAndBiases(Tracker):
    def __init__(self, wandb: Any, run: Any):
        self.wandb, self.run = wandb, run

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(metrics, step)

    def log_image(self, step: int, image: Image) -> None:
        self.run.log({"samples": self.wandb.Image(image)}, step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard(Tracker):
    """TensorBoard's event files; events of steps after `step`, written by a run that was killed, become void."""

    def __init__(self, settings: Namespace, folder: Path, step: int):
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        lines = [f"| {name} | {value} |" for name, value in sorted(vars(settings).items())]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]), step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, float(value), step)

    def log_image(self, step: int, image: Image) -> None:
        self.writer.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
