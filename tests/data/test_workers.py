"""Pictures that go bad and worker processes that are killed while train.py runs: it goes on, and tells."""

import multiprocessing
import os
import re
import signal

import pytest
import torch

import data.dataset
import train
from data.loader import RESTARTS
from tests.builders import assert_same_weights
from training.loop import Loop


@pytest.fixture
def trained(command, tiny_flags, picture_folder, tmp_path):
    """trained(*flags): train.py on pixels of picture_folder, 12 steps → (output folder, Ended)."""
    flags = ["--input-folder", picture_folder, "--no-codes-cache", "--epochs", 4, "--dataloader-workers", 2]

    def run(*more, name="out"):
        folder = tmp_path / name
        return folder, command(train.main, *tiny_flags, *flags, "--checkpoint-output-dir", folder, *more)

    return run


def after_updates(monkeypatch, count, act):
    """act() happens once, as soon as `count` updates are made."""
    update, made = Loop.update, []

    def updating(*arguments):
        losses = update(*arguments)
        made.append(losses)
        if len(made) == count:
            act()
        return losses

    monkeypatch.setattr(Loop, "update", updating)


def worker_reads(monkeypatch, bad, act=lambda path: os.kill(os.getpid(), signal.SIGKILL)):
    """act(path), by default the worker's death, where a worker reads an image for which bad(path)."""
    parent, read = os.getpid(), data.dataset.load_image

    def reading(path, size):
        if os.getpid() != parent and bad(path):
            act(path)
        return read(path, size)

    monkeypatch.setattr(data.dataset, "load_image", reading)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_go_bad_are_replaced_and_counted(trained, picture_folder, monkeypatch, workers):
    def spoil():
        (picture_folder / "03.png").unlink()
        (picture_folder / "07.png").write_bytes((picture_folder / "07.png").read_bytes()[:200])

    after_updates(monkeypatch, 2, spoil)
    folder, ended = trained("--dataloader-workers", workers)
    ended.ok()
    assert (folder / "dalle_3.pt").exists() and torch.load(folder / "dalle_3.pt", weights_only=True)["step"] == 12
    for name in ("03.png", "07.png") if workers == 0 else ():  # a worker's own lines do not come into capsys
        assert len(re.findall(f"{name}.*using another image instead", ended.out)) == 1, ended.out
    assert "2 images could not be read" in ended.out.splitlines()[-1]


def test_when_no_picture_is_left_the_run_saves_and_ends(trained, picture_folder, monkeypatch):
    def spoil():
        for path in picture_folder.glob("*.png"):
            path.unlink()

    after_updates(monkeypatch, 4, spoil)
    folder, ended = trained()
    assert "Traceback" not in ended.out
    said = re.search(r"none of its 12 images can be read .* --pretrained-checkpoint (\S+)", ended.refused().err)
    step = torch.load(said[1], weights_only=True)["step"]
    assert said[1] == str(folder / f"dalle_step_{step}.pt") and 4 <= step < 12
    assert "12 images could not be read" in ended.out


def test_a_picture_that_kills_workers_is_left_out(trained, monkeypatch, picture_folder):
    worker_reads(monkeypatch, lambda path: path.name == "03.png")
    folder, ended = trained()
    ended.ok()
    told = [line for line in ended.out.splitlines() if "DataLoader worker" in line]
    assert len(told) == 1 and f"reading {picture_folder / '03.png'}; another image replaces it" in told[0]
    assert "1 image could not be read" in ended.out

    def unreadable(path):
        raise ValueError(f"{path}: cannot be read")

    monkeypatch.undo()
    worker_reads(monkeypatch, lambda path: path.name == "03.png", unreadable)
    other, ended = trained(name="other")
    ended.ok()
    assert_same_weights(folder / "dalle_3.pt", other / "dalle_3.pt")  # as if it had been unreadable


def test_a_worker_killed_from_outside_changes_nothing(trained, monkeypatch):
    undisturbed, _ = trained("--gradient-accumulation", 3, "--batch-size", 1)
    killed = []

    def kill_one():
        victim = multiprocessing.active_children()[0]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)  # torch's handler is to find it

    step = Loop.update

    def killing_within(loop, batch):
        def parts():
            for number, part in enumerate(batch):
                if number == 1 and loop.run.step == 5 and not killed:
                    kill_one()  # gradients of one micro-batch of three are there
                yield part

        return step(loop, parts())

    monkeypatch.setattr(Loop, "update", killing_within)
    folder, ended = trained("--gradient-accumulation", 3, "--batch-size", 1, name="killed")
    assert ended.ok() and killed
    assert f"(pid {killed[0]}) is killed by signal: Killed" in ended.out and "new workers continue" in ended.out
    assert_same_weights(undisturbed / "dalle_3.pt", folder / "dalle_3.pt")


def test_workers_that_go_on_being_killed_end_the_run_after_saving(trained, monkeypatch, picture_folder):
    spoilt = picture_folder / "spoilt"
    worker_reads(monkeypatch, lambda path: spoilt.exists())
    after_updates(monkeypatch, 2, spoilt.touch)
    folder, ended = trained()
    assert "Traceback" not in ended.out
    said = re.search(
        rf"worker \(pid.* reading ({re.escape(str(picture_folder))}/\d\d\.png).*; if memory ran out, fewer "
        r"--dataloader-workers need less; resume with --pretrained-checkpoint (\S+)",
        ended.refused().err,
    )
    assert ended.out.count("new workers continue") == RESTARTS
    step = torch.load(said[2], weights_only=True)["step"]
    assert said[2] == str(folder / f"dalle_step_{step}.pt") and step >= 2
