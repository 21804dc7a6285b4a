"""The lines that benchmarks.yml reads, the one line that bad input ends in, and what samples a second counts."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import log
from tests.conftest import ROOT
from utils.command_line import exit_on_error

# As examples_utils has them; the last match in a run's output counts.
THROUGHPUT = r"throughput: *(.*?) samples/sec"
LOSS = r"loss: *(\d*\.\d*)"
LOSSES = {"total": 1.25, "text": 0.5, "image": 2.0}


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(log, "time", clock)
    return clock


@pytest.fixture
def program_log():
    """log.set_up() as a command does it; put back afterwards."""
    kept = log.logger.handlers[:], log.logger.level, log.logger.propagate
    log.logger.handlers = []
    log.set_up()
    yield log.logger
    log.logger.handlers, log.logger.propagate = kept[0], kept[2]
    log.logger.setLevel(kept[1])


def test_the_benchmark_finds_its_numbers(program_log, clock, capsys):
    progress = log.Progress(steps=2, first_step=0, samples_per_step=32)
    clock.now += 20
    progress.step(1, 0, {"total": 7.5, "text": 8.0, "image": 9.0}, 3e-4)
    clock.now += 4
    progress.step(2, 1, {"total": 0.0625, "text": 8.0, "image": 9.0}, 3e-4)
    progress.close()
    out = capsys.readouterr().out
    assert re.findall(THROUGHPUT, out) == ["1.60", "2.67"]  # of 20 seconds, and of 24
    assert re.findall(LOSS, out) == ["7.500", "0.062"]  # the total, not text or image
    lines = out.splitlines()
    assert "step 1/2 epoch 0" in lines[0] and "step 2/2 epoch 1" in lines[1] and "lr 3.00e-04" in lines[0]
    assert "text 8.000 image 9.000" in lines[0]
    progress = log.Progress(steps=3, first_step=0, samples_per_step=1)
    for step in (1, 2, 3):
        progress.step(step, 0, LOSSES, 1e-3)  # no time passes at all, and the last step has a line
    assert len(re.findall(THROUGHPUT, capsys.readouterr().out)) == 1


def test_what_lies_between_updates_is_no_training_but_takes_time(program_log, clock, capsys):
    progress = log.Progress(steps=10, first_step=4, samples_per_step=2)
    clock.now += 100  # compilation
    progress.start_clock()
    rates = []
    for step in (5, 6, 7):
        clock.now += 4
        rates.append(progress.step(step, 0, LOSSES, 1e-3))
        with progress.paused():
            clock.now += 20
    assert rates == [0.5, 0.5, 0.5]
    lines = capsys.readouterr().out.splitlines()
    assert re.findall(THROUGHPUT, lines[-1]) == ["0.50"]  # 2 samples in 4 seconds
    assert "00:52 left" in lines[-1]  # 3 more updates, of which these took 3 × 4 + 2 × 20 seconds
    assert len(lines) == 3


def test_bad_input_ends_in_one_line_and_status_2(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["some/where/train.py"])
    errors = {
        "train.py: error: a.txt: no caption in it\n": ValueError("a.txt: no caption\n  in it"),
        "a.txt: No such file or directory\n": FileNotFoundError(2, "No such file or directory", "a.txt"),
        "train.py: error: out: Permission denied\n": PermissionError(13, "Permission denied", "out"),
        "train.py: error: No space left on device\n": OSError(28, "No space left on device"),
        "train.py: error: could not download\n": OSError("could not download"),
        "invalid start byte\n": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    }

    def fail(error):
        with exit_on_error():
            raise error

    for line, error in errors.items():
        assert command(lambda _, error=error: fail(error)).refused(line).out == ""


@pytest.mark.parametrize("words", ["train.py --help", "train.py"])
def test_a_program_whose_output_nobody_reads_ends_quietly(words, tmp_path, tiny_flags):
    command = [sys.executable, *words.split()]
    if words == "train.py":
        command += [*tiny_flags, "--checkpoint-output-dir", tmp_path, "--max-steps", "2"]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")
