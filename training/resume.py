"""Resume a run from a checkpoint: which one, whether it fits, and what has changed since it was written."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import torch

from generation.loading import OPTIONAL_HPARAMS
from training.checkpoints import BEST, PROGRESS, CheckpointFolder
from utils import checkpoint

if TYPE_CHECKING:
    from models.dalle import DALLE
    from training.run import Run

# Settings that may differ in a resumed run without a warning: they do not change what it computes.
MAY_DIFFER = {
    *("config", "resume", "pretrained_checkpoint", "init_from", "checkpoint_output_dir", "checkpoint_save_steps"),
    *("checkpoint_save_minutes", "checkpoint_save_epochs", "keep_checkpoints", "shard", "device", "dataloader_workers"),
    *("wandb", "wandb_project_name", "wandb_run_name", "codes_cache", "executable_cache_dir", "profile_dir"),
    *("tensorboard", "sample_steps"),
    *("top_k", "top_p", "temperature", "cond_scale", "input_folder", "validation_folder", "vae_path", "bpe_path"),
    *("vqgan_model_path", "vqgan_config_path", "async_dataloader", "validation_steps", "dry_run"),
}

Origin = Tuple[Path, checkpoint.Checkpoint]

logger = logging.getLogger("minidalle")


def find_origin(settings: Namespace, folder: CheckpointFolder) -> Optional[Origin]:
    """Return the checkpoint of --pretrained-checkpoint or --resume, or None to start a new run."""
    if settings.pretrained_checkpoint:
        candidates = [Path(settings.pretrained_checkpoint)]
    else:
        best = [folder.path / BEST] if folder.path is not None and (folder.path / BEST).exists() else []
        candidates = folder.written[::-1] + best
    for path in candidates:
        try:
            saved = checkpoint.read(path)
        except (ValueError, OSError) as error:
            if settings.pretrained_checkpoint:
                raise
            logger.warning("%s; trying the previous checkpoint", error)
            continue
        if folder.written and "step" not in saved:
            raise ValueError(
                f"{path}: is of another program, and this run would replace that program's checkpoints; "
                "continue it with --pretrained-checkpoint and another --checkpoint-output-dir"
            )
        return path, saved
    if candidates:
        raise ValueError(f"--resume: no checkpoint in {folder.path} can be read; give another folder to start again")
    if folder.path is not None:
        logger.info("--resume: no checkpoint in %s yet, starting a new run", folder.path)
    return None


def attention_patterns(settings: Namespace, origin: Origin) -> Tuple[str, ...]:
    """Return --attn-types, with conv_up_left for conv_like if the checkpoint was trained with that."""
    path, saved = origin
    if "conv_up_left" not in (saved["hparams"].get("attn_types") or ()):
        return tuple(settings.attn_types)
    logger.info("%s: its conv_like window reaches up and to the left of a code, and stays that way", path)
    return tuple("conv_up_left" if name == "conv_like" else name for name in settings.attn_types)


def network_options(saved: checkpoint.Checkpoint) -> Dict[str, Any]:
    """Return a checkpoint's hparams that no flag sets: options of the network that come from DALLE-pytorch."""
    return {name: saved["hparams"][name] for name in OPTIONAL_HPARAMS if saved["hparams"].get(name)}


def check_fits(run: Run, path: Path, saved: checkpoint.Checkpoint, model: DALLE, weights: checkpoint.Tensors) -> None:
    """Raise ValueError if a checkpoint is of another model, vocabulary or VQGAN than this run."""
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{path}: does not fit this configuration: {misfit}")
    for flag, theirs, ours in (
        ("--bpe-path", saved.get("tokenizer", {}).get("sha256"), run.tokenizer.fingerprint),
        ("--vae-path", saved.get("vqgan"), run.vqgan_fingerprint),
    ):
        if theirs not in (None, ours):
            reason = f"fingerprint {checkpoint.short(theirs)}, this run's is {checkpoint.short(ours)}"
            raise ValueError(f"{path}: was trained with another {flag} ({reason})")
    checkpoint.check_vocabulary(path, saved, run.tokenizer.fingerprint, "--bpe-path")


def load_progress(run: Run, path: Path, saved: checkpoint.Checkpoint, model: DALLE) -> None:
    """Load weights, optimizer, schedule and progress from a checkpoint's content; ValueError if it does not fit."""
    weights = checkpoint.model_weights(saved["weights"])
    # The VQGAN is that of this run's flags.
    weights.update({name: tensor for name, tensor in model.state_dict().items() if name.startswith("vae.")})
    check_fits(run, path, saved, model, weights)
    if "exported" in saved:
        run.trainer.load_state_dict({"weights": weights})
        logger.info("%s: loaded the weights of step %s; new optimizer, from step 0", path, saved.get("step"))
        return
    opt_state = saved.get("opt_state")
    state: Dict[str, Any] = {"weights": weights, "ema_weights": checkpoint.model_weights(saved.get("ema_weights", {}))}
    # The reference application has one optimizer, we have a list.
    state["opt_state"] = opt_state if isinstance(opt_state, list) else [opt_state]
    run.trainer.load_state_dict({**state, **saved.get("trainer", {})})
    try:
        run.schedule.load_state_dict(saved.get("scheduler_state") or {})
    except (ValueError, LookupError, TypeError, AttributeError):
        logger.warning("%s: the state of its learning rate schedule cannot be read; the schedule starts afresh", path)
    # The reference application counts finished epochs, and no steps.
    run.step = saved.get("step", saved.get("epoch", 0) * run.batches.batches_per_epoch)
    for name, key in PROGRESS.items():
        if key in saved.get("progress", {}):
            value = saved["progress"][key]
            setattr(run, name, tuple(value) if isinstance(value, list) else value)
    changes = enter_order(run, path, saved)
    finished = run.step == run.steps and run.post_update_done and not run.settings.resume
    if run.step > run.steps or finished:
        more = f"this run ends at {run.steps}; give more --epochs or --max-steps"
        raise ValueError(f"{path}: has {run.step} steps already, {more}")
    logger.info("resuming from %s at step %d", path, run.step)
    if changes:
        if run.folder.path is not None:
            run.folder.reserved = {other.name for other in run.folder.path.glob("dalle_*.pt")} - {BEST}
        epoch, taken = run.batches.place(run.step)
        logger.warning(
            "%s: continuing in epoch %d after %d of %d samples, %d steps to go",
            *(", ".join(changes), epoch, taken, run.batches.num_samples, run.steps - run.step),
        )
    for difference in find_differences(saved, run):
        logger.warning("unlike the run that wrote it: %s", difference)


def enter_order(run: Run, path: Any, saved: Dict[str, Any]) -> List[str]:
    """Let the run continue after the samples that a checkpoint has seen; describe what has changed in their number."""
    batches, before = run.batches, saved.get("data_order")
    if not isinstance(before, dict):  # of the reference application, which counts epochs
        return []
    images, size, seen = (before.get(key) for key in ("num_samples", "samples_per_step", "samples_seen"))
    if not isinstance(seen, int) or seen < 0:
        raise ValueError(f"{path}: its data_order has no number of samples_seen")
    batches.enter(run.step, seen)
    run.set_length()
    numbers = ("samples a step", batches.global_batch, size), ("training images", batches.num_samples, images)
    changed = [(what, now, then) for what, now, then in numbers if isinstance(then, int) and now != then]
    return [f"{now:,} {what}, was {then:,}" for what, now, then in changed]


def find_differences(saved: Dict[str, Any], run: Run) -> List[str]:
    """Describe how a run differs from the one that wrote a checkpoint."""
    found = []
    if "settings" in saved:
        before, now = saved["settings"], vars(run.settings)
    else:  # of the reference application, whose hparams are a part of them
        before, now = saved["hparams"], run.hparams
    for name, value in now.items():
        pair = value, before.get(name, value)
        value, was = (",".join(map(str, one)) if isinstance(one, (list, tuple)) else one for one in pair)
        if was != value and name not in MAY_DIFFER:
            found.append(f"--{name.replace('_', '-')} {value}, was {was}")
    version = saved.get("versions", {}).get("torch")
    if version not in (None, str(torch.__version__)):
        found.append(f"torch {torch.__version__}, was {version}")
    if saved.get("data") not in (None, run.data_fingerprint):
        found.append("other images or captions in the input folder")
    return found
