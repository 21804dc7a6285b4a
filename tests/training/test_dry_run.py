"""What is refused before time is spent, where caches go, and train.py --dry-run against the run that it tells about."""

import re
from pathlib import Path

import pytest
import torch

import train
from tests.builders import train_settings
from tests.conftest import YTTM
from training import dry_run
from training import run as run_module


def files_under(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def told(ended):
    return dict(re.findall(r"^([a-z]+(?: \d)?): +(.+)$", ended.ok().out, re.MULTILINE))


def amount(words):
    """Bytes out of "1.2 GB" or "34 MB"."""
    number, unit = re.match(r"([\d.e+]+) (GB|MB)", words).groups()
    return float(number) * {"GB": 1e9, "MB": 1e6}[unit]


@pytest.fixture
def flags(tiny_flags, picture_folder, tmp_path):
    places = ["--input-folder", picture_folder, "--codes-cache", tmp_path / "codes"]
    return [*tiny_flags, *places, "--checkpoint-output-dir", tmp_path / "out", "--epochs", 50, "--ema-decay", 0.9]


def test_it_tells_what_the_run_then_takes(command, flags, tmp_path):
    before = files_under(tmp_path)
    lines = told(command(train.main, *flags, "--dry-run", "--keep-checkpoints", 2))
    assert files_under(tmp_path) == before
    assert lines["codes"].startswith("12 images to encode once before training: about ")
    assert lines["steps"].startswith("150 of 4 samples, 3 an epoch of 12 pairs")
    assert command(train.main, *flags, "--max-steps", 2).status == 0
    path = tmp_path / "out" / "dalle_step_2.pt"
    weights = torch.load(path, weights_only=True)["weights"]
    sizes = [sum(w.numel() for name, w in weights.items() if (".vae." in name) == frozen) for frozen in (False, True)]
    assert lines["parameters"].startswith(f"{sizes[0]:,} trained of {sum(sizes):,} (")
    parts = [int(number.replace(",", "")) for number in re.findall(r" ([\d,]+)(?:, |\))", lines["parameters"])]
    assert sum(parts) == sum(sizes)
    each = re.match(r"(\S+ .B) a checkpoint; (\S+ .B) for the newest 2, and one being written", lines["disk"])
    assert amount(each[1]) == pytest.approx(path.stat().st_size, rel=0.05)
    assert amount(each[2]) == pytest.approx(3 * path.stat().st_size, rel=0.05)
    held = dict(re.findall(r"(gradients|optimizer|average of weights) (\S+ .B)", lines["memory"]))
    weights = {name: amount(words) / (4 * sizes[0]) for name, words in held.items()}
    assert weights == pytest.approx({"gradients": 1, "optimizer": 2, "average of weights": 1}, rel=0.02)
    peak = re.match(r"(\S+ .B) at the peak of these steps, measured, of (\S+ .B) on (cpu|cuda) ", lines["memory"])
    assert amount(held["optimizer"]) < amount(peak[1]) < amount(peak[2])
    assert re.match(r"about \S+ \S+ for 150 steps, \S+ s each, \S+ samples/sec", lines["time"])


def test_pixels_and_accumulation_in_a_run_that_goes_on(command, flags, tmp_path):
    flags = [*flags, "--no-codes-cache", "--gradient-accumulation", 6, "--batch-size", 1, "--validation-split", 0.3]
    assert command(train.main, *flags, "--max-steps", 3).status == 0
    before = files_under(tmp_path)
    command(train.main, *flags, "--dry-run").refused("--resume")  # as the run itself would be
    ended = command(train.main, *flags, "--dry-run", "--resume")
    lines = told(ended)
    assert "--dry-run True" not in ended.out
    assert lines["steps"].startswith("47 of 6 samples, 1 an epoch of 8 pairs; 4 in the validation set")
    assert "and the best" in lines["disk"]
    assert files_under(tmp_path) == before


def test_stages_on_ipus(poptorch_standin, command, tiny_vqgan, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "ROUNDS", 1)  # the stand-in takes its time
    reduced = "--hidden-size 32 --num-attention-heads 2 --dim-head 16 --batch-size 1 --gradient-accumulation 7"
    places = ["--vae-path", tiny_vqgan, "--checkpoint-output-dir", tmp_path / "out", "--bpe-path"]
    flags = ["--device", "ipu", *reduced.split(), *places, YTTM]
    lines = told(command(train.main, "--config", "L16", "--generated-data", *flags, "--dry-run"))
    assert not (tmp_path / "out").exists()
    total = int(lines["parameters"].partition(" ")[0].replace(",", ""))
    stages = [words for title, words in lines.items() if title.startswith("stage ")]
    assert len(stages) == 4 and all(re.match(rf"on IPU {n}, ", words) for n, words in enumerate(stages))
    weights = sum(amount(re.search("weights (.*?B)", words)[1]) for words in stages)
    assert weights == pytest.approx(2 * total, rel=0.01)  # in fp16
    optimizer = sum(amount(re.search("optimizer (.*?B)", words)[1]) for words in stages)
    assert optimizer == pytest.approx(6 * total, rel=0.01)  # the first moment in fp16
    assert all("of 941 MB" in words and "ms a micro-batch" in words for words in stages)
    assert all(kind in stages[1] for kind in ("stash", "temporary", "gradients"))
    assert "samples/sec" in lines["time"] and "memory" not in lines


def test_too_small_a_set_is_refused_before_it_is_encoded(command, tiny_flags, monkeypatch, tmp_path):
    for flags, words in (
        ("--batch-size 2 --gradient-accumulation 8192", "--batch-size 2 --gradient-accumulation 1 would fit"),
        ("--batch-size 4 --gradient-accumulation 2 --replication-factor 2", "size 4 --gradient-accumulation 1 would"),
        ("--batch-size 12 --validation-split 0.1", "12 samples, but the set has 11; --batch-size 1 "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "load_codes", None)
            ended = command(train.main, *tiny_flags, "--codes-cache", tmp_path, *flags.split())
        assert ended.status == 2 and words in ended.err and "--config photos" in ended.err, ended
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
    run_module.log_unused(train_settings("--config L16"))
    (line,) = [line for line in logged.messages if "IPU" in line]
    assert line == "for IPUs only, without effect here: 8 settings of the configuration"
