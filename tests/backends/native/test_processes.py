"""Several processes: how they divide a step, what is reported if they are lost, and that none leaves threads behind."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.distributed import fsdp

from backends.native.backend import Processes, split_step
from tests.conftest import ROOT, STANDIN


@pytest.mark.parametrize(
    "batch_size, micro_batches, size, expected",
    [
        (4, 6, 1, (4, 6)),
        (4, 6, 3, (4, 2)),
        (8, 1, 2, (4, 1)),  # smaller micro-batches if there is only one
        (6, 1, 3, (2, 1)),
        (4, 3, 2, (3, 2)),  # six samples each, in the largest micro-batches that fit
        (1, 8, 8, (1, 1)),
    ],
)
def test_processes_take_together_what_one_takes(batch_size, micro_batches, size, expected):
    assert split_step(batch_size, micro_batches, size) == expected
    assert expected[0] * expected[1] * size == batch_size * micro_batches and expected[0] <= batch_size


def test_an_uneven_step_is_refused():
    with pytest.raises(ValueError, match="^one step takes 9 samples .* not a multiple of the 2 processes$"):
        split_step(3, 3, 2)


def test_a_single_process_exchanges_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes()
    alone.connect(torch.device("cpu"))
    assert (alone.rank, alone.size) == (0, 1)
    assert torch.equal(alone.mean(torch.arange(3.0)), torch.arange(3.0))
    with pytest.raises(RuntimeError, match="Connection closed"), alone.losses_explained():
        raise RuntimeError("Connection closed by peer")


def test_a_missing_meeting_place_is_reported_in_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="the other processes cannot be reached: .*MASTER_ADDR") as error:
        Processes().connect(torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_only_a_lost_connection_counts_as_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = Processes()
    with pytest.raises(ConnectionError, match="another process of this run has ended"), processes.losses_explained():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="out of memory"), processes.losses_explained():
        raise RuntimeError("out of memory")


REPORT_THREADS = """
import atexit, contextlib, os, sys
from pathlib import Path

def report(when):
    names = [when]
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it is just ending
            names.append(path.read_text().strip())
    os.write(1, (" ".join(names) + "\\n").encode())  # in one piece, unlike print()

atexit.register(report, "after")  # called last, after everything registered later
"""
TRAIN = """
from backends.native.backend import NativeTrainingBackend
from tests.backends.native.test_backend import samples, settings
from tests.builders import small_dalle
from tests.conftest import TinyTokenizer

def train():
    backend = NativeTrainingBackend(settings(batch_size=4, shard="shard" in sys.argv))
    trainer = backend.trainer(small_dalle(TinyTokenizer()))
    trainer.step([samples(2)])
    trainer.evaluate([[samples(2)]])
    trainer.state_dict()
    return backend

train()
report("before")
"""
EXCHANGE = """
os.environ["POPDIST_INSTANCE_INDEX"] = os.environ["RANK"]
import horovod.torch as hvd, popdist, torch
popdist.init()
hvd.init()
hvd.allreduce(torch.ones(3))
report("before")
"""


PROGRAMS = [(TRAIN, ""), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((TRAIN, "shard"), (EXCHANGE, "")))]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("program, flag", PROGRAMS)
def test_no_thread_of_the_process_group_outlives_its_work(tmp_path, program, flag):
    """A thread that releases tensors after the interpreter has ended aborts the process, now and then."""
    if flag and not hasattr(fsdp, "fully_shard"):
        pytest.skip("fully_shard came with torch 2.6")
    script = tmp_path / "program.py"
    script.write_text(REPORT_THREADS + program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{STANDIN}", "STANDIN_STORE": "store"}
    environment.update(POPDIST_NUM_TOTAL_REPLICAS="2", POPDIST_NUM_LOCAL_REPLICAS="1", POPDIST_NUM_INSTANCES="2")
    ended = subprocess.run(
        [*launcher, script, flag], env={**os.environ, **environment}, capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    before, after = (re.findall(f"{when} (.*)", ended.stdout) for when in ("before", "after"))
    assert len(before) == len(after) == 2 and all("gloo" in names for names in before)
    assert not any("gloo" in names for names in after), after
