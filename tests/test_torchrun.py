"""train.py and generate.py under torchrun: two processes do what one does, and one that dies is noticed."""

import os
import re
import signal
import time
from pathlib import Path

import generate
import train
from tests.backends.native.test_sharding import needs_fsdp2
from tests.builders import TORCHRUN, assert_same_weights, metrics_in, python, start


def test_two_processes_train_as_one(command, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--epochs", 2, "--batch-size", 2, "--gradient-accumulation", 2, "--optimizer", "Muon"]
    flags += ["--learning-rate", "1e-3", "--max-grad-norm", 0.5, "--recompute", "--keep-checkpoints", 9]
    alone = command(train.main, *flags, "--checkpoint-output-dir", tmp_path / "alone")
    seen = ["--sample-steps", 4, "--checkpoint-output-dir", tmp_path / "together", "--codes-cache", tmp_path / "codes"]
    together = python(*TORCHRUN, "train.py", *flags, *seen)
    assert together.returncode == 0, together.stderr
    names = sorted(path.name.partition("-")[0] + path.suffix for path in (tmp_path / "codes").iterdir())
    assert names == ["captions.lock", "captions.npz", "codes.json", "codes.lock", "codes.rows"]
    for name in ("dalle_0.pt", "dalle_1.pt"):
        assert_same_weights(tmp_path / "together" / name, tmp_path / "alone" / name, atol=2e-6, rtol=1e-4)
    losses = [re.findall(r"(step 6/6 .* loss: .*) lr", log) for log in (alone.out, together.stdout)]
    assert losses[0] == losses[1] and len(losses[1]) == 1  # rank 0 alone logs
    for name in ("step_4.png", "step_6.png", "captions.txt"):
        assert (tmp_path / "together/samples" / name).exists()
    assert [line["step"] for line in metrics_in(tmp_path / "together")] == [1, 2, 3, 4, 5, 6]  # rank 0's alone
    assert "12 images, 6 steps of 4 samples" in together.stdout and "in 2 processes" in together.stdout
    assert sorted(path.name for path in (tmp_path / "together").glob("*.pt")) == ["dalle_0.pt", "dalle_1.pt"]


@needs_fsdp2
def test_sharded_processes_stop_together_with_a_checkpoint_that_one_process_goes_on_from(command, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--epochs", 4000, "--checkpoint-output-dir", tmp_path / "run", "--shard"]
    flags += ["--checkpoint-save-epochs", 100000, "--checkpoint-save-steps", 23]  # far from where the signal stops it
    launcher = start(*TORCHRUN, "train.py", *flags)
    while not list((tmp_path / "run").glob("dalle_step_*.pt")):
        time.sleep(0.1)
        assert launcher.poll() is None, launcher.communicate()[1]
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (second,) = [pid for pid in children if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(int(second), signal.SIGINT)
    out, _ = launcher.communicate(timeout=180)
    stopped = int(re.search(r"stopped after step (\d+); resume with --pretrained-checkpoint \S+\.pt", out).group(1))
    assert launcher.returncode != 0 and "in 2 processes that shard the model" in out and stopped % 23
    found = tmp_path / "run" / f"dalle_step_{stopped}.pt"
    alone = [*tiny_flags, "--epochs", 4000, "--checkpoint-save-epochs", 100000, "--max-steps"]
    command(train.main, *alone, stopped, "--checkpoint-output-dir", tmp_path / "alone")
    (last,) = (tmp_path / "alone").glob("dalle_*.pt")  # called after its epoch if it ends one
    assert_same_weights(found, last, atol=2e-6, rtol=1e-4)
    more = ("--pretrained-checkpoint", found, "--checkpoint-output-dir", tmp_path / "more")
    resumed = command(train.main, *alone, stopped + 1, *more)
    assert resumed.status == 0 and f"at step {stopped}" in resumed.out and "afresh" not in resumed.out


def test_pictures_of_one_prompt_are_shared_out(command, tiny_checkpoint, tmp_path):
    flags = ["--dalle_path", tiny_checkpoint, "--text", "red", "--num_images", 5, "--device", "cpu"]
    flags += ["--precision", "fp32", "--batch_size", 2]
    ended = python(*TORCHRUN, "generate.py", *flags, "--outputs_dir", tmp_path / "shared")
    assert ended.returncode == 0, ended.stderr
    (seed,) = re.findall(r"seed (\d+)", ended.stdout)  # made up by rank 0, for both
    assert ended.stdout.count("5 images of 'red'") == ended.stdout.count("images/sec") == 1
    assert command(generate.main, *flags, "--seed", seed, "--outputs_dir", tmp_path / "alone").status == 0
    folders = [tmp_path / where / "red" for where in ("shared", "alone")]
    shared, alone = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(shared) == 7 and shared == alone  # five pictures, their grid, the prompt
    assert len({shared[f"{number}-seed-{int(seed) + number}.jpg"] for number in range(5)}) == 5
