"""A run that is killed, again and again, and resumed ends with the weights of one that never stopped."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import ROOT, STANDIN
from utils import checkpoint

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EVERYTHING = "--ff-dropout 0.1 --attn-dropout 0.1 --caption-dropout 0.2 --ema-decay 0.95 --max-grad-norm 0.5"
EVERYTHING += " --weight-decay 0.1 --validation-split 0.2 --validation-steps 7 --checkpoint-save-steps 4"
KINDS = {  # flags, how it is started, steps that it makes in a second or so
    "codes": (EVERYTHING, [], 40),
    "pixels": (f"{EVERYTHING} --no-codes-cache --dataloader-workers 1 --lr-scheduler cosine", [], 40),
    "generated": (f"{EVERYTHING} --generated-data --optimizer AdamW", [], 40),
    "muon": (f"{EVERYTHING} --optimizer Muon --lr-scheduler trapezoid --warmup-steps 20", [], 30),
    "torchrun": (EVERYTHING, TORCHRUN, 20),
    "ipu": ("--device ipu --checkpoint-save-steps 4 --weight-decay 0.1 --optimizer AdamW", [], 20),
}


class Runs:
    """train.py in processes of one thread each, with flags of a kind, into a folder."""

    def __init__(self, kind, seconds, tiny_flags, folder):
        flags, self.launcher, rate = KINDS[kind]
        self.flags = [*tiny_flags, *flags.split(), "--checkpoint-output-dir", str(folder)]
        self.flags += ["--epochs", "100000", "--max-steps", str(rate * seconds), "--checkpoint-save-epochs", "5"]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if kind == "ipu":
            self.environment.update(PYTHONPATH=str(STANDIN), POPLAR_SDK_ENABLED="/opt/poplar")

    def start(self, *more):
        command = [sys.executable, *self.launcher, "train.py", *self.flags, *more]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, **options)

    def whole(self, command, *more):
        """A run to its end, in this process if it needs no other."""
        if self.launcher or "PYTHONPATH" in self.environment:
            process = self.start(*more)
            said = process.communicate(timeout=300)[0]
            assert process.returncode == 0, said
        else:
            command(train.main, *self.flags, *more).ok()

    def killed(self, *more, after):
        """A run that is killed some seconds after its first step → whether it had not ended by then, what it said."""
        process, said = self.start(*more), []
        for line in process.stdout:
            said.append(line)
            if "Compiled model" in line:
                break
        time.sleep(after)
        alive = process.poll() is None
        for number in [process.pid, *descendants(process.pid)] if alive else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        said.append(process.communicate()[0])
        return alive, "".join(said)


def descendants(pid):
    """Processes that a process started, and those that they did; torchrun's have sessions of their own."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def assert_same_end(folder, expected):
    ours, theirs = (
        checkpoint.read(max(path.glob("dalle_*.pt"), key=checkpoint.step_of)) for path in (folder, expected)
    )
    assert ours["step"] == theirs["step"] and ours["progress"] == theirs["progress"]
    assert ours["scheduler_state"] == theirs["scheduler_state"]
    for part in ("weights", "ema_weights"):
        assert (ours.get(part) is None) == (theirs.get(part) is None)
        for name, tensor in (theirs.get(part) or {}).items():
            assert torch.equal(ours[part][name], tensor), (part, name)


@pytest.mark.parametrize(
    "kind, kills", [("codes", 1), *(pytest.param(kind, 20, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_a_run_survives_being_killed(kind, kills, command, tiny_flags, tmp_path):
    seconds = 2 * kills  # the more kills, the longer a run
    Runs(kind, seconds, tiny_flags, tmp_path / "whole").whole(command)
    runs, draw = Runs(kind, seconds, tiny_flags, tmp_path / "killed"), random.Random(f"{kind} {kills}")
    hits = 0
    while hits < kills:
        alive, said = runs.killed("--resume", after=draw.uniform(0, 1.5))
        assert "Traceback" not in said, said
        if not alive:
            break
        hits += 1
    assert hits > kills / 2, said
    runs.whole(command, "--resume")
    assert not list((tmp_path / "killed").glob("*.tmp"))
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
