"""loss.png: which lines of a long file are read, how curves are smoothed, and that a plot never stops a run."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import log as plot
import train


def write(path, steps):
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            losses = {f"loss/{name}": scale * 9 / step for name, scale in (("total", 1), ("text", 2), ("image", 0.5))}
            if step == 777:
                losses = {**dict.fromkeys(losses, None), "skipped": True}
            file.write(json.dumps({"step": step, "epoch": 0, **losses, "lr": 1e-3}) + "\n")
            if step % 500 == 0:
                held_out = {name.replace("loss", "held-out"): value * 1.1 for name, value in losses.items()}
                file.write(json.dumps({"step": step, **held_out, "held-out/perplexity": 2.0}) + "\n")
        file.write('{"step": 1234, "loss/to')


@pytest.mark.parametrize("lines", [1, 1200])
def test_a_plot_has_its_curves(tmp_path, lines):
    write(tmp_path / "metrics.jsonl", lines)
    plot.MetricsFile(tmp_path / "metrics.jsonl", 10**6).close()
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"), dtype=int)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    for colour in plot.COLORS.values():
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
        seen = (abs(pixels - wanted).sum(-1) < 30).sum()
        assert seen > 300 if lines > 1 else seen < 300


def test_without_matplotlib_a_run_says_so_once(command, tiny_flags, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = command(train.main, *tiny_flags, "--checkpoint-output-dir", tmp_path, "--checkpoint-save-steps", 1)
    assert ended.status == 0 and ended.out.count("matplotlib is not installed") == 1
    assert not (tmp_path / "loss.png").exists() and (tmp_path / "metrics.jsonl").exists()
