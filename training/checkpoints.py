"""A run's checkpoints: which file to go on from, what it brings back, what is written when, and what is kept.

The file itself, its layout and how it is read and written safely, is utils/checkpoint.py's.
"""

import logging
import platform
import re
import time
from pathlib import Path

import torch

import log
from data.words import EXAMPLES, summarize_captions
from utils import checkpoint, interrupts
from utils.files import check_writable

logger = logging.getLogger("minidalle")

BEST = "dalle_best.pt"
# Attributes of a Run that are stored next to its step -> their keys in the file.
PROGRESS = {
    "skipped": "skipped",
    "epoch_loss": "epoch_loss",
    "validation_loss": "held_out_loss",
    "best_loss": "best_loss",
    "post_update_done": "accounted",
}
# Of the settings that a file remembers, those that say how and where a run goes on rather than what it is.
NOT_THE_SAME_RUN = {
    *("config", "resume", "pretrained_checkpoint", "checkpoint_output_dir", "checkpoint_save_steps"),
    *("checkpoint_save_minutes", "checkpoint_save_epochs", "keep_checkpoints", "shard", "device", "dataloader_workers"),
    *("wandb", "wandb_project_name", "wandb_run_name", "codes_cache", "executable_cache_dir", "profile_dir"),
    *("tensorboard", "sample_steps"),
    *("top_k", "top_p", "temperature", "cond_scale", "input_folder", "validation_folder", "vae_path", "bpe_path"),
    *("vqgan_model_path", "vqgan_config_path", "async_dataloader", "validation_steps", "dry_run"),
}


class Folder:
    """--checkpoint-output-dir: the files of this run, oldest first in `written`. Without a folder nothing is written.

    Raises ValueError where it holds another run's files and nothing says to go on with them.
    """

    def __init__(self, settings, writes=True):
        self.settings, self.writes = settings, writes
        wanted = settings.checkpoint_output_dir and not settings.synthetic_data  # which trains on nothing
        self.path = Path(settings.checkpoint_output_dir) if wanted else None
        self.written = []
        self.saved_at = time.monotonic()
        if self.path is None:
            return
        found = by_age(self.path)
        given = settings.pretrained_checkpoint
        given = given if given and not given.endswith(".safetensors") else None  # weights alone begin a run
        if given and Path(given).resolve().parent == self.path.resolve() or settings.resume:
            self.written = found
        elif found:
            raise ValueError(
                f"--checkpoint-output-dir {self.path}: has {found[-1].name} of an earlier run; "
                "go on with --resume, or give another folder"
            )

    def prepare(self):
        """Make the folder, or ValueError now rather than after hours."""
        if self.path is not None and self.writes:
            check_writable(self.path, "--checkpoint-output-dir")
            for left in self.path.glob("dalle_*.pt.*.tmp"):  # by a run that was killed while it wrote
                left.unlink()

    def origin(self):
        """(file, its dict) to go on from, or None to begin. A damaged newest file is told, and left for the one before
        it.
        """
        if self.settings.pretrained_checkpoint:
            return self.settings.pretrained_checkpoint, checkpoint.read(self.settings.pretrained_checkpoint)
        if not self.settings.resume:
            return None
        candidates = list(reversed(self.written)) + [path for path in [self.path / BEST] if path.exists()]
        for path in candidates:
            try:
                return path, checkpoint.read(path)
            except (ValueError, OSError) as error:
                logger.warning("%s; the one before it is taken", error)
        if candidates:
            raise ValueError(f"--resume: no checkpoint in {self.path} can be read; give another folder to begin anew")
        logger.info("--resume: no checkpoint in %s yet, so the run begins", self.path)
        return None

    def due(self, run):
        """The name of the checkpoint to write after this update, or None."""
        settings, last = self.settings, run.step == run.steps
        ended = run.epoch() - 1
        if run.epoch_begins() and ((ended + 1) % settings.checkpoint_save_epochs == 0 or last):
            return f"dalle_{ended}.pt"
        minutes = settings.checkpoint_save_minutes
        late = minutes is not None and run.backend.any_process(time.monotonic() - self.saved_at > 60 * minutes)
        if run.step % settings.checkpoint_save_steps == 0 or last or late:
            return f"dalle_step_{run.step}.pt"
        return None

    def keep(self, path):
        """Note a file as the newest, and remove the oldest beyond --keep-checkpoints."""
        if path in self.written:
            self.written.remove(path)
        self.written.append(path)
        while len(self.written) > self.settings.keep_checkpoints:
            oldest = self.written.pop(0)
            if oldest.exists():
                oldest.unlink()


def by_age(folder):
    """dalle_<epoch>.pt and dalle_step_<step>.pt of a folder, fewest steps first; damaged ones by their time."""
    found = [path for path in folder.glob("dalle_*.pt") if re.fullmatch(r"dalle_(step_)?\d+\.pt", path.name)]
    times = {path: path.stat().st_mtime_ns for path in found}
    steps = {path: checkpoint.step_of(path) for path in found}
    known = sorted((times[path], steps[path]) for path in found if steps[path] is not None)

    def age(path):
        before = [step for when, step in known if when <= times[path]]
        return steps[path] if steps[path] is not None else max(before, default=-1) + 0.5

    return sorted(found, key=lambda path: (age(path), times[path]))


def resume(run, path, saved, model):
    """Weights, optimizer, schedule and position of a file into a run; ValueError where it does not fit its model."""
    weights = checkpoint.model_weights(saved["weights"])
    for name, tensor in model.state_dict().items():
        if name.startswith("vae."):
            weights[name] = tensor  # the VQGAN of this run's flags
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{path}: does not fit this configuration: {misfit}")
    for flag, made_with, ours in (
        ("--bpe-path", saved.get("tokenizer", {}).get("sha256"), run.tokenizer.fingerprint),
        ("--vae-path", saved.get("vqgan"), run.vqgan),
    ):
        if made_with not in (None, ours):
            sides = f"{checkpoint.short(made_with)}, this run's is {checkpoint.short(ours)}"
            raise ValueError(f"{path}: was trained with another {flag} than this run's (fingerprint {sides})")
    if "exported" in saved:
        run.trainer.load_state_dict({"weights": weights})
        logger.info("%s: weights alone, of step %s; a new optimizer, from step 0", path, saved.get("step"))
        return
    run.trainer.load_state_dict(
        {
            "weights": weights,
            "ema_weights": checkpoint.model_weights(saved.get("ema_weights", {})),
            "opt_state": saved.get("opt_state") if isinstance(saved.get("opt_state"), list) else None,
            **saved.get("trainer", {}),
        }
    )
    if isinstance(saved.get("scheduler_state"), dict):
        run.schedule.load_state_dict(saved["scheduler_state"])
    run.step = saved.get("step", (saved.get("epoch", -1) + 1) * run.batches.batches_per_epoch)
    progress = saved.get("progress", {})
    for name, key in PROGRESS.items():
        if key in progress:
            setattr(run, name, tuple(progress[key]) if isinstance(progress[key], list) else progress[key])
    over = run.step == run.steps and run.post_update_done and not run.settings.resume
    if run.step > run.steps or over:
        raise ValueError(
            f"{path}: has {run.step} steps already, this run ends at {run.steps}; give more --epochs or --max-steps"
        )
    logger.info("going on from %s at step %d", path, run.step)
    for line in differences(saved, run):
        logger.warning("unlike the run that wrote it: %s", line)


def differences(saved, run):
    """In what a run differs from the one that wrote a file, a phrase each."""
    found = []
    before = saved.get("settings", {})
    for name, value in vars(run.settings).items():
        if name in before and name not in NOT_THE_SAME_RUN and plain(before[name]) != plain(value):
            found.append(f"--{name.replace('_', '-')} {value}, was {before[name]}")
    version = saved.get("versions", {}).get("torch")
    if version not in (None, str(torch.__version__)):
        found.append(f"torch {torch.__version__}, was {version}")
    if saved.get("data") not in (None, run.data):
        found.append("other pictures or captions in the input folder")
    return found


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def summarize(run):
    """Return the words and some examples of the training captions; they are collected once per run."""
    if run.captions is None:
        dataset, tokenizer = run.dataset, run.tokenizer
        rows = [
            place * len(dataset) // (4 * EXAMPLES) for place in range(4 * EXAMPLES)
        ]  # some may be equal, or too long
        texts = dataset.iter_captions(tokenizer), dataset.iter_captions(tokenizer, rows)
        run.captions = summarize_captions(*texts)
    return run.captions


def save(run, name):
    """Write a checkpoint, keep the newest → its path; None without a folder, or where it cannot be written: then the
    log says so, and the run goes on with the last good file.
    """
    folder = run.folder
    if folder.path is None:
        return None
    try:
        state = run.trainer.state_dict()  # by every process, since what it holds may lie with all of them
    except ConnectionError:  # and one of them is gone: what was written last is what there is
        return folder.written[-1] if folder.written and not run.backend.rank else None
    folder.saved_at = time.monotonic()
    if run.backend.rank:
        return None
    run.metrics.flush()  # so that a run that goes on from the file lacks no line
    path = folder.path / name
    try:
        with interrupts.defer_signals():
            checkpoint.write(path, contents(run, state))
            if name != BEST:
                folder.keep(path)
    except OSError as error:
        last = f"; the last good one is {folder.written[-1]}" if folder.written else ""
        logger.warning("no checkpoint of step %d: %s%s", run.step, log.describe_error(error), last)
        return None
    logger.info("wrote %s", path)
    run.plot.draw()
    return path


def contents(run, state):
    """The dict of a file: the reference's keys, then ours (see utils/checkpoint.py)."""
    settings, vocabulary = run.settings, run.tokenizer.vocabulary
    placement = ("embedding_ipu_id", "embedding_serialization_factor", "layers_per_ipu", "cls_ipu_id", "fp16", "byteio")
    written = {
        "hparams": {**run.hparams, **{name: getattr(settings, name) for name in placement}},
        "vae_params": run.vae.hparams,
        "epoch": (run.step - 1) // run.batches.batches_per_epoch,
        "step": run.step,
        "weights": checkpoint.canonical_weights(state.pop("weights")),
        "opt_state": state.pop("opt_state"),
        "scheduler_state": run.schedule.state_dict(),
        "progress": {key: getattr(run, name) for name, key in PROGRESS.items()},
        "tokenizer": {
            "kind": run.tokenizer.kind,
            "sha256": run.tokenizer.fingerprint,
            "vocabulary": None if vocabulary is None else torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8),
        },
        "vqgan": run.vqgan,
        "data": run.data,
        "sampling": {key: getattr(settings, key) for key in ("top_k", "top_p", "temperature", "cond_scale")},
        "settings": dict(vars(settings)),
        "captions": summarize(run),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    if "ema_weights" in state:
        written["ema_weights"] = checkpoint.canonical_weights(state.pop("ema_weights"))
    return {**written, "trainer": state}
