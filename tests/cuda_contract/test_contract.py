"""What the program promises of a CUDA GPU, checked on the stand-in in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

HERE = ROOT / "tests" / "cuda_contract"
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the stand-in"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in needs a torch without CUDA"),
    pytest.mark.skipif(not hasattr(torch, "OutOfMemoryError"), reason="the stand-in needs torch 2.5"),
]


def run(script, *words, **environment):
    """Run a Python script in the project's folder on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **environment}
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def contract(*parts):
    ended = run(HERE / "contract.py", *parts)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def found():
    return contract("sampling", "training", "loading", "demo")


def test_codes_in_fp32_are_the_cpus(found):
    equal = found["sampling"]["equal"]
    assert len(equal) == 3 and all(equal.values()), equal
    assert found["demo"]["codes"] and found["demo"]["afterwards"]


def test_no_cudnn_plan_is_built_while_sampling(found):
    assert found["sampling"]["plans"] == 0


def test_a_code_costs_few_launches_and_waits(found):
    """One code at a time; a pass and the choice of its codes are one launch, of a captured graph."""
    per_code = found["sampling"]["per_code"]
    assert per_code["launches"] <= 19 and per_code["copies"] == 0 and per_code["waits"] <= 1.1, per_code
    assert found["sampling"]["replays"] == 3  # of the last four codes, the first comes from the pass over the captions


def test_training_equals_the_cpus_and_costs_few_launches_and_waits(found):
    losses = found["training"]["losses"]
    for ours, expected in zip(losses["cuda"], losses["cpu"]):
        assert ours == pytest.approx(expected, rel=1e-5)
    for rest, most in (("AdamW", 470), ("Muon --ema-decay 0.9", 680)):
        costs = found["training"]["costs"][rest]
        assert costs["launches"] <= most and costs["copies"] <= 7 and costs["waits"] <= 2, (rest, costs)


def test_a_step_s_samples_are_gathered_on_the_device(found):
    """One copy of their rows, whatever the number of micro-batches."""
    costs = found["loading"]["per_step"]
    assert found["loading"]["equal"] and costs["copies"] == 1 and costs["waits"] == 0 and costs["launches"] <= 6, costs


def test_no_boolean_mask_meets_attention(found):
    """Causal layers need no mask, other patterns have a bias that is made once."""
    for part, causal in (("sampling", "flash bfloat16"), ("training", "cudnn bfloat16")):
        kinds = found[part]["attention"]
        assert causal in kinds and not any("bool" in kind for kind in kinds), kinds


def test_images_are_encoded_in_fp32(found):
    assert found["demo"]["encoded"] and found["demo"]["tf32"] == {}


def test_a_caption_is_completed_after_sampling(found):
    captions = found["demo"]["captions"]
    assert captions["cuda"] == captions["cpu"] and captions["cpu"].startswith("a small red ")


def test_out_of_memory_is_one_line(found):
    assert found["demo"]["out_of_memory"] == "out of memory: 2 images at once are too many; --batch_size 1 needs half"


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "t4"])
def test_every_command_runs(gpu, tiny_flags, tiny_checkpoint, drawn_pictures, tmp_path):
    folder, machine = tmp_path / "run", ["--device", "cuda", "--precision", "auto"]
    train = [*tiny_flags, *machine, "--checkpoint-output-dir", folder, "--validation-split", 0.2, "--ema-decay", 0.9]
    prompt = ["--text", "a red circle", "--dalle_path", tiny_checkpoint, "--outputs_dir", tmp_path, *machine]
    vqgan = ["--input-folder", drawn_pictures, "--validation-folder", drawn_pictures]
    vqgan += ["--image-size", 32, "--max-steps", 6, "--continuous-steps", 2]
    for words in (
        ["train.py", *train, "--sample-steps", 2, "--attn-types", "axial_row,conv_like", "--recompute"],
        ["train.py", *train, "--no-codes-cache", "--optimizer", "Muon", "--checkpoint-output-dir", tmp_path / "pixels"],
        ["generate.py", *prompt, "--rank", 2, "--num_images", 2, "--animate", "--preview", 2],
        ["generate.py", *prompt, "--gentxt", "--top_p", 0.9],
        ["evaluate.py", "--dalle_path", tiny_checkpoint, "--input-folder", drawn_pictures, "--outputs-dir", tmp_path]
        + ["--prompts", 8, *machine],
        ["train_vqgan.py", "--config", "vqgan_demo", *vqgan, "--output-dir", tmp_path / "vqgan", *machine],
    ):
        ended = run(HERE / "run.py", "--gpu", gpu, *words)
        assert ended.returncode == 0, (words, ended.stderr)
        assert f"on a stand-in for {gpu}" in ended.stderr
