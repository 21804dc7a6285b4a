"""The benchmark command runs, and its file holds what it prints."""

import json

from benchmarks import __main__ as benchmark
from benchmarks import peer


def test_a_quick_run_prints_and_saves_its_rows(capsys, tmp_path):
    benchmark.main(["--quick", "--batches", "1", "2", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["what"] for row in result["rows"]] == ["training, batch 4", "drawing, 1 at once", "drawing, 2 at once"]
    assert all(f"{row['ours']:8.3f}" in printed and row["of_limit"] > 1 and not row["peer"] for row in result["rows"])
    assert result["limits"]["gflops"] > 0 and result["limits"]["gbytes"] > 0


def test_a_ratio_above_one_is_our_advantage():
    faster = benchmark.row("training", 4.0, "samples/s", 2.0, 1.0, larger_is_better=True)
    sooner = benchmark.row("drawing", 0.5, "s/picture", 2.0, 2.0, larger_is_better=False)
    assert faster["ratio"] == sooner["ratio"] == 4


def test_the_peer_has_our_sizes(dalle_pytorch, tiny_vae):
    sizes = {"dim": 32, "num_text_tokens": 50, "text_seq_len": 6, "depth": 2, "heads": 2, "dim_head": 16}
    theirs = peer.model_like(dalle_pytorch, tiny_vae, attn_types=("full", "axial_row"), **sizes)
    ours = benchmark.DALLE(vae=tiny_vae, attn_types=("full", "axial_row"), **sizes)
    count = sum(parameter.numel() for name, parameter in theirs.named_parameters() if not name.startswith("vae."))
    assert count == sum(parameter.numel() for parameter in ours.parameters())
