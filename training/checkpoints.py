"""Decide when a run writes a checkpoint, what it contains and which ones are kept."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import platform
import re
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Set

import torch

from utils.checkpoint import EXAMPLE_CHARACTERS, EXAMPLES, LAYOUT, MAX_WORDS, PREFIX, split_words, step_of
from utils.errors import describe_error, first_line
from utils.files import AnyPath, atomic_write, claim_folder, defer_signals, remove_leftovers

if TYPE_CHECKING:
    from training.run import Run
    from utils.checkpoint import Checkpoint, Tensors

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
logger = logging.getLogger("minidalle")


class CheckpointFolder:
    """The checkpoints in --checkpoint-output-dir, oldest first in `written`; `path` is None if nothing is written.

    Raises:
        ValueError: it holds another run's checkpoints and no flag says to resume them.
    """

    def __init__(self, settings: Namespace, writes: bool = True):
        self.settings, self.writes = settings, writes
        used = settings.checkpoint_output_dir and not settings.synthetic_data  # which trains on nothing
        self.path = Path(settings.checkpoint_output_dir) if used else None
        self.claim = contextlib.ExitStack()  # ends when closed
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
        """Create and claim the folder; ValueError if it cannot be written, or another run writes to it."""
        if self.path is not None and self.writes:
            self.claim = claim_folder(self.path, "--checkpoint-output-dir")
            remove_leftovers(self.path, *FILES)  # of a killed run

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
    steps = {path: step_of(path) for path in found}

    def age(path: Path) -> float:
        step = steps[path]
        if step is not None:
            return step
        return max((s for p, s in steps.items() if s is not None and times[p] <= times[path]), default=-1) + 0.5

    return sorted(found, key=lambda path: (age(path), times[path]))


def collect_captions(run: Run) -> Dict[str, Any]:
    """Return the words and some examples of the training captions; they are collected once per run."""
    if run.captions is None:
        dataset, decode, count = run.dataset, run.tokenizer.decode, 4 * EXAMPLES
        rows = [number * len(dataset) // count for number in range(count)]  # some are equal or too long
        examples = (" ".join(decode(tokens).split()) for row in rows for tokens in dataset.captions(row)[:1])
        texts = (decode(tokens) for row in range(len(dataset)) for tokens in dataset.captions(row))
        run.captions = summarize_captions(texts, examples)
    return run.captions


def summarize_captions(captions: Iterable[str], examples: Iterable[str]) -> Dict[str, Any]:
    """Return a checkpoint's `captions` entry: {"words": {word: count}, "examples": [caption]}."""
    counts = collections.Counter(word for caption in captions for word in split_words(caption))
    short = (caption for caption in examples if caption and len(caption) <= EXAMPLE_CHARACTERS)
    return {"words": dict(counts.most_common(MAX_WORDS)), "examples": list(dict.fromkeys(short))[:EXAMPLES]}


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
    except ConnectionError:  # one of them is gone, so the last checkpoint stays the newest
        return folder.written[-1] if folder.written and not run.backend.rank else None
    folder.saved_at = time.monotonic()
    if run.backend.rank:
        return None
    run.trackers.flush()  # a run that resumes from the checkpoint must not lack a line
    path = folder.path / name
    with defer_signals():
        try:
            write(path, contents(run, state))
            if name != BEST:
                folder.add(path)
        except OSError as error:
            logger.warning("no checkpoint of step %d: %s%s", run.step, describe_error(error), describe_last(run))
            return None
    logger.info("wrote %s", path)
    return path


def describe_last(run: Run) -> str:
    """Name the last good checkpoint, as the end of a sentence ("" without one)."""
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
        "weights": canonical_weights(state.pop("weights")),
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
        "captions": collect_captions(run),
        "versions": {"layout": LAYOUT, "python": platform.python_version(), "torch": str(torch.__version__)},
    }
    if "ema_weights" in state:
        content["ema_weights"] = canonical_weights(state.pop("ema_weights"))
    return {**content, "trainer": state}


def canonical_weights(state: Tensors) -> Tensors:
    """Return a DALLE's state dict under the names that files use."""
    return {PREFIX + name: tensor.detach().cpu() for name, tensor in state.items()}


def write(path: AnyPath, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and read it back before it replaces an older one; OSError, with that one still there."""
    try:
        with atomic_write(path, sync=True) as file:
            torch.save(checkpoint, file)
            file.flush()
            with zipfile.ZipFile(file.name) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("checksum differs")
    except zipfile.BadZipFile as error:
        raise OSError(f"{path}: what was written cannot be read back ({first_line(error)})") from error
    except RuntimeError as error:  # torch's writer raises it when the disk is full
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: could not be written ({first_line(reason)})") from error
