"""The rows of the benchmark by name, and how one is measured.

Each side of a row, ours and the peer's, runs in a process that does nothing else, so that peak memory can be compared.
"""

import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch

from backends.native.backend import pick_device
from benchmarks import loading, networks
from benchmarks.limits import Measurement, find_limit

ROOT = Path(__file__).resolve().parent.parent


def train_with_torchrun(processes: int, quick: bool) -> List[float]:
    """Return the samples/s that train.py logs in `processes` processes of one thread each.

    The first value is skipped, because memory is touched for the first time there.
    """
    flags = "--generated-data --device cpu --batch-size 16 --gradient-accumulation 1 --dataloader-workers 0 --config "
    flags += "unit_test --max-steps 2" if quick else "L16 --loss-scaling 1 --learning-rate 1e-5 --max-steps 4"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    ended = subprocess.run(
        [sys.executable, *launcher, "train.py", *flags.split(), "--checkpoint-output-dir", ""],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rates = [float(rate) for rate in re.findall(r"throughput: ([\d.]+) samples/sec", ended.stdout)]
    if ended.returncode or not rates:
        last = (ended.stderr.strip() or ended.stdout.strip() or "no output").splitlines()[-1]
        raise OSError(f"train.py in {processes} processes ended with status {ended.returncode}: {last}")
    return rates[1:] or rates


def compare_processes(quick: bool) -> Measurement:
    """Measure two processes; their limit is twice the speed of one."""
    one, two = train_with_torchrun(1, quick), train_with_torchrun(2, quick)
    limit = 1 / (2 * statistics.median(one))
    return [1 / rate for rate in two], {"seconds": limit, "limit_is": "two processes alone"}


class Row(NamedTuple):
    """A row: ours(quick) and theirs(quick), which measure our side and the peer's, in seconds per sample."""

    what: str
    unit: str
    ours: Callable[[bool], Measurement]
    theirs: Optional[Callable[[bool], List[float]]] = None
    peer: Optional[str] = None


def _dalle_row(what: str, unit: str, name: str, size: int) -> Row:
    ours, theirs = getattr(networks, name), getattr(networks, f"{name}_peer")
    return Row(what, unit, partial(ours, size), partial(theirs, size), "dalle-pytorch")


ROWS = {
    "train-4": _dalle_row("training on codes, batch 4", "samples/s", "train", 4),
    "train-16": _dalle_row("training on codes, batch 16", "samples/s", "train", 16),
    "generate-1": _dalle_row("sampling codes, batch 1", "s/image", "generate", 1),
    "generate-8": _dalle_row("sampling codes, batch 8", "s/image", "generate", 8),
    "generate-32": Row("sampling codes, batch 32", "s/image", partial(networks.generate, 32)),  # an hour for the peer
    "demo-1": Row("the demo's codes, batch 1", "s/image", partial(networks.generate_with_demo, 1)),
    "demo-8": Row("the demo's codes, batch 8", "s/image", partial(networks.generate_with_demo, 8)),
    "demo-32": Row("the demo's codes, batch 32", "s/image", partial(networks.generate_with_demo, 32)),
    "start": Row("from start to one image", "s/image", networks.first_image),
    "service": Row("the demo's service, 20 clients", "images/s", networks.serve),
    "encode": Row("images to codes", "images/s", networks.encode, networks.encode_peer, "taming"),
    "decode": Row("codes to images", "images/s", networks.decode, networks.decode_peer, "taming"),
    "load-pixels": Row(
        "loading images", "samples/s", partial(loading.load, codes=False), loading.load_peer, "a plain PIL loop"
    ),
    "load-tar": Row(
        "loading images from tar shards",
        "samples/s",
        partial(loading.load, codes=False, in_tar=True),
        lambda quick: loading.load(quick, codes=False)[0],
        "loose files",
    ),
    "load-codes": Row("loading codes", "samples/s", partial(loading.load, codes=True)),
    "torchrun": Row("2 processes of 1 thread, batch 16", "samples/s", compare_processes),
}


def measure_row(
    name: str, quick: bool, with_peer: bool, report: Callable[[str], Any] = lambda text: None
) -> Dict[str, Any]:
    """Measure a row and return its entry of results.json.

    Args:
        report: called with what is measured next.

    Raises:
        OSError: a process ended early.
    """
    row = ROWS[name]
    report(f"{row.what} ...")
    ours = run_in_process(name, quick, "ours")
    found: Dict[str, Any] = {"name": name, "what": row.what, "unit": row.unit, "ours": _summarize(ours, row.unit)}
    found.update(peer=None, peer_name=None, ratio=None, limit=None, limit_is=None, of_limit=None)
    found["passes"] = ours["passes"]
    if ours["limit"] is not None:
        seconds, found["limit_is"] = ours["limit"]
        seconds = min(seconds, *ours["seconds"])  # what the row reached is possible, whatever was measured after it
        found.update(limit=_convert(seconds, row.unit), of_limit=seconds / statistics.median(ours["seconds"]))
    if with_peer and row.theirs is not None:
        found["peer_name"] = row.peer
        report(f"{row.what}, {row.peer} ...")
        theirs = run_in_process(name, quick, "theirs")
        found["peer"] = _summarize(theirs, row.unit)
        found["ratio"] = statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])
    return found


def _convert(seconds: float, unit: str) -> float:
    return seconds if unit.startswith("s/") else 1 / seconds


def _summarize(measurement: Dict[str, Any], unit: str) -> Dict[str, Any]:
    values = [_convert(seconds, unit) for seconds in measurement["seconds"]]
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
        "peak_memory_mb": measurement["peak_memory_mb"],
    }


def run_in_process(name: str, quick: bool, side: str) -> Dict[str, Any]:
    """Return the seconds, peak memory and limit of one side of a row, from a process that only imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rows"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, name, quick, side, torch.get_num_threads()))
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


def _measure(sender: Any, name: str, quick: bool, side: str, threads: int) -> None:
    torch.set_num_threads(threads)
    device = pick_device("auto")
    try:
        if side == "ours":
            seconds, work = ROWS[name].ours(quick)
        else:
            seconds, work = ROWS[name].theirs(quick), None  # type: ignore[misc]
        memory = peak_memory(device)  # before the limit is measured, which takes memory too
        limit = work and find_limit(work, device, quick)
        passes = work and work.get("passes")
        sender.send({"seconds": seconds, "peak_memory_mb": memory, "limit": limit, "passes": passes})
    except Exception as error:  # the parent reports it in one line
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def peak_memory(device: torch.device) -> float:
    """Return the MB of the GPU, or else of this process or the largest that it started, whichever is more."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # POSIX only

    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most / (2**20 if sys.platform == "darwin" else 2**10)
