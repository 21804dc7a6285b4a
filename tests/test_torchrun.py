"""train.py and generate.py under torchrun: two processes do what one does, and one that dies is noticed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate
import train
from tests.conftest import ROOT
from utils import checkpoint


def start(script, *arguments):
    """torchrun with two processes of one thread each; → the launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def assert_same_weights(one, other):
    ours, theirs = (checkpoint.model_weights(checkpoint.read(path)["weights"]) for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("optimizer", ["Adam", "Muon"])
def test_two_processes_train_as_one(command, tiny_flags, tmp_path, optimizer):
    flags = [*tiny_flags, "--epochs", 2, "--batch-size", 2, "--gradient-accumulation", 2, "--optimizer", optimizer]
    flags += ["--learning-rate", "1e-3", "--max-grad-norm", 0.5, "--keep-checkpoints", 9]
    alone = command(train.main, *flags, "--checkpoint-output-dir", tmp_path / "alone")
    seen = ["--sample-steps", 4, "--checkpoint-output-dir", tmp_path / "together"]
    status, out, err = ended(start("train.py", *flags, *seen))
    assert status == 0, err
    for name in ("dalle_0.pt", "dalle_1.pt"):
        assert_same_weights(tmp_path / "together" / name, tmp_path / "alone" / name)
    losses = [re.findall(r"(step 6/6 .* loss: .*) lr", log) for log in (alone.out, out)]
    assert losses[0] == losses[1] and len(losses[1]) == 1  # rank 0 alone logs
    for name in ("step_4.png", "step_6.png", "captions.txt"):
        assert (tmp_path / "together/samples" / name).exists()
    lines = [json.loads(line) for line in (tmp_path / "together/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # rank 0's alone
    assert "12 pictures, 6 steps of 4 samples" in out and "in 2 processes" in out
    assert sorted(path.name for path in (tmp_path / "together").glob("*.pt")) == ["dalle_0.pt", "dalle_1.pt"]


def test_one_process_goes_on_where_two_stopped(command, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--epochs", 2, "--checkpoint-output-dir", tmp_path]
    status, _, err = ended(start("train.py", *flags, "--max-steps", 4))
    assert status == 0, err
    resumed = command(train.main, *flags, "--pretrained-checkpoint", tmp_path / "dalle_step_4.pt")
    assert resumed.status == 0 and "at step 4" in resumed.out and "afresh" not in resumed.out
    whole = command(train.main, *tiny_flags, "--epochs", 2, "--checkpoint-output-dir", tmp_path / "whole")
    assert whole.status == 0
    assert_same_weights(tmp_path / "dalle_1.pt", tmp_path / "whole" / "dalle_1.pt")


def test_what_processes_cannot_share_is_refused_in_one_line(tiny_flags):
    status, _, err = ended(start("train.py", *tiny_flags, "--batch-size", 3))
    told = [line for line in err.splitlines() if line.startswith("train.py: error:")]
    assert status != 0 and told and all("2 processes cannot share evenly" in line for line in told)


@pytest.mark.slow  # a race with the launcher's signals by its nature; run by hand
def test_a_process_that_dies_ends_the_run_with_a_checkpoint(command, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--epochs", 4000, "--checkpoint-output-dir", tmp_path]
    flags += ["--checkpoint-save-epochs", 100000, "--checkpoint-save-steps", 7]
    launcher = start("train.py", *flags)
    while not list(tmp_path.glob("dalle_step_*.pt")):
        time.sleep(0.1)
        assert launcher.poll() is None, launcher.communicate()[1]
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (second,) = [pid for pid in children if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(int(second), signal.SIGKILL)
    status, out, err = ended(launcher)
    assert status != 0
    told = re.search(
        r"(another process of this run has ended|stopped after step \d+); go on with .* (\S+\.pt)", out + err
    )
    saved = checkpoint.read(told.group(2))
    steps = [int(path.stem.rpartition("_")[2]) for path in tmp_path.glob("dalle_step_*.pt")]
    assert saved["step"] == max(steps)
    more = ("--max-steps", saved["step"] + 1, "--pretrained-checkpoint", told.group(2))
    assert command(train.main, *flags, *more).status == 0


def test_prompts_are_shared_out(command, tiny_checkpoint, tmp_path):
    flags = ["--dalle_path", tiny_checkpoint, "--text", "red | blue | red | green", "--num_images", 2, "--seed", 3]
    flags += ["--device", "cpu", "--precision", "fp32"]
    status, out, err = ended(start("generate.py", *flags, "--outputs_dir", tmp_path / "shared"))
    assert status == 0, err
    assert sorted(re.findall(r"2 pictures of '(\w+)'", out)) == ["blue", "green", "red", "red"]
    assert command(generate.main, *flags, "--outputs_dir", tmp_path / "alone").status == 0
    pictures = [
        {path.relative_to(tmp_path / where): path.read_bytes() for path in (tmp_path / where).rglob("*.jpg")}
        for where in ("shared", "alone")
    ]
    assert len(pictures[0]) == 8 and pictures[0] == pictures[1]
