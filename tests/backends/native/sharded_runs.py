"""What test_sharding.py has two processes of torchrun do: train sharded, and put aside what they hold.

    torchrun --nproc-per-node 2 sharded_runs.py FOLDER

FOLDER/start_<optimizer>.pt is a state to go on from; FOLDER/<rank>.pt tells what came of it.
"""

import atexit
import contextlib
import os
import sys
from pathlib import Path

import torch

from backends.native.backend import NativeTrainingBackend
from tests.backends.native.test_backend import OPTIMIZERS, settings
from tests.backends.native.test_sharding import PER_STEP, SETTINGS, STEPS, dalle_with_vqgan, pictures
from tests.builders import samples


def own(whole, rank):
    """This process's micro-batches of a step's samples."""
    half = PER_STEP // 2
    return list(zip(*(part[rank * half : (rank + 1) * half].split(SETTINGS["batch_size"]) for part in whole)))


def held(values):
    """Bytes of these tensors that lie in this process."""
    parts = [value.to_local() if hasattr(value, "to_local") else value for value in values]
    return sum(part.numel() * part.element_size() for part in parts)


def run(optimizer, folder):
    backend = NativeTrainingBackend(settings(shard=True, optimizer=optimizer, **SETTINGS))
    trainer = backend.trainer(dalle_with_vqgan())
    trainer.load_state_dict(torch.load(folder / f"start_{optimizer}.pt", weights_only=True))
    evaluated = trainer.evaluate([own((samples(PER_STEP)[0], pictures(PER_STEP)), backend.rank)])
    losses = [trainer.step(own(samples(PER_STEP, seed), backend.rank)) for seed in range(STEPS, 2 * STEPS)]
    unevenly = [own(samples(PER_STEP), 0), own(samples(PER_STEP), 1)] if backend.rank else []
    unevenly = trainer.evaluate(unevenly)
    state = trainer.state_dict()
    trainer.backpropagate(own(samples(PER_STEP), backend.rank))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    moments = [value for each in trainer.optimizers for kept in each.state.values() for value in kept.values()]
    sizes = {"parameters": held(trained), "gradients": held(parameter.grad for parameter in trained)}
    sizes["moments"] = held(value for value in moments if value.dim())
    sizes["vqgan"] = held(trainer.model.vae.parameters())
    return {"state": state, "losses": losses, "evaluated": evaluated, "unevenly": unevenly, **sizes}


def half_precision():
    given = {**SETTINGS, "precision": "bf16", "max_grad_norm": None}
    backend = NativeTrainingBackend(settings(shard=True, optimizer="AdamW", **given))
    trainer = backend.trainer(dalle_with_vqgan())
    return [trainer.step(own(samples(PER_STEP, seed), backend.rank)) for seed in range(STEPS)]


def report_threads(when):
    """Print the names of this process's threads, in one piece, unlike print()."""
    names = [when]
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it is just ending
            names.append(path.read_text().strip())
    os.write(1, (" ".join(names) + "\n").encode())


if __name__ == "__main__":
    atexit.register(report_threads, "after")  # called last, after everything registered later
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    results = {optimizer: run(optimizer, place) for optimizer in OPTIMIZERS}
    results["bf16"] = half_precision()
    torch.save(results, place / f"{torch.distributed.get_rank()}.pt")
    report_threads("before")
