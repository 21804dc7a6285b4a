"""Several processes: how they divide a step, what is reported if they are lost, and that none leaves threads behind."""

import os
import re

import pytest

from backends.native.backend import split_step
from tests.builders import ROOT, TORCHRUN, python


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


TRAIN = """
import atexit, contextlib, os
from pathlib import Path

def report(when):
    names = [when]
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it is just ending
            names.append(path.read_text().strip())
    os.write(1, (" ".join(names) + "\\n").encode())  # in one piece, unlike print()

atexit.register(report, "after")  # called last, after everything registered later
from backends.native.backend import NativeTrainingBackend
from tests.backends.native.test_backend import samples, settings
from tests.builders import small_dalle
from tests.conftest import TinyTokenizer

def train():
    backend = NativeTrainingBackend(settings(batch_size=4))
    trainer = backend.trainer(small_dalle(TinyTokenizer()))
    trainer.step([samples(2)])
    trainer.evaluate([[samples(2)]])
    trainer.state_dict()
    return backend

train()
report("before")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_the_process_group_outlives_its_work(tmp_path):
    """A thread that releases tensors after the interpreter has ended aborts the process, now and then."""
    (tmp_path / "program.py").write_text(TRAIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = python(*TORCHRUN, tmp_path / "program.py", env=environment)
    assert ended.returncode == 0, ended.stderr
    before, after = (re.findall(f"{when} (.*)", ended.stdout) for when in ("before", "after"))
    assert len(before) == len(after) == 2 and all("gloo" in names for names in before)
    assert not any("gloo" in names for names in after), after
