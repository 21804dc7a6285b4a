"""The rows of the benchmark by name, and how one is measured: in a process of its own, so that its peak memory is its
own, ours and the peer's in turn.
"""

import multiprocessing
import resource
import statistics
import sys
from functools import partial
from typing import Callable, NamedTuple, Optional

import torch

from backends.native.backend import pick_device
from benchmarks import loading, network, processes, vqgan
from benchmarks.limits import limit_of

DALLE_PYTORCH, TAMING = "dalle-pytorch", "taming"


class Row(NamedTuple):
    """ours(quick) → (seconds a sample, one number a repetition; work as limits.limit_of wants it, or
    None). theirs(quick) → seconds a sample.
    """

    what: str
    unit: str
    ours: Callable
    theirs: Optional[Callable] = None
    peer: Optional[str] = None


def dalle(what, unit, name, size, with_peer=True):
    ours, theirs = getattr(network, name), getattr(network, f"their_{name}")
    return Row(what, unit, partial(ours, size), partial(theirs, size) if with_peer else None, DALLE_PYTORCH)


ROWS = {
    "train-4": dalle("training from codes, batch 4", "samples/s", "training", 4),
    "train-16": dalle("training from codes, batch 16", "samples/s", "training", 16),
    "prefill": dalle("reading 8 captions and codes", "samples/s", "prefill", 8),
    "draw-1": dalle("drawing codes, 1 at once", "s/picture", "drawing", 1),
    "draw-8": dalle("drawing codes, 8 at once", "s/picture", "drawing", 8),
    "draw-32": dalle("drawing codes, 32 at once", "s/picture", "drawing", 32, with_peer=False),  # takes it an hour
    "encode": Row("pictures to codes", "pictures/s", vqgan.encoding, vqgan.their_encoding, TAMING),
    "decode": Row("codes to pictures", "pictures/s", vqgan.decoding, vqgan.their_decoding, TAMING),
    "load-pixels": Row(
        "loading pictures", "samples/s", partial(loading.loading, codes=False), loading.their_loading, "a loader"
    ),
    "load-codes": Row("loading codes", "samples/s", partial(loading.loading, codes=True)),
    "torchrun": Row("2 processes of 1 thread, batch 16", "samples/s", processes.two_processes),
}


def shown(seconds, unit):
    """Seconds a sample in the unit of a row."""
    return seconds if unit.startswith("s/") else 1 / seconds


def measured(name, quick, with_peer, say=lambda text: None):
    """A row as results.json has it; say(text) is told what is measured now. OSError where a process ended early."""
    row = ROWS[name]
    say(f"{row.what} ...")
    ours = in_a_process(name, quick, "ours")
    found = {"name": name, "what": row.what, "unit": row.unit, "ours": summary(ours, row.unit)}
    found.update(peer=None, peer_name=None, ratio=None, limit=None, limit_is=None, of_limit=None)
    if ours["limit"] is not None:
        seconds, found["limit_is"] = ours["limit"]
        found.update(limit=shown(seconds, row.unit), of_limit=seconds / statistics.median(ours["seconds"]))
    if with_peer and row.theirs is not None:
        found["peer_name"] = loading.peer_name() if name == "load-pixels" else row.peer
        say(f"{row.what}, {found['peer_name']} ...")
        theirs = in_a_process(name, quick, "theirs")
        found["peer"] = summary(theirs, row.unit)
        found["ratio"] = statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])
    return found


def summary(measurement, unit):
    values = [shown(seconds, unit) for seconds in measurement["seconds"]]
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
        "peak_memory_mb": measurement["peak_memory_mb"],
    }


def in_a_process(name, quick, side):
    """What measure() gives, in a process that has loaded torch and nothing else yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rows"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, name, quick, side, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise OSError(f"{name}, {side}: the process ended with status {process.exitcode}") from None
    process.join()
    if isinstance(result, str):
        raise OSError(f"{name}, {side}: {result}")
    return result


def measure(sender, name, quick, side, threads):
    """Sends the seconds, the peak memory and, of ours, the limit; or in one line what went wrong."""
    torch.set_num_threads(threads)
    device = pick_device("auto")
    try:
        if side == "ours":
            seconds, work = ROWS[name].ours(quick)
        else:
            seconds, work = ROWS[name].theirs(quick), None
        memory = peak_memory(device)  # before the limit is measured, which takes memory too
        sender.send({"seconds": seconds, "peak_memory_mb": memory, "limit": work and limit_of(work, device, quick)})
    except Exception as error:  # the parent tells it in one line
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def peak_memory(device):
    """MB: of the GPU where there is one, else of this process or the largest that it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most / (2**20 if sys.platform == "darwin" else 2**10)
