"""A run's folder of checkpoints: which file is the newest, what a second run may do there, what is told apart."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
import train_vqgan
from tests.builders import metrics_in, start
from training import checkpoints
from utils import checkpoint


@pytest.fixture(scope="module")
def trained(tiny_flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    flags = ["--epochs", 3, "--checkpoint-save-steps", 2, "--keep-checkpoints", 9, "--checkpoint-output-dir", path]
    train.main([*tiny_flags, *map(str, flags)])
    return path


@pytest.fixture
def folder(trained, tmp_path):
    """Nine steps of three epochs, with checkpoints after 2, 3, 4, 6, 8 and 9."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resumed(command, tiny_flags, folder, *flags):
    return command(train.main, *tiny_flags, "--checkpoint-output-dir", folder, "--resume", *flags)


def test_resume_takes_the_newest_good_file(folder, command, tiny_flags):
    steps = ["dalle_step_2.pt", "dalle_0.pt", "dalle_step_4.pt", "dalle_1.pt", "dalle_step_8.pt", "dalle_2.pt"]
    for number, path in enumerate(sorted(folder.glob("*.pt"))):
        os.utime(path, (number, number))  # as a copy in order of names leaves them
    assert [path.name for path in checkpoints.sort_by_age(folder)] == steps
    assert [checkpoint.step_of(folder / name) for name in steps] == [2, 3, 4, 6, 8, 9]
    newest = folder / "dalle_2.pt"
    content = bytearray(newest.read_bytes())
    method = content.index(b"PK\1\2") + 10  # of compression, in the archive's directory
    content[method] ^= 99
    newest.write_bytes(content)
    assert checkpoint.step_of(newest) is None
    content[method] ^= 99
    newest.write_bytes(content)
    whole, expected = newest.read_bytes(), checkpoint.read(newest)["weights"]
    names = ("dalle_step_8.pt", "loss.png", "metrics.jsonl", "samples/captions.txt", "samples/step_8.png")
    left, foreign = [folder / f"{name}.77.tmp" for name in names], folder / "notes.77.tmp"
    (folder / "samples").mkdir(exist_ok=True)
    for path in [*left, foreign]:
        path.write_bytes(b"half of a file")
    for damaged in (whole[: len(whole) // 2], whole[:-100000] + bytes(100) + whole[-99900:], b""):
        newest.write_bytes(damaged)
        ended = resumed(command, tiny_flags, folder, "--epochs", 3).ok()
        assert f"{newest}: damaged" in ended.out and "trying the previous checkpoint" in ended.out
        assert f"resuming from {folder / 'dalle_step_8.pt'} at step 8" in ended.out
        again = checkpoint.read(newest)["weights"]  # the same step, bit for bit
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
        assert foreign.exists() and not any(path.exists() for path in left)


def test_two_runs_do_not_write_to_one_folder(folder, command, tiny_flags, drawn_pictures):
    claim = "import os, sys, time; from utils.files import claim_folder; claim = claim_folder(sys.argv[1], '--x')\n"
    claim += "os.fork() and print('claimed', flush=True); time.sleep(60)"  # as a worker lives on after a kill
    with start("-c", claim, folder, start_new_session=True) as other:
        assert other.stdout.readline() == "claimed\n"
        reason = f"{folder}: another run is writing to it"
        resumed(command, tiny_flags, folder, "--epochs", 3).refused(f"--checkpoint-output-dir {reason}")
        flags = "--input-folder", drawn_pictures, "--output-dir", folder
        command(train_vqgan.main, *flags).refused(f"--output-dir {reason}")
        assert resumed(command, tiny_flags, folder, "--epochs", 4, "--dry-run").status == 0  # it writes nothing
        other.kill()
        other.wait()
        resumed(command, tiny_flags, folder, "--epochs", 3).ok()
        os.killpg(other.pid, signal.SIGKILL)


def test_a_finished_run_is_not_replaced_and_resuming_none_begins(folder, command, tiny_flags, tmp_path):
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    other = shutil.copy(folder / "dalle_0.pt", tmp_path / "other.pt")
    for flags in ([], ["--pretrained-checkpoint", other]):
        ended = command(train.main, *tiny_flags, "--checkpoint-output-dir", folder, "--epochs", 9, *flags)
        ended.refused("--checkpoint-output-dir", str(folder), "dalle_2.pt", "--resume")
    resumed(command, tiny_flags, folder, "--epochs", 3).ok()
    assert {path: path.read_bytes() for path in folder.glob("*.pt")} == before
    ended = resumed(command, tiny_flags, tmp_path / "new", "--max-steps", 1).ok()
    assert "starting a new run" in ended.out and (tmp_path / "new/dalle_step_1.pt").exists()
    for path in folder.glob("*.pt"):
        path.write_bytes(b"no checkpoint")
    resumed(command, tiny_flags, folder, "--epochs", 3).refused("can be read", "--resume")


def test_differences_are_told(folder, command, tiny_flags, picture_folder):
    (picture_folder / "00.txt").write_text("a caption of its own\n")
    newest = folder / "dalle_2.pt"
    checkpoints.write(newest, {**checkpoint.read(newest), "versions": {"torch": "1.2.3"}})
    flags = ["--epochs", 4, "--learning-rate", 0.5, "--input-folder", picture_folder]
    ended = resumed(command, tiny_flags, folder, *flags)
    told = [line for line in ended.out.splitlines() if "unlike the run that wrote it" in line]
    assert ended.status == 0 and len(told) == 4
    assert "--learning-rate 0.5, was 0.003" in told[1] and f"torch {torch.__version__}, was 1.2.3" in told[2]
    assert "other images or captions" in told[3]
    assert "--epochs 4, was 3" in told[0]


def test_a_full_disk_does_not_stop_the_run(command, tiny_flags, tmp_path, monkeypatch):
    original = torch.save

    def full(content, file, *given):
        """Fail as torch does, which does not say why; the end of step 6 is the run's last checkpoint."""
        if isinstance(content, dict) and content.get("step", 0) >= 4:
            file.write(b"half of a file")
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos 448 vs 341")  # noqa: B904
        original(content, file, *given)

    monkeypatch.setattr(torch, "save", full)
    flags = ["--checkpoint-save-steps", 2, "--epochs", 2, "--checkpoint-output-dir", tmp_path, "--keep-checkpoints", 1]
    ended = command(train.main, *tiny_flags, *flags).refused("its last checkpoint was not written")
    told = [line for line in ended.out.splitlines() if "no checkpoint of step" in line]
    assert [int(re.search(r"step (\d+)", line)[1]) for line in told] == [4, 6]
    assert all("No space left" in line and str(tmp_path / "dalle_0.pt") in line for line in told)
    assert [path.name for path in tmp_path.glob("dalle*")] == ["dalle_0.pt"]


def test_ctrl_c_during_a_write_that_fails_still_stops_the_run(command, tiny_flags, tmp_path, monkeypatch):
    original = torch.save

    def interrupted(*given):
        monkeypatch.setattr(torch, "save", original)
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", interrupted)
    flags = ["--checkpoint-save-steps", 2, "--epochs", 2, "--checkpoint-output-dir", tmp_path]
    ended = command(train.main, *tiny_flags, *flags)
    assert ended.status == 130 and "no checkpoint of step 2" in ended.out
    assert f"stopped after step 2; resume with --pretrained-checkpoint {tmp_path / 'dalle_step_2.pt'}" in ended.out


def test_the_best_file_is_one_to_go_on_from(command, tiny_flags, tmp_path):
    """Where nothing else was written before a kill, --resume takes it; the epoch that ended with it counts once."""
    flags = ["--validation-split", 0.25, "--batch-size", 3, "--epochs", 4, "--checkpoint-save-epochs", 4]  # 12 steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command(train.main, *tiny_flags, *flags, "--checkpoint-output-dir", whole).ok()
    command(train.main, *tiny_flags, *flags, "--max-steps", 3, "--checkpoint-output-dir", killed).ok()
    best = checkpoint.read(killed / "dalle_best.pt")
    for path in killed.glob("dalle_*"):
        if path.name != checkpoints.BEST:
            path.unlink()
    ended = resumed(command, tiny_flags, killed, *flags)
    assert ended.status == 0 and f"resuming from {killed / checkpoints.BEST} at step {best['step']}" in ended.out
    expected, found = checkpoint.read(whole / "dalle_3.pt"), checkpoint.read(killed / "dalle_3.pt")
    for part in ("scheduler_state", "progress", "step"):
        assert found[part] == expected[part]
    assert all(torch.equal(tensor, expected["weights"][name]) for name, tensor in found["weights"].items())


def test_the_best_by_validation_loss_is_kept(command, tiny_flags, tmp_path):
    flags = ["--validation-split", 0.25, "--validation-steps", 1, "--epochs", 8, "--learning-rate", 0.03]
    flags += ["--checkpoint-output-dir", tmp_path, "--batch-size", 3, "--keep-checkpoints", 1]
    ended = command(train.main, *tiny_flags, *flags)
    losses = [*map(float, re.findall(r"validation: total (\S+)", ended.ok().out))]
    assert "9 images" in ended.out and "3 images in the validation set" in ended.out and len(losses) == 24
    best = checkpoint.read(tmp_path / "dalle_best.pt")
    assert best["step"] == 1 + losses.index(min(losses)) < 24  # at this rate it does not end at its best
    assert best["progress"]["best_loss"] == pytest.approx(min(losses), abs=1e-4)
    last = checkpoint.read(tmp_path / "dalle_7.pt")
    assert last["progress"]["best_loss"] == best["progress"]["best_loss"]
    assert not torch.equal(last["weights"]["model.text_emb.weight"], best["weights"]["model.text_emb.weight"])


def metrics_of(folder):
    return {line["step"]: (line["epoch"], line["lr"]) for line in metrics_in(folder) if "lr" in line}


def test_another_batch_size_continues_at_the_same_place(command, tiny_flags, tmp_path):
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--checkpoint-output-dir", folder, "--lr-scheduler", "multi_step", "--keep-checkpoints", 9]
    assert command(train.main, *flags, "--batch-size", 1, "--epochs", 3).status == 0
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    ended = command(train.main, *flags, "--batch-size", 3, "--epochs", 6, "--resume").ok()
    assert "3 samples a step, was 1: continuing in epoch 3 after 0 of 12 samples, 12 steps to go" in ended.out
    found = metrics_of(folder)
    assert [epoch for epoch, _ in found.values()] == [n // 12 for n in range(36)] + [3 + n // 4 for n in range(12)]
    whole = tmp_path / "whole"  # what a run of this batch size has at the same place
    assert command(train.main, *flags, "--batch-size", 3, "--epochs", 6, "--checkpoint-output-dir", whole).status == 0
    assert [found[36 + n] for n in range(1, 13)] == [metrics_of(whole)[12 + n] for n in range(1, 13)]
    assert {path: path.read_bytes() for path in before} == before
    assert checkpoint.step_of(folder / "dalle_5.pt") == 48


def test_a_grown_folder_replaces_no_file(command, tiny_flags, picture_folder, drawn_pictures, tmp_path):
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--input-folder", picture_folder, "--checkpoint-output-dir", folder, "--keep-checkpoints", 9]
    assert command(train.main, *flags, "--epochs", 3).status == 0  # 36 samples
    for path in sorted(drawn_pictures.iterdir()):
        shutil.copy(path, picture_folder / f"more_{path.name}")
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    ended = command(train.main, *flags, "--epochs", 3, "--resume").ok()
    assert "24 training images, was 12: continuing in epoch 1 after 12 of 24 samples, 9 steps to go" in ended.out
    assert {path: path.read_bytes() for path in before} == before  # the end of epoch 1 has another name
    assert {path.name for path in {*folder.glob("*.pt")} - {*before}} == {"dalle_step_12.pt", "dalle_step_18.pt"}
