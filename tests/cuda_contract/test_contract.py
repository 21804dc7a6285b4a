"""What the program promises of a CUDA GPU, checked on the stand-in in a process of its own."""

import shutil

import pytest
import torch

from tests.builders import ROOT, python

HERE = ROOT / "tests" / "cuda_contract"
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the stand-in"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in needs a torch without CUDA"),
    pytest.mark.skipif(not hasattr(torch, "OutOfMemoryError"), reason="the stand-in needs torch 2.5"),
]
ON_H100 = "import standin; standin.install('h100'); import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"


def run(*words, **more):
    return python(*words, env={"PYTHONPATH": str(HERE), **more})


def test_the_contract_holds_on_an_h100():
    ended = run("-c", ON_H100, "-q", "-n0", "-p", "no:cacheprovider", HERE / "contract.py")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def commands(tiny_flags, tiny_checkpoint, drawn_pictures, tmp_path):
    """Return commands of the program that use most of what it does on a GPU."""
    folder, machine = tmp_path / "run", ["--device", "cuda", "--precision", "auto"]
    train = [*tiny_flags, *machine, "--checkpoint-output-dir", folder, "--validation-split", 0.2, "--ema-decay", 0.9]
    prompt = ["--text", "a red circle", "--dalle_path", tiny_checkpoint, "--outputs_dir", tmp_path, *machine]
    vqgan = ["--input-folder", drawn_pictures, "--validation-folder", drawn_pictures]
    vqgan += ["--image-size", 32, "--max-steps", 6, "--continuous-steps", 2]
    return [
        ["train.py", *train, "--sample-steps", 2, "--attn-types", "axial_row,conv_like", "--recompute"],
        ["train.py", *train, "--no-codes-cache", "--optimizer", "Muon", "--checkpoint-output-dir", tmp_path / "pixels"],
        ["generate.py", *prompt, "--rank", 2, "--num_images", 2, "--animate", "--preview", 2],
        ["generate.py", *prompt, "--gentxt", "--top_p", 0.9],
        ["evaluate.py", "--dalle_path", tiny_checkpoint, "--input-folder", drawn_pictures, "--outputs-dir", tmp_path]
        + ["--prompts", 8, *machine],
        ["train_vqgan.py", "--config", "vqgan_demo", *vqgan, "--output-dir", tmp_path / "vqgan", *machine],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "t4"])
def test_every_command_runs(gpu, tiny_flags, tiny_checkpoint, drawn_pictures, tmp_path):
    for words in commands(tiny_flags, tiny_checkpoint, drawn_pictures, tmp_path):
        ended = run(HERE / "run.py", "--gpu", gpu, *words)
        assert ended.returncode == 0, (words, ended.stderr)
        assert f"on a stand-in for {gpu}" in ended.stderr


@pytest.mark.slow
def test_every_command_says_in_one_line_that_memory_ran_out(tiny_flags, tiny_checkpoint, drawn_pictures, tmp_path):
    for words in commands(tiny_flags, tiny_checkpoint, drawn_pictures, tmp_path):
        ended = run(HERE / "run.py", *words, STANDIN_MB="0.9")
        message = ended.stderr.partition("--- ")[0]
        assert ended.returncode == 2 and message.count("\n") == 1 and "out of memory: " in message, (words, message)
