"""What happens to a run when the world around it fails: disks, numbers, files. Each ends as the README says."""

import contextlib
import math
import re

import torch

import train
from backends.native.trainer import NativeTrainer
from utils import checkpoint

SAVES = ["--checkpoint-save-steps", 2, "--epochs", 3, "--checkpoint-save-epochs", 9]  # nine steps


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
