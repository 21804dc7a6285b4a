"""metrics.jsonl: a line for every update and validation, the same whether a run was killed and resumed or not."""

import json
import shutil

import pytest

import log
import train
from utils import checkpoint


def lines_of(folder):
    """The lines of a run, without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


@pytest.fixture
def flags(tiny_flags):
    """Six steps of three epochs, a validation after every step, a checkpoint after every other."""
    return [
        *(*tiny_flags, "--epochs", 3, "--batch-size", 3, "--gradient-accumulation", 1, "--max-steps", 6),
        *("--validation-split", 0.25, "--validation-steps", 1, "--checkpoint-save-steps", 2),
        *("--checkpoint-save-epochs", 99, "--keep-checkpoints", 9, "--ff-dropout", 0.2),
    ]


def test_every_update_and_validation_has_a_line(command, flags, tmp_path):
    ended = command(train.main, *flags, "--checkpoint-output-dir", tmp_path)
    assert ended.status == 0, ended
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    updates, validations = lines[::2], lines[1::2]
    losses = {"loss/total", "loss/text", "loss/image"}
    assert all(line.keys() == {"step", "epoch", "lr", "grad_norm", *losses} for line in updates)
    assert [line["epoch"] for line in updates] == [0, 0, 0, 1, 1, 1] and updates[0]["lr"] == 3e-3
    for line in updates:
        assert line["loss/total"] == pytest.approx((line["loss/text"] + 7 * line["loss/image"]) / 8)
    for line in validations:
        assert f"step {line['step']} validation: total {line['held-out/total']:.4f}" in ended.out
    saved = checkpoint.read(tmp_path / "dalle_1.pt")["progress"]
    assert saved["held_out_loss"] == validations[-1]["held-out/total"]


@pytest.mark.parametrize("left", ["dalle_step_4.pt", None])
def test_a_run_that_was_killed_and_resumed_has_the_lines_of_one_that_was_not(command, flags, tmp_path, left):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(train.main, *flags, "--checkpoint-output-dir", whole).status == 0
    killed.mkdir()  # as a kill between two steps leaves it: lines beyond the checkpoint, the last one torn
    if left:
        shutil.copy(whole / left, killed)
    written = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_bytes(b"".join(written[:9]) + written[9][:30])
    assert command(train.main, *flags, "--checkpoint-output-dir", killed, "--resume").status == 0
    assert lines_of(killed) == lines_of(whole)
    assert not list(killed.glob("*.tmp"))


def test_lines_of_other_runs_and_damage_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\x00\x00\x00\n[1]\n{"lr": 2}\n"step"\n{"step": 2, "loss/total": null}\n{"step": 3}\n'
    )
    log.MetricsFile(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "loss/total": null}\n'


def test_what_is_not_finite_is_null(tmp_path):
    file = log.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log(1, {"loss/total": float("nan"), "grad_norm": float("inf"), "epoch": 0, "skipped": True})
    file.close()
    (line,) = lines_of(tmp_path)
    assert line == {"step": 1, "loss/total": None, "grad_norm": None, "epoch": 0, "skipped": True}
