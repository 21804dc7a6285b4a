"""A run that is killed, again and again, and resumed ends with the weights of one that never stopped."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from tests.conftest import ROOT
from utils import checkpoint

FLAGS = "--ff-dropout 0.1 --attn-dropout 0.1 --caption-dropout 0.2 --ema-decay 0.95 --max-grad-norm 0.5"
FLAGS += " --weight-decay 0.1 --validation-split 0.2 --validation-steps 7 --checkpoint-save-steps 4 --epochs 100000"
FLAGS += " --checkpoint-save-epochs 5 --max-steps"
STEPS = 80  # for each kill: what a process makes in two seconds or so


def start_and_kill(flags, after):
    """Kill train.py some seconds after its first step; return whether it still ran, and what it said."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, env=environment, **options)
    said = []
    for line in process.stdout:
        said.append(line)
        if "Compiled model" in line:
            break
    time.sleep(after)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    return alive, "".join([*said, process.communicate()[0]])


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_survives_being_killed(kills, command, tiny_flags, tmp_path):
    flags = [*tiny_flags, *FLAGS.split(), str(STEPS * kills), "--checkpoint-output-dir"]
    command(train.main, *flags, tmp_path / "whole").ok()
    resumed, chance, hits = [*flags, str(tmp_path / "killed"), "--resume"], random.Random(kills), 0
    while hits < kills:
        alive, said = start_and_kill(resumed, after=chance.uniform(0, 1.5))
        assert "Traceback" not in said, said
        if not alive:
            break
        hits += 1
    assert hits > kills / 2, said
    command(train.main, *resumed).ok()
    assert not list((tmp_path / "killed").glob("*.tmp"))
    paths = [max((tmp_path / name).glob("dalle_*.pt"), key=checkpoint.step_of) for name in ("killed", "whole")]
    ours, theirs = map(checkpoint.read, paths)
    for part in ("step", "progress", "scheduler_state"):
        assert ours[part] == theirs[part]
    for part in ("weights", "ema_weights"):
        torch.testing.assert_close(ours[part], theirs[part], atol=0, rtol=0)
