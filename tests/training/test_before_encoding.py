"""Building a run: what is refused before time is spent, and where caches go."""

import pytest

import train
from backends.native.backend import NativeTrainingBackend
from tests.builders import train_settings
from training import run as run_module


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch-size 2 --gradient-accumulation 8192", "--batch-size 2 --gradient-accumulation 1 would fit"),
        (
            "--batch-size 4 --gradient-accumulation 2 --replication-factor 2",
            "--batch-size 4 --gradient-accumulation 1 would",
        ),
        ("--batch-size 12 --validation-split 0.1", "12 samples, but the set has 11; --batch-size 1 "),
    ],
)
def test_too_small_a_set_is_refused_before_it_is_encoded(command, tiny_flags, monkeypatch, flags, words, tmp_path):
    monkeypatch.setattr(run_module, "load_codes", None)
    ended = command(train.main, *tiny_flags, "--codes-cache", tmp_path, *flags.split())
    assert ended.status == 2 and words in ended.err and "--config photos" in ended.err, ended
    monkeypatch.undo()
    fitting = ended.err.rpartition("; ")[2].partition(" would fit")[0].split()
    command(train.main, *tiny_flags, *flags.split(), *fitting, "--max-steps", 1).ok()


def test_a_pipeline_of_ipus_takes_the_flags_that_would_fit(poptorch_standin, command, tiny_flags):
    flags = [*tiny_flags, "--device", "ipu", "--no-async-dataloader", "--max-steps", 1]
    flags += ["--ipus-per-replica", 2, "--layers-per-ipu", "1,1", "--batch-size", 2, "--gradient-accumulation", 64]
    ended = command(train.main, *flags)
    assert "--batch-size 2 --gradient-accumulation 3 would fit" in ended.err
    assert command(train.main, *flags, "--gradient-accumulation", 3).status == 0
    assert "the set has 2; 3 or more would fit" in command(train.main, *flags, "--validation-split", 0.8).err


def test_a_read_only_folder_has_its_caches_elsewhere(command, tiny_flags, picture_folder, tmp_path, monkeypatch):
    def refuse(folder, flag):
        if str(folder) == str(picture_folder):  # root may write everywhere
            raise ValueError("read-only")

    def run():
        return command(train.main, *flags, "--input-folder", picture_folder, "--max-steps", 1).ok()

    monkeypatch.setattr(run_module, "check_writable", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = [flag for flag in tiny_flags if flag != "--codes-cache" and "codes" not in flag]
    before = sorted(picture_folder.iterdir())
    for _ in range(2):
        out = run().out
        assert f"{picture_folder} is read-only; codes and tokens are cached in" in out
    assert "encoding images" not in out
    assert sorted(picture_folder.iterdir()) == before
    (cache,) = (tmp_path / "home" / ".cache" / "mini-dalle").iterdir()
    assert {path.name.partition("-")[0] for path in cache.iterdir()} >= {"captions", "codes"}
    monkeypatch.setattr(run_module, "check_writable", lambda folder, flag: None)
    run()
    monkeypatch.setattr(run_module, "check_writable", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "other_home"))
    out = run().out
    assert "is read-only" in out and "encoding images" not in out  # its own cache has all codes


def test_settings_for_ipus_are_counted_not_listed(logged):
    NativeTrainingBackend(train_settings("--config L16"))
    (line,) = [line for line in logged.messages if "IPU" in line]
    assert line == "for IPUs only, without effect here: 8 settings of the configuration"
