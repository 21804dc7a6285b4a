"""The benchmark command runs, saves what it prints, and counts and divides correctly."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import __main__ as benchmark
from benchmarks import limits, loading, networks, peer, plot, rows
from models.dalle import DALLE
from models.vae import VQGanVAE
from models.vqgan_files import OFFICIAL_PARAMS


def run(folder, capfd, *flags):
    benchmark.main(["--quick", *flags, "--output-dir", str(folder)])
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with Image.open(folder / "results.png") as image:
        assert image.format == "PNG" and image.height > 60 * len(result["rows"])
    return result, capfd.readouterr().out


TWO = ("train-4", "demo-1")
THE_REST = tuple(name for name in rows.ROWS if name not in TWO)


@pytest.mark.parametrize("names", [TWO, pytest.param(THE_REST, marks=pytest.mark.slow)], ids=["two", "rest"])
def test_a_quick_run_prints_and_saves_rows(capfd, tmp_path, names):
    result, printed = run(tmp_path, capfd, "--only", *names)
    assert [row["name"] for row in result["rows"]] == list(names)
    assert (
        result["quick"] and result["precision"] in ("fp32", "bf16") and result["machine"]["torch"] == torch.__version__
    )
    for row in result["rows"]:
        ours = row["ours"]
        assert (row["passes"] is not None) == row["name"].startswith(("generate-", "demo-"))
        assert row["name"] != "demo-1" or 6 < row["passes"] < 40
        assert 0 < ours["min"] <= ours["median"] <= ours["max"] and ours["repetitions"] >= 1 and row["peer"] is None
        assert 100 < ours["peak_memory_mb"] < 5000
        (line,) = [line for line in printed.splitlines() if line.startswith(row["what"])]
        assert f" {plot.format_number(ours['median'])} {row['unit']}" in line
        if row["limit"] is None:
            assert row["name"].startswith("load-") or row["name"] in ("start", "service")
        else:
            assert 0 < row["of_limit"] <= 1 and f" {100 * row['of_limit']:.0f} %" in line


@pytest.mark.slow
def test_peers_are_measured_in_the_same_run(capfd, tmp_path, dalle_pytorch):
    result, printed = run(tmp_path, capfd, "--peer", "--only", "train-4", "decod*", "load-pixels")
    found = {row["name"]: row for row in result["rows"]}
    names = {"train-4": "dalle-pytorch", "decode": "taming", "load-pixels": loading.peer_name()}
    assert {name: row["peer_name"] for name, row in found.items()} == names
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["ours"]["median"] / row["peer"]["median"])
        assert row["peer_name"] in printed and row["peer"]["peak_memory_mb"] > 100


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


def test_what_goes_wrong_in_a_row_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--only", "fly-1", "--output-dir", str(tmp_path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no row 'fly-1'" in line and "generate-32" in line
    with pytest.raises(OSError, match="generate-32, theirs: TypeError: "):  # a row without a peer
        rows.run_in_process("generate-32", True, "theirs")


@pytest.mark.slow
def test_a_process_of_its_own_has_a_peak_memory_of_its_own():
    large = torch.ones(300 * 2**20, dtype=torch.uint8)  # in this process
    measured = rows.run_in_process("load-codes", True, "ours")
    assert rows.peak_memory(torch.device("cpu")) > measured["peak_memory_mb"] + 200 and large.all()


def test_operations_of_convolutions():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1, stride=2))
    assert limits.count_convolution_operations(network, torch.zeros(2, 3, 10, 10)) == 2 * (
        2 * 8 * 100 * 27 + 2 * 4 * 25 * 8
    )
    model = VQGanVAE(OFFICIAL_PARAMS).model
    assert limits.count_convolution_operations(model.encoder, torch.zeros(1, 3, 256, 256)) == pytest.approx(
        138e9, rel=0.02
    )
    assert limits.count_convolution_operations(model.decoder, torch.zeros(1, 256, 16, 16)) == pytest.approx(
        253e9, rel=0.02
    )


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


def test_the_longer_of_multiplying_and_reading_is_the_limit():
    device, work = torch.device("cpu"), {"operations": 1e6, "precision": "fp32"}
    seconds, of = limits.find_limit(work, device, quick=True)
    assert of == "matrix products" and 0 < seconds < 1
    assert limits.find_limit({**work, "bytes": 1}, device, quick=True)[1] == "matrix products"
    assert limits.find_limit({**work, "bytes": 1e12}, device, quick=True)[1] == "memory bandwidth"
    assert limits.find_limit({"seconds": 3.0, "limit_is": "x"}, device) == (3.0, "x")


def test_a_bar_is_as_long_as_the_share_of_the_limit_that_is_reached():
    row = {"limit": 4.0, "of_limit": 0.5, "ratio": None}
    assert plot.bar_lengths(row) == (50, 0)
    assert plot.bar_lengths({**row, "ratio": 2.0}) == (50, 25)
    unlimited = {"limit": None, "of_limit": None}
    assert plot.bar_lengths({**unlimited, "ratio": 4.0}) == (80, 20)
    assert plot.bar_lengths({**unlimited, "ratio": 0.25}) == (20, 80)


def test_the_peer_has_our_sizes(dalle_pytorch, tiny_vae):
    sizes = {"dim": 32, "num_text_tokens": 50, "text_seq_len": 6, "depth": 2, "heads": 2, "dim_head": 16}
    theirs = peer.build_dalle(dalle_pytorch, tiny_vae, attn_types=("full", "axial_row"), **sizes)
    ours = DALLE(vae=tiny_vae, attn_types=("full", "axial_row"), **sizes)
    count = sum(parameter.numel() for name, parameter in theirs.named_parameters() if not name.startswith("vae."))
    assert count == sum(parameter.numel() for parameter in ours.parameters())


def test_tamings_vqgan_is_ours():
    (ours, pixels, codes), theirs = (
        networks.build_vqgan(quick=True),
        peer.TamingVQGAN(networks.vqgan_params(quick=True)),
    )
    theirs.load_state_dict(ours.model.state_dict())
    assert torch.equal(theirs.encode(2 * pixels - 1).flatten(1), ours.get_codebook_indices(pixels))
    torch.testing.assert_close((theirs.decode(codes).clamp(-1, 1) + 1) / 2, ours.decode(codes), atol=1e-4, rtol=0)
