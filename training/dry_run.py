"""Report what a run would need: parameters, memory, time, disk space. A few updates are made, but nothing is saved."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import statistics
import time
from typing import TYPE_CHECKING, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from backends import explain_out_of_memory
from backends.native.inference import free_memory, read_status, total_memory
from data.images import load_image
from data.loader import RunOrder
from training import checkpoints
from training.loop import describe_less
from utils.checkpoint import size_of

if TYPE_CHECKING:
    from backends.base import StageEstimate
    from training.run import Run

ROUNDS = 3  # of timed steps
PARTS = {
    "text_emb": "text embedding",
    "image_emb": "image embedding",
    "transformer": "layers",
    "to_logits": "head",
    "vae": "VQGAN, frozen",
}


def report(run: Run) -> None:
    """Print one line for each need; ValueError if memory runs out or the output folder cannot be written."""
    for title, text in measure(run):
        if not run.backend.rank:
            print(f"{title + ':':13} {text}", flush=True)


def measure(run: Run) -> Iterator[Tuple[str, str]]:
    """Yield the title and text of each line as soon as it is known."""
    weights = run.trainer.state_dict()["weights"]
    yield "parameters", describe_parameters(weights)
    samples = run.backend.samples_per_step * run.backend.world_size
    validation = f"; {len(run.validation_set):,} in the validation set" if run.validation_set else ""
    yield (
        "steps",
        f"{run.steps - run.step:,} of {samples:,} samples, {run.batches.batches_per_epoch:,} an epoch of "
        f"{len(run.dataset):,} pairs{validation}",
    )
    encoding = describe_encoding(run)
    if encoding:
        yield "codes", encoding
    estimates = run.backend.stage_estimates()
    for number, stage in enumerate(estimates):
        yield f"stage {number}", describe_stage(stage, [other for other in estimates if other.ipu == stage.ipu])
    if run.backend.compile_only:
        yield "time", "unknown without a device"
    else:
        with explain_out_of_memory(describe_less(run)):
            seconds, peak = time_steps(run, weights)
        left = run.steps - run.step
        yield (
            "time",
            f"about {format_seconds(left * seconds)} for {left:,} steps, {seconds:.3g} s each, "
            f"{samples / seconds:.4g} samples/sec (measured), without validation and saving",
        )
        if peak:
            yield "memory", peak
    yield "disk", describe_disk(run)


def describe_parameters(weights: Dict[str, torch.Tensor]) -> str:
    """Count the parameters of each part of the model."""
    sizes = dict.fromkeys([*PARTS.values(), "positions"], 0)
    for name, tensor in weights.items():
        sizes[PARTS.get(name.partition(".")[0], "positions")] += tensor.numel()
    total = sum(sizes.values())
    parts = ", ".join(f"{word} {size:,}" for word, size in sizes.items() if size)
    return f"{total - sizes[PARTS['vae']]:,} trained of {total:,} ({parts})"


def describe_encoding(run: Run) -> Optional[str]:
    """Count the images to encode before training and estimate the time from a few of them; None if all are encoded."""
    datasets = [run.dataset] + ([run.validation_set] if run.settings.validation_folder else [])
    missing = sum(dataset.to_encode for dataset in datasets)
    if not missing:
        return None
    text = f"{missing:,} images to encode once before training"
    if run.backend.kind == "ipu":
        return text
    encode, seconds = run.backend.encode(run.vae), 0.0
    for index in (0, 0, 1):  # the first time is slower
        started = time.monotonic()
        try:
            pixels = torch.from_numpy(load_image(run.dataset.image(index % len(run.dataset)), run.vae.image_size))
        except (ValueError, OSError):
            return text
        encode(pixels.permute(2, 0, 1)[None].float() / 255)
        seconds = time.monotonic() - started
    return f"{text}: about {format_seconds(missing * seconds)} ({seconds:.3g} s an image, measured)"


def describe_stage(stage: StageEstimate, of_ipu: Sequence[StageEstimate]) -> str:
    """Describe a pipeline stage, and the memory of its IPU with all its stages."""
    needed = sum(sum(other.memory.values()) for other in of_ipu)
    shared = f" MB with its {len(of_ipu)} stages" if len(of_ipu) > 1 else ""
    enough = "" if needed < stage.capacity else "; NOT ENOUGH"
    parts = ", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in stage.memory.items() if size)
    return (
        f"on IPU {stage.ipu}, {needed / 1e6:.3g}{shared} of {stage.capacity / 1e6:.3g} MB, calculated without code"
        f"{enough}: {parts}; at least {1000 * stage.seconds:.3g} ms a micro-batch"
    )


def time_steps(run: Run, weights: Dict[str, torch.Tensor]) -> Tuple[float, Optional[str]]:
    """Make a few steps; return the seconds of one and a description of the memory (None without a device to ask).

    If a step has many micro-batches, steps of one and of two are timed: each further one takes what the second does.
    """
    micro_batches, device = run.backend.micro_batches, run.backend.device
    measures = run.backend.kind != "ipu" and peak_memory(device) is not None
    order = RunOrder(run.batches, run.step, run.step + 2 + 2 * ROUNDS)  # the first round only warms up
    times: Dict[int, List[float]] = {1: [], 2: []}  # seconds of steps by their number of micro-batches, 1 for all
    before = 0
    run.trainer.set_lr(run.learning_rate())
    for number, batch in enumerate(run.backend.loader(run.dataset, order)):
        partly = isinstance(batch, Iterator) and micro_batches > 2
        if number == 0:
            run.trainer.compile(batch)
            if measures:
                before = memory_in_use(device)
                forget_peak(device)
        count = 1 + number % 2 if partly else 1
        started = time.monotonic()
        run.trainer.step(itertools.islice(batch, count) if partly else batch)
        times[count].append(time.monotonic() - started)
    first, second = (statistics.median(seconds[1:] or [0.0]) for seconds in times.values())
    step = second + (micro_batches - 2) * max(second - first, 0) if partly else first
    return step, describe_memory(run, weights, before) if measures else None


def forget_peak(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # perhaps not permitted
        file.write("5")


def peak_memory(device: torch.device) -> Optional[int]:
    """Return the most bytes that this process has used since `forget_peak`; None if the system is not Linux."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else read_status("VmHWM")


def memory_in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else read_status("VmRSS") or 0


def describe_memory(run: Run, weights: Dict[str, torch.Tensor], before: int) -> str:
    """Describe the measured peak and what it consists of, in bytes counted from tensors."""
    device = run.backend.device
    peak, total, free = peak_memory(device) or 0, total_memory(device), free_memory(device)
    state = run.trainer.state_dict()
    model = size_of(weights)
    trained = size_of({name: tensor for name, tensor in weights.items() if not name.startswith("vae.")})
    average, optimizer = size_of(state.get("ema_weights")), size_of(state["opt_state"])
    parts = {
        "weights": model,
        "gradients": trained,
        "optimizer": optimizer,
        "average of weights": average,
        "program and data": max(before - model - average, 0),
        "activations": max(peak - before - trained - optimizer, 0),
    }
    return (
        f"{format_bytes(peak)} at the peak of these steps, measured, of {format_bytes(total)} on {run.backend.kind} "
        f"({format_bytes(free)} free): "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    )


def describe_disk(run: Run) -> str:
    """Compare the size of the checkpoints that are kept with the free space; ValueError if the folder is read-only."""
    path = run.folder.path
    if path is None:
        return "no checkpoints are written"
    size = size_of(checkpoints.contents(run, run.trainer.state_dict()))
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--checkpoint-output-dir {path}: cannot be written; give another folder")
    best = run.validation_set is not None
    count = run.settings.keep_checkpoints + best
    free, needed = shutil.disk_usage(place).free, size * (count + 1 - len(run.folder.written))
    return (
        f"{format_bytes(size)} a checkpoint; {format_bytes(needed)} for the newest {run.settings.keep_checkpoints}"
        f"{' and the best' * best}, and one being written; {format_bytes(free)} free in {place}"
        f"{'' if needed < free else '; NOT ENOUGH'}"
    )


def format_bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
