"""The benchmark command runs, saves what it prints, and counts and divides correctly."""

import json

import pytest
import torch
from torch import nn

from benchmarks import __main__ as benchmark
from benchmarks import limits, networks, rows

TWO = ("train-4", "demo-1")
THE_REST = tuple(name for name in rows.ROWS if name not in TWO)


@pytest.mark.parametrize("names", [TWO, pytest.param(THE_REST, marks=pytest.mark.slow)], ids=["two", "rest"])
def test_a_quick_run_prints_and_saves_rows(capfd, tmp_path, names):
    benchmark.main(["--quick", "--only", *names, "--output-dir", str(tmp_path)])
    result, printed = json.loads((tmp_path / "results.json").read_text(encoding="utf-8")), capfd.readouterr().out
    assert [row["name"] for row in result["rows"]] == list(names)
    assert result["quick"] and result["precision"] in ("fp32", "bf16")
    assert result["machine"]["torch"] == torch.__version__
    for row in result["rows"]:
        ours = row["ours"]
        assert (row["passes"] is not None) == row["name"].startswith(("generate-", "demo-"))
        assert row["name"] != "demo-1" or 6 < row["passes"] < 40
        assert 0 < ours["min"] <= ours["median"] <= ours["max"] and ours["repetitions"] >= 1 and row["peer"] is None
        assert 100 < ours["peak_memory_mb"] < 5000
        (line,) = [line for line in printed.splitlines() if line.startswith(row["what"])]
        assert f" {benchmark.format_number(ours['median'])} {row['unit']}" in line
        if row["limit"] is None:
            assert row["name"].startswith("load-") or row["name"] in ("start", "service")
        else:
            assert 0 < row["of_limit"] <= 1 and f" {100 * row['of_limit']:.0f} %" in line


@pytest.mark.parametrize("name, unit", [("train-4", "samples/s"), ("generate-1", "s/image")])
def test_a_ratio_above_one_is_our_advantage_and_a_limit_is_never_slower(monkeypatch, name, unit):
    ours = {"seconds": [0.5, 0.4, 0.6], "peak_memory_mb": 1.0, "limit": (0.25, "matrix products"), "passes": None}
    theirs = {"seconds": [2.0], "peak_memory_mb": 2.0, "limit": None}
    monkeypatch.setattr(rows, "run_in_process", lambda name, quick, side: {"ours": ours, "theirs": theirs}[side])
    found = rows.measure_row(name, quick=True, with_peer=True)
    assert found["ratio"] == 4 and found["of_limit"] == 0.5 and found["unit"] == unit
    expected = (0.5, 0.25) if unit == "s/image" else (2.0, 4.0)
    assert (found["ours"]["median"], found["limit"]) == expected
    assert found["ours"]["min"] < found["ours"]["median"] < found["ours"]["max"]
    ours["limit"] = 0.45, "matrix products"  # slower than one repetition
    assert rows.measure_row(name, quick=True, with_peer=False)["of_limit"] == 0.8


def test_what_goes_wrong_in_a_row_is_told_in_one_line(command, tmp_path):
    command(benchmark.main, "--only", "fly-1", "--output-dir", tmp_path).refused("no row 'fly-1'", "generate-32")
    with pytest.raises(OSError, match="generate-32, theirs: TypeError: "):  # a row without a peer
        rows.run_in_process("generate-32", True, "theirs")


def test_operations_of_training():
    model = networks.build_ours(quick=True)[1]
    counted = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, given, out: counted.append(out.numel() * module.in_features))
    model(*networks.random_batch(model, 1), return_loss=True)
    text, codes = model.text_seq_len, model.image_seq_len
    whole_head = (text + codes) * model.num_tokens * 64
    needed_head = text * model.num_text_tokens * 64 + codes * model.num_image_tokens * 64
    in_layers = limits.count_layer_weights(model) * (text + codes)
    assert sum(counted) in (in_layers + whole_head, in_layers + needed_head, in_layers)
    assert limits.count_training_operations(model) == 6 * (in_layers + needed_head)
