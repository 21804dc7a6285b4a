"""What a run records: metrics.jsonl, resumed or not, loss.png, and trackers that cannot stop it."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageColor

import log
import train
from tests.builders import metrics_in
from training.loop import Loop
from utils import checkpoint


def lines_of(folder):
    """The lines of a run, without the times."""
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in metrics_in(folder)]


@pytest.fixture
def flags(tiny_flags):
    """Six steps of three epochs, a validation after every step, a checkpoint after every other."""
    steps = "--epochs 3 --batch-size 3 --max-steps 6 --validation-split 0.25 --validation-steps 1 --ff-dropout 0.2"
    return [*tiny_flags, *steps.split(), "--checkpoint-save-steps", 2, "--checkpoint-save-epochs", 99]


def test_every_update_and_validation_has_a_line_even_if_the_run_was_killed(command, flags, tmp_path):
    whole = tmp_path / "whole"
    ended = command(train.main, *flags, "--checkpoint-output-dir", whole).ok()
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    updates, validations = lines[::2], lines[1::2]
    losses = {"loss/total", "loss/text", "loss/image"}
    assert all(line.keys() == {"step", "epoch", "lr", "grad_norm", *losses} for line in updates)
    assert [line["epoch"] for line in updates] == [0, 0, 0, 1, 1, 1] and updates[0]["lr"] == 3e-3
    for line in updates:
        assert line["loss/total"] == pytest.approx((line["loss/text"] + 7 * line["loss/image"]) / 8)
    for line in validations:
        assert f"step {line['step']} validation: total {line['held-out/total']:.4f}" in ended.out
    saved = checkpoint.read(whole / "dalle_1.pt")["progress"]
    assert saved["held_out_loss"] == validations[-1]["held-out/total"]
    written = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for left in ("dalle_step_4.pt", None):
        killed = tmp_path / f"killed {left}"
        killed.mkdir()  # as a kill between two steps leaves it: lines beyond the checkpoint, the last one torn
        if left:
            shutil.copy(whole / left, killed)
        (killed / "metrics.jsonl").write_bytes(b"".join(written[:9]) + written[9][:30])
        assert command(train.main, *flags, "--checkpoint-output-dir", killed, "--resume").status == 0
        assert lines_of(killed) == lines and not list(killed.glob("*.tmp"))


def test_damage_is_dropped_and_what_is_not_finite_is_null(tmp_path):
    good = b'{"step": 1}\n{"step": 2, "loss/total": null}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b'\x00\x00\x00\n[1]\n{"lr": 2}\n"step"\n' + good + b'{"step": 3}\n')
    file = log.MetricsFile(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    file.log(3, {"loss/total": float("nan"), "grad_norm": float("inf"), "epoch": 0, "skipped": True})
    file.close()
    assert lines_of(tmp_path)[2] == {"step": 3, "loss/total": None, "grad_norm": None, "epoch": 0, "skipped": True}


@pytest.mark.parametrize("steps", [1, 1200])
def test_a_plot_has_its_curves(tmp_path, steps):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            losses = {f"loss/{name}": scale * 9 / step for name, scale in (("total", 1), ("text", 2), ("image", 0.5))}
            validation = {name.replace("loss", "held-out"): value * 1.1 for name, value in losses.items()}
            if step == 777:
                losses = {**dict.fromkeys(losses, None), "skipped": True}
            validations = [{**validation, "held-out/perplexity": 2.0}] * (step % 500 == 0)
            for line in ({"epoch": 0, **losses, "lr": 1e-3}, *validations):
                file.write(json.dumps({"step": step, **line}) + "\n")
        file.write('{"step": 1234, "loss/to')
    log.MetricsFile(tmp_path / "metrics.jsonl", 10**6).close()
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"), dtype=int)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    for color in log.COLORS.values():
        seen = (abs(pixels - ImageColor.getrgb(color)).sum(-1) < 30).sum()
        assert seen > 300 if steps > 1 else seen < 300


def test_without_matplotlib_a_run_says_so_once(command, tiny_flags, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = command(train.main, *tiny_flags, "--checkpoint-output-dir", tmp_path, "--checkpoint-save-steps", 1)
    assert ended.status == 0 and ended.out.count("matplotlib is not installed") == 1
    assert not (tmp_path / "loss.png").exists() and (tmp_path / "metrics.jsonl").exists()


class Run:
    """What wandb.init gives, as far as it is used."""

    def __init__(self, given):
        self.given, self.seen, self.finished = given, [], 0

    def log(self, figures, step):
        self.seen.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `runs` holds what was begun, `faults` what init raises, by mode."""
    package = types.ModuleType("wandb")
    package.runs, package.faults = [], {}
    package.Image = lambda image: ("image", image)

    def init(mode="online", **given):
        if mode in package.faults:
            raise package.faults[mode]
        package.runs.append(Run({"mode": mode, **given}))
        return package.runs[-1]

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_LOGIN_TIMEOUT", "1")
    return package


TRACKED = ["--wandb", "--sample-steps", 2, "--validation-split", 0.25, "--validation-steps", 2, "--batch-size", 3]


def test_weights_and_biases_gets_figures_pictures_and_settings(command, tiny_flags, wandb):
    command(train.main, *tiny_flags, *TRACKED, "--wandb-run-name", "mine", "--max-grad-norm", 0.5).ok()
    (run,) = wandb.runs
    assert (run.given["mode"], run.given["project"], run.given["name"]) == ("online", "miniDALL-E", "mine")
    assert run.given["config"]["max_grad_norm"] == 0.5 and run.given["config"]["hidden_size"] == 32
    sizes = [(step, len(figures)) for step, figures in run.seen]
    assert sizes == [(1, 7), (2, 7), (2, 4), (2, 1), (3, 7), (3, 4), (3, 1)]
    names = {name for _, figures in run.seen for name in figures}
    assert names >= {"lr", "epoch", "samples_per_second", "grad_norm", "samples"}
    assert {f"{group}/{loss}" for group in ("loss", "held-out") for loss in ("total", "text", "image")} < names
    kind, image = run.seen[3][1]["samples"]
    assert kind == "image" and image.size[0] == 80 + 3 * 166 and run.finished == 1


def test_without_a_login_it_is_recorded_offline_and_else_not_at_all(command, tiny_flags, wandb):
    wandb.faults["online"] = RuntimeError("api_key not configured (no-tty).")
    ended = command(train.main, *tiny_flags, *TRACKED)
    assert ended.status == 0 and wandb.runs[0].given["mode"] == "offline" and wandb.runs[0].finished == 1
    (line,) = [line for line in ended.out.splitlines() if "--wandb" in line]
    assert "api_key not configured (no-tty); recording offline" in line
    wandb.faults["offline"] = OSError(28, "No space left on device")
    ended = command(train.main, *tiny_flags, *TRACKED)
    assert ended.status == 0 and len(wandb.runs) == 1 and "the run continues without it" in ended.out


@pytest.mark.parametrize("how, status", [(KeyboardInterrupt(), 130), (KeyError(), 1)])
def test_trackers_are_closed_however_a_run_ends(command, tiny_flags, wandb, monkeypatch, tmp_path, how, status):
    def end(loop, changed):
        raise how

    monkeypatch.setattr(Loop, "_finish_update", end)
    flags = [*tiny_flags, "--wandb", "--checkpoint-output-dir", tmp_path]
    if status == 1:
        with pytest.raises(KeyError):
            command(train.main, *flags)
    else:
        assert command(train.main, *flags).status == status
    assert wandb.runs[0].finished == 1 and [step for step, _ in wandb.runs[0].seen] == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 and (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("flag, module", [("--wandb", "a mere folder"), ("--tensorboard", None)])
def test_a_missing_package_ends_in_one_line_at_once(command, tiny_flags, monkeypatch, tmp_path, flag, module):
    name = flag.strip("-")
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if module else None)
    assert command(train.main, *tiny_flags, "--max-steps", 1).status == 0  # without the flag nothing is asked for
    ended = command(train.main, *tiny_flags, flag, "--checkpoint-output-dir", tmp_path)
    ended.refused(f"{flag}: the package {name} is not installed; pip install {name}")
    assert ended.err.count("\n") == 1 and "Compiled" not in ended.out and not list(tmp_path.glob("[!.]*"))


def test_tensorboard_holds_what_a_run_and_its_continuation_gave(command, tiny_flags, tmp_path):
    command(train.main, *tiny_flags, "--tensorboard").refused("--tensorboard: needs a --checkpoint-output-dir")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*tiny_flags, "--tensorboard", *TRACKED[1:], "--checkpoint-output-dir", tmp_path]
    assert command(train.main, *flags).status == 0
    command(train.main, *flags, "--resume", "--epochs", 2).ok()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("held-out/image")] == [2, 3, 4, 6]
    assert [event.step for event in events.Images("samples")] == [2, 3, 4, 6]
    assert {"lr", "epoch", "samples_per_second", "grad_norm"} <= set(events.Tags()["scalars"])
    assert any("settings" in tag for tag in events.Tags()["tensors"])
