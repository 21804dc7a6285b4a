"""The files of train_vqgan.py: what a run starts from, what it writes, and what it must not overwrite."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, Optional

import torch
import yaml

from args import VQGAN_SIZES
from models.vae import VQGanVAE
from models.vqgan_files import load_vqgan
from models.vqgan_training import VQGanTrainer
from training.checkpoints import write
from utils.files import atomic_write, first_line

logger = logging.getLogger("minidalle")

STATE_FILE = "vqgan_training.pt"  # with which --resume continues exactly
FILES = (STATE_FILE, "vqgan.*", "reconstructions.png", ".writable")


def save(trainer: VQGanTrainer, params: Dict[str, Any], output_dir: Path) -> None:
    """Write vqgan.yaml and vqgan.ckpt in taming-transformers' format and STATE_FILE, each complete or not at all.

    The weights of vqgan.ckpt are rounded to values of fp16, so that a checkpoint in half precision has the same codes.
    """
    params = dict(params, lossconfig={"target": "taming.modules.losses.DummyLoss"})
    if params["patch_size"] == 1:
        del params["patch_size"]  # taming's own VQModel knows no such setting
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    with atomic_write(output_dir / "vqgan.yaml", text=True) as file:
        yaml.safe_dump(config, file, sort_keys=False)
    state_dict = {name: tensor.detach().cpu() for name, tensor in trainer.model.state_dict().items()}
    rounded = {name: tensor.half().float() for name, tensor in state_dict.items()}
    finished = trainer.steps >= trainer.settings.max_steps
    write(output_dir / "vqgan.ckpt", {"state_dict": rounded, "global_step": trainer.steps, "finished": finished})
    write(output_dir / STATE_FILE, {"state_dict": state_dict, **trainer.state_dict()})


def check_earlier_run(settings: Namespace, output_dir: Path) -> Optional[int]:
    """Return the steps of the finished VQGAN that --resume continues, or None; ValueError if one would be replaced."""
    path = output_dir / "vqgan.ckpt"
    if not path.exists():
        return None
    if not settings.resume:
        raise ValueError(
            f"--output-dir {output_dir}: has the VQGAN of an earlier run; continue it with --resume, "
            "or give another folder"
        )
    if not (output_dir / STATE_FILE).exists():
        raise ValueError(
            f"--output-dir {output_dir}: has a VQGAN without {STATE_FILE}, so it cannot be resumed; give another "
            f"folder, and --init-from {output_dir} to fine-tune it"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return int(saved["global_step"]) if saved.get("finished", True) else None
    except (RuntimeError, ValueError, LookupError, UnpicklingError) as error:
        raise ValueError(f"{path}: damaged ({first_line(error)}); remove it to resume from {STATE_FILE}") from error


def move_earlier(output_dir: Path, steps: int) -> None:
    """Move a finished VQGAN, which a longer run will replace, into a folder that is named for its steps."""
    folder = output_dir / f"step_{steps}"
    folder.mkdir(exist_ok=True)
    for name in ("vqgan.ckpt", "vqgan.yaml", "reconstructions.png"):
        if (output_dir / name).exists():
            (output_dir / name).replace(folder / name)


def load_initial(settings: Namespace) -> VQGanVAE:
    """Return the VQGAN of --init-from, and give its sizes to `settings`; ValueError if it is not a VQModel."""
    vae = load_vqgan(settings.init_from)
    kind = vae.hparams["target"]
    if not isinstance(vae, VQGanVAE) or kind != "VQModel":
        raise ValueError(f"--init-from {settings.init_from}: is a {kind}; only a VQModel can be trained")
    params = vae.hparams["params"]
    sizes = {**params["ddconfig"], **params, "image_size": vae.image_size}
    for name in VQGAN_SIZES:
        setattr(settings, name, sizes[name])
    logger.info("%s: the run starts with its weights and sizes", settings.init_from)
    return vae


def load_codes(trainer: VQGanTrainer, folder: str) -> None:
    """Begin with a trained VQGAN, whose codes are to stay; ValueError if it has another shape."""
    try:
        trainer.model.load_state_dict(load_vqgan(folder).model.state_dict())
    except RuntimeError as error:
        raise ValueError(f"--decoder-of {folder}: its VQGAN has another shape ({first_line(error)})") from error
    trainer.has_codebook = True


def resume(trainer: VQGanTrainer, output_dir: Path) -> None:
    """Load weights and state of a stopped run; ValueError if the file is damaged, or of a VQGAN of another shape."""
    path = output_dir / STATE_FILE
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
        trainer.model.load_state_dict(state["state_dict"])
        trainer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        reason = first_line(error)
        raise ValueError(f"--resume: {path} is not of this VQGAN; use the flags it began with ({reason})") from error
    logger.info("resumed at step %d of %d", trainer.steps, trainer.settings.max_steps)
