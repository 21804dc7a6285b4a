"""What happens to a run when the world around it fails: disks, numbers, files. Each ends as the README says."""

import contextlib
import math
import re
import subprocess

import pytest
import torch

import train
from backends.native.trainer import NativeTrainer
from utils import checkpoint

SAVES = ["--checkpoint-save-steps", 2, "--epochs", 3, "--checkpoint-save-epochs", 9]  # nine steps


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(command, tiny_flags, small_disk):
    folder = small_disk  # for three checkpoints of 7.0 MB, not four; a new one is written before the oldest goes
    flags = [*tiny_flags, *SAVES, "--checkpoint-output-dir", folder]
    ended = command(train.main, *flags, "--keep-checkpoints", 9).refused("its last checkpoint was not written")
    told = [line for line in ended.out.splitlines() if "no checkpoint of step" in line]
    assert [int(re.search(r"step (\d+)", line)[1]) for line in told] == [8, 9], ended.out
    assert all("No space left" in line and str(folder / "dalle_step_6.pt") in line for line in told)
    files = {path.name for path in folder.glob("dalle*")}
    assert files == {"dalle_step_2.pt", "dalle_step_4.pt", "dalle_step_6.pt"}  # whole ones, and no half ones
    assert all(checkpoint.read(folder / name)["step"] for name in files)
    for name in ("dalle_step_2.pt", "dalle_step_4.pt"):
        (folder / name).unlink()
    ended = command(train.main, *flags, "--resume").ok()
    assert "at step 6" in ended.out and checkpoint.read(folder / "dalle_2.pt")["step"] == 9


@contextlib.contextmanager
def spoilt_losses(monkeypatch, steps):
    """Within: the loss of these updates (counted from 1) is not a number."""
    original, count = NativeTrainer.backpropagate, [0]

    def losses(self, batch):
        count[0] += 1
        found = original(self, batch)
        if count[0] in steps:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(math.nan)
            found[0] = math.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(NativeTrainer, "backpropagate", losses)
        yield


def test_a_batch_without_a_finite_loss_is_left_out(command, tiny_flags, tmp_path, monkeypatch):
    with spoilt_losses(monkeypatch, {3, 5, 7}):
        ended = command(train.main, *tiny_flags, *SAVES, "--checkpoint-output-dir", tmp_path)
    assert ended.status == 0 and len(re.findall(r"step [357]: .* not finite, update skipped", ended.out)) == 3
    saved = checkpoint.read(tmp_path / "dalle_2.pt")
    assert saved["progress"]["skipped"] == 3 and saved["trainer"]["updates"] == 6 and saved["step"] == 9
    total, count = checkpoint.read(tmp_path / "dalle_step_8.pt")["progress"]["epoch_loss"]
    assert count == 1 and math.isfinite(total)  # of steps 7 and 8 only the second counts
    assert all(torch.isfinite(tensor).all() for tensor in saved["weights"].values() if tensor.is_floating_point())


def test_too_many_such_batches_end_the_run(command, tiny_flags, tmp_path, monkeypatch):
    flags = [*tiny_flags, "--epochs", 30, "--checkpoint-save-epochs", 2, "--checkpoint-output-dir", tmp_path]
    with spoilt_losses(monkeypatch, set(range(8, 1000))):
        ended = command(train.main, *flags)
    ended.refused("no longer finite at step 17", "--learning-rate", f"the last good checkpoint is {tmp_path}")
