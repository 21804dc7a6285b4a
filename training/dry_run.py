"""What a run would take, told before it begins: parameters, memory, steps, time, room for checkpoints.

A few steps are really made on the model as it is; nothing is saved and nothing is encoded.
"""

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from data.images import load_image
from data.order import RunOrder
from training import checkpoints

ROUNDS = 20  # of timed steps, at most
ENOUGH = 10.0  # seconds of timed steps, after two rounds
PICTURES = 2  # encoded to see how long that takes
PARTS = {
    "text_emb": "text embedding",
    "image_emb": "image embedding",
    "transformer": "layers",
    "to_logits": "head",
    "vae": "VQGAN, frozen",
}


def empty_codes(dataset, vae, cache):
    """In place of load_codes: codes of nothing, and in dataset.to_encode how many are wanted.

    Codes take the same time whatever they say.
    """
    dataset.to_encode = sum(picture not in cache for picture in dataset.images)
    dataset.attach_codes(np.broadcast_to(np.uint16(0), (len(dataset), vae.image_seq_len)))


def tell(run):
    """Print it all, one line each. ValueError where a step finds no memory, or the output folder cannot be written."""
    for title, said in lines(run):
        if not run.backend.rank:
            print(f"{title + ':':13} {said}", flush=True)


def lines(run):
    """(title, words), each as soon as it is known."""
    weights = run.trainer.state_dict()["weights"]
    yield "parameters", parameters(weights)
    together = run.backend.samples_per_step * run.backend.world_size
    yield (
        "steps",
        f"{run.steps - run.step:,} of {together:,} samples, {run.batches.batches_per_epoch:,} an epoch of "
        f"{len(run.dataset):,} pairs"
        + (f"; {len(run.validation_set):,} in the validation set" if run.validation_set else ""),
    )
    encoding = to_encode(run)
    if encoding:
        yield "codes", encoding
    yield from per_stage(run, weights)
    if run.backend.compile_only:
        yield "time", "not known without a device"
    else:
        try:
            seconds, held = steps(run, run.backend.memory, weights)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise ValueError("a step finds no memory on this device; lower --batch-size or the model's size") from None
        yield "time", duration(seconds, run)
        if held:
            yield "memory", held
    for said in disk(run):
        yield "disk", said


def parameters(weights):
    sizes = dict.fromkeys(PARTS.values(), 0)
    for name, tensor in weights.items():
        part = name.partition(".")[0]
        part = next((word for prefix, word in PARTS.items() if part == prefix), "positions")
        sizes[part] = sizes.get(part, 0) + tensor.numel()
    total = sum(sizes.values())
    parts = ", ".join(f"{word} {size:,}" for word, size in sizes.items() if size)
    return f"{total - sizes[PARTS['vae']]:,} trained of {total:,} ({parts})"


def to_encode(run):
    """How many pictures have no codes yet, and how long those of a few of them take."""
    sets = [run.dataset] + ([run.validation_set] if run.settings.validation_folder else [])
    missing = sum(getattr(dataset, "to_encode", 0) for dataset in sets)
    if not missing:
        return None
    if run.backend.kind == "ipu":
        return f"{missing:,} pictures to encode first, once"
    encode = run.backend.encode(run.vae)
    taken = []
    for name, _, _ in itertools.islice(itertools.cycle(run.dataset.images), 1 + PICTURES):
        started = time.monotonic()
        try:
            pixels = torch.from_numpy(load_image(run.dataset.folder / name, run.vae.image_size))
        except (ValueError, OSError):
            continue
        encode(pixels.permute(2, 0, 1)[None].float() / 255)
        taken.append(time.monotonic() - started)
    if len(taken) < 2:
        return f"{missing:,} pictures to encode first, once"
    each = min(taken[1:])  # the first is slower
    return f"{missing:,} pictures to encode first, once: about {hours(missing * each)} ({each:.3g} s a picture, tried)"


def steps(run, memory, weights):
    """A few steps → (seconds of a whole one, what is said of memory; None without a device to measure).

    Of a step of many micro-batches one and two are made, as further ones take what the second does.
    """
    micro = run.backend.micro_batches
    order = RunOrder(run.batches, run.step, run.step + 2 * ROUNDS + 1)
    taken = {}
    before = 0
    run.trainer.set_lr(run.schedule.at(run.step, run.epoch()))
    started = None
    for number, batch in enumerate(run.backend.loader(run.dataset, order)):
        in_parts = isinstance(batch, Iterator) and micro > 2
        if number == 0:
            run.trainer.compile(batch)
            if memory is not None:
                before = memory.in_use()
                memory.forget_peak()
        count = (2, 1)[number % 2] if in_parts else micro
        batch = itertools.islice(batch, count) if in_parts else batch
        at = time.monotonic()
        run.trainer.step(batch)
        if number > in_parts:  # the first round only warms up
            started = started or at
            taken.setdefault(count, []).append(time.monotonic() - at)
        rounds = min((len(taken.get(n, ())) for n in ((1, 2) if in_parts else (micro,))), default=0)
        if rounds >= ROUNDS or (rounds >= 2 and time.monotonic() - started > ENOUGH):
            break
    seconds = {count: statistics.median(times) for count, times in taken.items()}
    further = (micro - 2) * max(seconds[2] - seconds[1], 0) if in_parts else 0
    whole = seconds[2 if in_parts else micro] + further
    return whole, None if memory is None else held(run, weights, before, memory.peak())


def held(run, weights, before, peak):
    """The measured peak, and of what it is counted to consist."""
    state = run.trainer.state_dict()
    ours = size(weights)
    trained = size({name: tensor for name, tensor in weights.items() if not name.startswith("vae.")})
    average, optimizer = size(state.get("ema_weights")), size(state["opt_state"])
    parts = {"weights": ours, "gradients": trained, "optimizer": optimizer, "average of weights": average}
    parts["program and data"] = max(before - ours - average, 0)
    parts["activations"] = max(peak - before - trained - optimizer, 0)
    consists = ", ".join(f"{name} {gigabytes(part)}" for name, part in parts.items() if part)
    there, left = run.backend.memory.total(), run.backend.memory.free()
    enough = "" if peak < there else "; NOT ENOUGH"
    return (
        f"{gigabytes(peak)} at the peak of these steps, measured, of {gigabytes(there)} on {run.backend.kind} "
        f"({gigabytes(left)} free beside it){enough}: {consists}"
    )


def per_stage(run, weights):
    """Yield a line for each stage of an IPU pipeline: its memory as estimated from the settings."""
    for number, (ipu, parts) in enumerate(run.backend.stage_memory(weights)):
        consists = ", ".join(f"{name} {gigabytes(part)}" for name, part in parts.items())
        yield f"stage {number}", f"on IPU {ipu}, {gigabytes(sum(parts.values()))} without activations: {consists}"


def duration(seconds, run):
    left = run.steps - run.step
    rate = run.backend.samples_per_step * run.backend.world_size / seconds
    return (
        f"about {hours(left * seconds)} for {left:,} steps, {seconds:.3g} s each, {rate:.4g} samples/sec (timed), "
        "without validation and saving"
    )


def disk(run):
    """The size of checkpoints against the room there is; nothing without an output folder."""
    path = run.folder.path
    if path is None:
        yield "no checkpoints are written"
        return
    each = size(checkpoints.contents(run, run.trainer.state_dict()))
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--checkpoint-output-dir {path}: cannot be written; give another folder")
    count = run.settings.keep_checkpoints + (run.validation_set is not None)
    room, wanted = shutil.disk_usage(place).free, each * (count + 1 - len(run.folder.written))
    best = " and the best" if run.validation_set is not None else ""
    kept = f"the newest {run.settings.keep_checkpoints}{best}"
    yield (
        f"{gigabytes(each)} a checkpoint; {gigabytes(wanted)} for {kept}, and "
        f"one being written; {gigabytes(room)} free in {place}" + ("" if wanted < room else "; NOT ENOUGH")
    )


def size(value):
    """Bytes of all tensors within."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0


def gigabytes(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def hours(seconds):
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
