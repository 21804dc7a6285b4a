"""Decide which checkpoint a run resumes from, when it writes one and which it keeps."""

from __future__ import annotations

import itertools
import logging
import platform
import re
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set, Tuple

import torch

from generation.loading import OPTIONS
from utils import checkpoint
from utils.command_line import describe_error
from utils.files import check_writable, defer_signals, remove_leftovers

if TYPE_CHECKING:
    from models.dalle import DALLE
    from training.run import Run

BEST = "dalle_best.pt"
FILES = ("dalle_*.pt", "loss.png", "metrics.jsonl", ".writable", "samples/captions.txt", "samples/step_*.png")
# Attributes of a Run -> their keys in the file.
PROGRESS = {
    "skipped": "skipped",
    "epoch_loss": "epoch_loss",
    "validation_loss": "held_out_loss",
    "best_loss": "best_loss",
    "post_update_done": "accounted",
}
# Settings that may differ in a resumed run without a warning: they say how and where it continues, not what it is.
MAY_DIFFER = {
    *("config", "resume", "pretrained_checkpoint", "init_from", "checkpoint_output_dir", "checkpoint_save_steps"),
    *("checkpoint_save_minutes", "checkpoint_save_epochs", "keep_checkpoints", "shard", "device", "dataloader_workers"),
    *("wandb", "wandb_project_name", "wandb_run_name", "codes_cache", "executable_cache_dir", "profile_dir"),
    *("tensorboard", "sample_steps"),
    *("top_k", "top_p", "temperature", "cond_scale", "input_folder", "validation_folder", "vae_path", "bpe_path"),
    *("vqgan_model_path", "vqgan_config_path", "async_dataloader", "validation_steps", "dry_run"),
}

logger = logging.getLogger("minidalle")


class Folder:
    """The checkpoints in --checkpoint-output-dir, oldest first in `written`; `path` is None if nothing is written.

    Raises:
        ValueError: it holds another run's checkpoints and no flag says to resume them.
    """

    def __init__(self, settings: Namespace, writes: bool = True):
        self.settings, self.writes = settings, writes
        used = settings.checkpoint_output_dir and not settings.synthetic_data  # which trains on nothing
        self.path = Path(settings.checkpoint_output_dir) if used else None
        self.written: List[Path] = []
        self.saved_at = time.monotonic()
        self.reserved: Set[str] = set()  # names of files that this run must not replace
        if self.path is None:
            return
        found = sort_by_age(self.path)
        start = settings.pretrained_checkpoint
        continues = start and not start.endswith(".safetensors") and Path(start).resolve().parent == self.path.resolve()
        if continues or settings.resume:
            self.written = found
        elif found:
            raise ValueError(
                f"--checkpoint-output-dir {self.path}: has {found[-1].name} of an earlier run; "
                "continue it with --resume, or give another folder"
            )

    def prepare(self) -> None:
        """Create the folder and remove temporary files of a killed run; ValueError if it cannot be written."""
        if self.path is not None and self.writes:
            check_writable(self.path, "--checkpoint-output-dir")
            remove_leftovers(self.path, *FILES)

    def origin(self) -> Optional[Tuple[Any, Dict[str, Any]]]:
        """Return the path and content of the checkpoint to resume from, or None to start a new run."""
        found = self._read_origin()
        if found and self.written and "step" not in found[1]:
            raise ValueError(
                f"{found[0]}: is of another program, and this run would replace that program's checkpoints; "
                "continue it with --pretrained-checkpoint and another --checkpoint-output-dir"
            )
        return found

    def _read_origin(self) -> Optional[Tuple[Path, Dict[str, Any]]]:
        if self.settings.pretrained_checkpoint:
            start = Path(self.settings.pretrained_checkpoint)
            return start, checkpoint.read(start)
        if not self.settings.resume or self.path is None:
            return None
        best = self.path / BEST
        candidates = self.written[::-1] + ([best] if best.exists() else [])
        for path in candidates:
            try:
                return path, checkpoint.read(path)
            except (ValueError, OSError) as error:
                logger.warning("%s; trying the previous checkpoint", error)
        if candidates:
            raise ValueError(f"--resume: no checkpoint in {self.path} can be read; give another folder to start again")
        logger.info("--resume: no checkpoint in %s yet, starting a new run", self.path)
        return None

    def due(self, run: Run) -> Optional[str]:
        """Return the name of the checkpoint to write after this update, if one is due."""
        settings, last = self.settings, run.step == run.steps
        epochs = run.epoch()
        if run.epoch_begins() and (epochs % settings.checkpoint_save_epochs == 0 or last):
            return self.unused_name(f"dalle_{epochs - 1}.pt", f"dalle_step_{run.step}.pt")
        minutes = settings.checkpoint_save_minutes
        late = minutes is not None and run.backend.any_process(time.monotonic() - self.saved_at > 60 * minutes)
        if run.step % settings.checkpoint_save_steps == 0 or last or late:
            return self.unused_name(f"dalle_step_{run.step}.pt")
        return None

    def reserve_names(self) -> None:
        """Replace none of the checkpoints that the folder has now."""
        self.reserved = set() if self.path is None else {path.name for path in self.path.glob("dalle_*.pt")} - {BEST}

    def unused_name(self, *names: str) -> str:
        """Return the first of these names that is not reserved, or the last one with a number."""
        stem = names[-1][: -len(".pt")]
        numbered = (f"{stem}_{number}.pt" for number in itertools.count(2))
        return next(name for name in itertools.chain(names, numbered) if name not in self.reserved)

    def add(self, path: Path) -> None:
        """Record the newest checkpoint and remove the oldest beyond --keep-checkpoints."""
        self.written = [other for other in self.written if other != path] + [path]
        while len(self.written) > self.settings.keep_checkpoints:
            oldest = self.written.pop(0)
            if oldest.exists():
                oldest.unlink()


def sort_by_age(folder: Path) -> List[Path]:
    """Return a folder's dalle_<epoch>.pt and dalle_step_<step>.pt by their steps; damaged ones by modification time."""
    found = [path for path in folder.glob("dalle_*.pt") if re.fullmatch(r"dalle_(step_)?\d+(_\d+)?\.pt", path.name)]
    times = {path: path.stat().st_mtime_ns for path in found}
    steps = {path: checkpoint.step_of(path) for path in found}

    def age(path: Path) -> float:
        step = steps[path]
        if step is not None:
            return step
        return max((s for p, s in steps.items() if s is not None and times[p] <= times[path]), default=-1) + 0.5

    return sorted(found, key=lambda path: (age(path), times[path]))


def attention_patterns(settings: Namespace, origin: Optional[Tuple[Any, Dict[str, Any]]]) -> Tuple[str, ...]:
    """Return --attn-types, with conv_up_left for conv_like if the checkpoint to resume from was trained with that."""
    path, saved = origin or (None, {"hparams": {}})
    if "conv_up_left" not in (saved["hparams"].get("attn_types") or ()):
        return tuple(settings.attn_types)
    logger.info("%s: its conv_like window reaches up and to the left of a code, and stays that way", path)
    return tuple("conv_up_left" if name == "conv_like" else name for name in settings.attn_types)


def network_options(origin: Optional[Tuple[Any, Dict[str, Any]]]) -> Dict[str, Any]:
    """Return a checkpoint's hparams that no flag sets: options of the network that come from DALLE-pytorch."""
    hparams = origin[1]["hparams"] if origin else {}
    return {name: hparams[name] for name in OPTIONS if hparams.get(name)}


def resume(run: Run, path: Any, saved: Dict[str, Any], model: DALLE) -> None:
    """Load weights, optimizer, schedule and progress from a checkpoint's content; ValueError if the model differs."""
    weights = checkpoint.model_weights(saved["weights"])
    for name, tensor in model.state_dict().items():
        if name.startswith("vae."):
            weights[name] = tensor  # the VQGAN comes from this run's flags
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{path}: does not fit this configuration: {misfit}")
    for flag, theirs, ours in (
        ("--bpe-path", saved.get("tokenizer", {}).get("sha256"), run.tokenizer.fingerprint),
        ("--vae-path", saved.get("vqgan"), run.vqgan_fingerprint),
    ):
        if theirs not in (None, ours):
            raise ValueError(
                f"{path}: was trained with another {flag} "
                f"(fingerprint {checkpoint.short(theirs)}, this run's is {checkpoint.short(ours)})"
            )
    checkpoint.check_vocabulary(path, saved, run.tokenizer.fingerprint, "--bpe-path")
    if "exported" in saved:
        run.trainer.load_state_dict({"weights": weights})
        logger.info("%s: loaded the weights of step %s; new optimizer, from step 0", path, saved.get("step"))
        return
    opt_state = saved.get("opt_state")
    if not isinstance(opt_state, list):  # the reference application has one optimizer, we have a list
        opt_state = [opt_state]
    run.trainer.load_state_dict(
        {
            "weights": weights,
            "ema_weights": checkpoint.model_weights(saved.get("ema_weights", {})),
            "opt_state": opt_state,
            **saved.get("trainer", {}),
        }
    )
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
        raise ValueError(
            f"{path}: has {run.step} steps already, this run ends at {run.steps}; give more --epochs or --max-steps"
        )
    logger.info("resuming from %s at step %d", path, run.step)
    if changes:
        run.folder.reserve_names()
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
    return [
        f"{now:,} {what}, was {then:,}"
        for what, now, then in (
            ("samples a step", batches.global_batch, size),
            ("training images", batches.num_samples, images),
        )
        if isinstance(then, int) and now != then
    ]


def as_flag(value: Any) -> Any:
    """Return a setting as one writes it after its flag: lists with commas, other values as they are."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def find_differences(saved: Dict[str, Any], run: Run) -> List[str]:
    """Describe how a run differs from the one that wrote a checkpoint."""
    found = []
    if "settings" in saved:
        before, now = saved["settings"], vars(run.settings)
    else:  # of the reference application, whose hparams are a part of them
        before, now = saved["hparams"], run.hparams
    for name, value in now.items():
        value, was = as_flag(value), as_flag(before.get(name, value))
        if was != value and name not in MAY_DIFFER:
            found.append(f"--{name.replace('_', '-')} {value}, was {was}")
    version = saved.get("versions", {}).get("torch")
    if version not in (None, str(torch.__version__)):
        found.append(f"torch {torch.__version__}, was {version}")
    if saved.get("data") not in (None, run.data_fingerprint):
        found.append("other images or captions in the input folder")
    return found


def summarize(run: Run) -> Dict[str, Any]:
    """Return the words and some examples of the training captions; they are collected once per run."""
    if run.captions is None:
        dataset, decode, count = run.dataset, run.tokenizer.decode, 4 * checkpoint.EXAMPLES
        rows = [number * len(dataset) // count for number in range(count)]  # some are equal or too long
        examples = (" ".join(decode(tokens).split()) for row in rows for tokens in dataset.captions(row)[:1])
        texts = (decode(tokens) for row in range(len(dataset)) for tokens in dataset.captions(row))
        run.captions = checkpoint.summarize_captions(texts, examples)
    return run.captions


def save_if_due(run: Run) -> None:
    """Write a checkpoint if one is due; OSError if the run ends without one."""
    name = run.folder.due(run)
    path = save(run, name) if name else None
    if run.step == run.steps and path is None and run.folder.path is not None and not run.backend.rank:
        raise OSError(f"the run ended at step {run.step}, but its last checkpoint was not written{describe_last(run)}")


def save(run: Run, name: str) -> Optional[Path]:
    """Write a checkpoint and return its path.

    Returns None if there is no folder to write to, and after logging an error of the disk: the run continues with the
    last good checkpoint.
    """
    folder = run.folder
    if folder.path is None:
        return None
    try:
        state = run.trainer.state_dict()  # called by all processes, which may each hold a part
    except ConnectionError:  # one of them is gone, so the last checkpoint is what there is
        return folder.written[-1] if folder.written and not run.backend.rank else None
    folder.saved_at = time.monotonic()
    if run.backend.rank:
        return None
    run.trackers.flush()  # a run that resumes from the checkpoint must not lack a line
    path = folder.path / name
    try:
        with defer_signals():
            checkpoint.write(path, contents(run, state))
            if name != BEST:
                folder.add(path)
    except OSError as error:
        logger.warning("no checkpoint of step %d: %s%s", run.step, describe_error(error), describe_last(run))
        return None
    logger.info("wrote %s", path)
    return path


def describe_last(run: Run) -> str:
    """Name the last good checkpoint, as the end of a sentence ("" if there is none)."""
    return f"; the last good checkpoint is {run.folder.written[-1]}" if run.folder.written else ""


def contents(run: Run, state: Dict[str, Any]) -> Dict[str, Any]:
    """Return a checkpoint's content: the reference application's keys, then ours (see utils/checkpoint.py)."""
    settings, vocabulary = run.settings, run.tokenizer.vocabulary
    placement = ("embedding_ipu_id", "embedding_serialization_factor", "layers_per_ipu", "cls_ipu_id", "fp16", "byteio")
    content = {
        "hparams": {**run.hparams, **{name: getattr(settings, name) for name in placement}},
        "vae_params": run.vae.hparams,
        "epoch": run.epoch() - run.epoch_begins(),
        "step": run.step,
        "weights": checkpoint.canonical_weights(state.pop("weights")),
        "opt_state": state.pop("opt_state"),
        "scheduler_state": run.schedule.state_dict(),
        "progress": {key: getattr(run, name) for name, key in PROGRESS.items()},
        "data_order": {
            "samples_seen": run.batches.samples_seen(run.step),
            "num_samples": run.batches.num_samples,
            "samples_per_step": run.batches.global_batch,
        },
        "tokenizer": {
            "kind": run.tokenizer.kind,
            "sha256": run.tokenizer.fingerprint,
            "keeps_ids": run.tokenizer.keeps_ids,
            "vocabulary": None if vocabulary is None else torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8),
        },
        "vqgan": run.vqgan_fingerprint,
        "data": run.data_fingerprint,
        "sampling": {key: getattr(settings, key) for key in ("top_k", "top_p", "temperature", "cond_scale")},
        "settings": dict(vars(settings)),
        "captions": summarize(run),
        "versions": {
            "layout": checkpoint.LAYOUT,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    }
    if "ema_weights" in state:
        content["ema_weights"] = checkpoint.canonical_weights(state.pop("ema_weights"))
    return {**content, "trainer": state}
