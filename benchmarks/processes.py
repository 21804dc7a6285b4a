"""Two processes of torchrun with one thread each beside one such process: train.py's own throughput lines are read."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train(processes, quick):
    """Samples a second of each line that train.py logs but the first, in which memory is touched for the first time."""
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
        said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
        raise OSError(f"train.py in {processes} processes ended with status {ended.returncode}: {said}")
    return rates[1:] or rates


def two_processes(quick):
    """Beside twice the speed of one process, which is the limit."""
    one, two = train(1, quick), train(2, quick)
    limit = 1 / (2 * statistics.median(one))
    return [1 / rate for rate in two], {"seconds": limit, "of": "two processes alone"}
