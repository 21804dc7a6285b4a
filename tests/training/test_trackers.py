"""Trackers get every figure and picture; none of them can stop a run; their packages are asked for by flag only."""

import sys
import types

import pytest

import train
from training.loop import Loop


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


FLAGS = ["--wandb", "--sample-steps", 2, "--validation-split", 0.25, "--validation-steps", 2, "--batch-size", 3]


def test_weights_and_biases_gets_figures_pictures_and_settings(command, tiny_flags, wandb):
    command(train.main, *tiny_flags, *FLAGS, "--wandb-run-name", "mine", "--max-grad-norm", 0.5).ok()
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
    ended = command(train.main, *tiny_flags, *FLAGS)
    assert ended.status == 0 and wandb.runs[0].given["mode"] == "offline" and wandb.runs[0].finished == 1
    (line,) = [line for line in ended.out.splitlines() if "--wandb" in line]
    assert "api_key not configured (no-tty); recording offline" in line
    wandb.faults["offline"] = OSError(28, "No space left on device")
    ended = command(train.main, *tiny_flags, *FLAGS)
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


@pytest.mark.parametrize(
    "flag, name, module", [("--wandb", "wandb", "a mere folder"), ("--tensorboard", "tensorboard", None)]
)
def test_a_missing_package_ends_in_one_line_at_once(command, tiny_flags, monkeypatch, tmp_path, flag, name, module):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if module else None)
    assert command(train.main, *tiny_flags, "--max-steps", 1).status == 0  # without the flag nothing is asked for
    ended = command(train.main, *tiny_flags, flag, "--checkpoint-output-dir", tmp_path)
    ended.refused(f"{flag}: the package {name} is not installed; pip install {name}")
    assert ended.err.count("\n") == 1 and "Compiled" not in ended.out and not list(tmp_path.iterdir())


def test_tensorboard_holds_what_a_run_and_its_continuation_gave(command, tiny_flags, tmp_path):
    command(train.main, *tiny_flags, "--tensorboard").refused("--tensorboard: needs a --checkpoint-output-dir")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*tiny_flags, "--tensorboard", *FLAGS[1:], "--checkpoint-output-dir", tmp_path]
    assert command(train.main, *flags).status == 0
    command(train.main, *flags, "--resume", "--epochs", 2).ok()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("held-out/image")] == [2, 3, 4, 6]
    assert [event.step for event in events.Images("samples")] == [2, 3, 4, 6]
    assert {"lr", "epoch", "samples_per_second", "grad_norm"} <= set(events.Tags()["scalars"])
    assert any("settings" in tag for tag in events.Tags()["tensors"])
