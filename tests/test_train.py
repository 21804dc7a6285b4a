"""train.py as a user starts it: what it learns, writes and logs, losses that are not numbers, and how runs continue."""

import contextlib
import math
import random
import re
import signal
from pathlib import Path

import pytest
import torch

import generate
import train
from backends.native.trainer import NativeTrainer
from data.images import load_images
from models.vqgan_files import load_vqgan
from tests.builders import TORCHRUN, interrupt, metrics_in, python, reference_weights
from tests.conftest import ROOT, STANDIN
from utils import checkpoint


def opened(path):
    return torch.load(path, weights_only=True)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.fixture
def trained(command, tiny_flags, tmp_path):
    """trained(*flags): runs train.py with tiny_flags and these → (output folder, Ended)."""
    runs = []

    def run(*flags):
        folder = tmp_path / f"run{len(runs)}"
        runs.append(folder)
        ended = command(train.main, *tiny_flags, "--checkpoint-output-dir", folder, *flags).ok()
        return folder, ended

    return run


def test_pixels_new_codes_and_cached_codes_teach_the_same(trained, tmp_path):
    weights = []
    codes, pixels = ["--codes-cache", tmp_path / "codes"], ["--no-codes-cache"]
    for flags in (codes, codes, [*pixels, "--byteio", "--dataloader-workers", "2"]):
        folder, ended = trained(*flags)
        weights.append(opened(folder / "dalle_0.pt")["weights"])
        assert "12 images, 3 steps of 4 samples" in ended.out
    for others in weights[1:]:
        assert_equal(others, weights[0])


def test_twelve_pictures_are_learnt_by_heart(trained, command, drawn_pictures, tiny_vqgan, tmp_path):
    flags = ["--learning-rate", "1e-2", "--lr-scheduler", "trapezoid", "--caption-dropout", "0.1"]
    folder, ended = trained("--epochs", "1000", "--max-steps", "120", "--checkpoint-save-epochs", "99", *flags)
    total, text, image = map(float, re.findall(r"loss: (\S+) text (\S+) image (\S+)", ended.out)[-1])
    # They begin at log 8,208 = 9.0 and log 64 = 4.2; of two captions each, the text has log 2 over it to choose.
    assert total < 0.6 and text < 2 and image < 0.4, ended.out

    prompts = [path.read_text().splitlines()[0] for path in sorted(drawn_pictures.glob("*.txt"))]
    words = ["--text", "|".join(prompts), "--num_images", "1", "--top_k", "1", "--seed", "0"]
    words += ["--outputs_dir", tmp_path / "drawn"]
    assert command(generate.main, "--dalle_path", folder / "dalle_39.pt", *words).status == 0
    vae = load_vqgan(str(tiny_vqgan))
    pictures = load_images(sorted(drawn_pictures.glob("*.png")), 32) / 255
    expected = vae.decode(vae.get_codebook_indices(pictures))
    paths = [tmp_path / "drawn" / prompt.replace(" ", "_") / "0-seed-0.jpg" for prompt in prompts]
    distances = torch.cdist((load_images(paths, 32) / 255).flatten(1), expected.flatten(1))
    assert (distances.argmin(dim=1) == torch.arange(12)).sum() >= 11, distances


def test_a_checkpoint_is_laid_out_as_the_reference_lays_it_out(trained, tiny_vqgan):
    flags = ["--sandwich-norm", "--attn-types", "axial_row,full", "--ff-dropout", "0.2", "--loss-img-weight", "5"]
    folder, _ = trained(*flags, "--top-p", "0.9")
    checkpoint = opened(folder / "dalle_0.pt")
    assert checkpoint.keys() >= {"hparams", "vae_params", "epoch", "weights", "opt_state", "scheduler_state"}
    assert checkpoint["epoch"] == 0 and checkpoint["step"] == 3 and checkpoint["sampling"]["top_p"] == 0.9
    expected = dict(num_text_tokens=8192, text_seq_len=16, dim=32, depth=2, heads=2, dim_head=16, loss_img_weight=5)
    expected.update(attn_types=("axial_row", "full"), ff_dropout=0.2, attn_dropout=0, sandwich_norm=True, fp16=None)
    expected.update(layers_per_ipu=None, cls_ipu_id=None, byteio=False)
    expected.update(embedding_ipu_id=0, embedding_serialization_factor=1)
    assert checkpoint["hparams"] == expected
    frozen = opened(tiny_vqgan / "vqgan.ckpt")["state_dict"]
    weights = checkpoint["weights"]
    vqgan = {name: weights.pop(f"model.vae.model.{name}") for name in frozen if not name.startswith("loss.")}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in vqgan.items())
    reference = reference_weights(text_seq_len=16, sandwich_norm=True)
    expected = {f"model.{name}": tensor.shape for name, tensor in reference.items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == expected


def test_the_schedule_covers_the_epochs_that_the_run_makes(trained):
    folder, _ = trained("--lr-scheduler", "multi_step", "--epochs", "50", "--max-steps", "6")  # two epochs
    assert [line["lr"] for line in metrics_in(folder)] == pytest.approx([3e-3] * 3 + [3e-4] * 3)


def test_names_and_number_of_checkpoints(trained):
    flags = ["--epochs", "3", "--max-steps", "8", "--checkpoint-save-steps", "2"]  # three steps an epoch
    folder, _ = trained(*flags, "--keep-checkpoints", "9")
    positions = {path.name: (opened(path)["epoch"], opened(path)["step"]) for path in folder.glob("*.pt")}
    expected = {"dalle_0.pt": (0, 3), "dalle_1.pt": (1, 6)}
    assert positions == {**expected, "dalle_step_2.pt": (0, 2), "dalle_step_4.pt": (1, 4), "dalle_step_8.pt": (2, 8)}
    folder, _ = trained(*flags, "--keep-checkpoints", "2", "--checkpoint-save-epochs", "2")
    assert {path.name for path in folder.glob("*.pt")} == {"dalle_1.pt", "dalle_step_8.pt"}


@pytest.mark.parametrize(
    "stopped_at, flags",
    [
        ("dalle_1.pt", ["--lr-scheduler", "ReduceLROnPlateau"]),
        ("dalle_1.pt", ["--lr-scheduler", "multi_step"]),
        ("dalle_step_4.pt", ["--ff-dropout", "0.2", "--attn-dropout", "0.2", "--caption-dropout", "0.3"]),
        ("dalle_step_4.pt", ["--ema-decay", "0.9", "--lr-scheduler", "cosine", "--optimizer", "AdamW"]),
        ("dalle_step_4.pt", ["--lr-scheduler", "trapezoid", "--warmup-steps", "4", "--optimizer", "Muon"]),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trained, stopped_at, flags):
    flags = ["--epochs", 4, "--checkpoint-save-steps", 4, "--keep-checkpoints", 9, "--weight-decay", 0.1, *flags]
    whole, _ = trained(*flags)
    resumed, ended = trained(*flags, "--pretrained-checkpoint", whole / stopped_at)
    assert f"resuming from {whole / stopped_at} at step {opened(whole / stopped_at)['step']}" in ended.out
    assert not (resumed / "dalle_0.pt").exists()
    expected, found = opened(whole / "dalle_3.pt"), opened(resumed / "dalle_3.pt")
    for part in ("weights", "ema_weights"):
        assert_equal(found.get(part, {}), expected.get(part, {}))
    assert (found["epoch"], found["step"]) == (3, 12) and found["progress"] == expected["progress"]
    for ours, theirs in zip(found["opt_state"], expected["opt_state"]):
        assert ours["param_groups"] == theirs["param_groups"]
        assert_equal(ours["state"], theirs["state"])
    assert found["scheduler_state"] == expected["scheduler_state"]
    if stopped_at == "dalle_step_4.pt":  # the mean loss of the epoch within which it stopped
        epochs = [opened(folder / "dalle_1.pt")["scheduler_state"] for folder in (whole, resumed)]
        assert epochs[0] == epochs[1]


def test_ctrl_c_saves_and_says_how_to_go_on(trained, tiny_flags, tmp_path):
    folder = tmp_path / "stopped"
    flags = [*tiny_flags, "--checkpoint-output-dir", str(folder), "--no-codes-cache", "--dataloader-workers", "2"]
    flags += ["--epochs", "100000", "--checkpoint-save-epochs", "99999"]
    status, out, err = interrupt("train.py", flags, "Compiled model in", tmp_path)
    assert status == 130 and err == "", err
    said = re.fullmatch(r"stopped after step (\d+); resume with --pretrained-checkpoint (\S+)", out.splitlines()[-1])
    step, path = int(said[1]), Path(said[2])
    assert path == folder / f"dalle_step_{step}.pt" and [*folder.glob("*.pt")] == [path]
    assert opened(path)["step"] == step
    onward, ended = trained("--epochs", "100000", "--max-steps", step + 1, "--pretrained-checkpoint", path)
    assert f"at step {step}" in ended.out and opened(onward / f"dalle_step_{step + 1}.pt")["step"] == step + 1


def test_out_of_memory_saves_and_says_what_would_fit(command, tiny_flags, tmp_path, monkeypatch):
    step, steps = NativeTrainer.step, []

    def short_of_memory(trainer, batch):
        steps.append(None)
        if len(steps) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(trainer, batch)

    monkeypatch.setattr(NativeTrainer, "step", short_of_memory)
    flags, path = ["--checkpoint-output-dir", tmp_path, "--gradient-accumulation", 3], tmp_path / "dalle_step_2.pt"
    ended = command(train.main, *tiny_flags, *flags, "--epochs", 4)
    advice = "--batch-size 2 --gradient-accumulation 6 or --recompute makes the same updates with less"
    ended.refused(f"error: out of memory: {advice}; resume with --pretrained-checkpoint {path}\n")
    assert opened(path)["step"] == 2


SAVES = ["--checkpoint-save-steps", 2, "--epochs", 3, "--checkpoint-save-epochs", 9]  # nine steps


@contextlib.contextmanager
def spoilt_losses(monkeypatch, steps):
    """Within: the loss of these updates (counted from 1) is not a number."""
    original, count = NativeTrainer.backpropagate, [0]

    def losses(self, batch):
        count[0] += 1
        found = original(self, batch)
        if count[0] in steps:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(math.nan)
            found[0] = math.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(NativeTrainer, "backpropagate", losses)
        yield


def test_a_batch_without_a_finite_loss_is_left_out(command, tiny_flags, tmp_path, monkeypatch):
    with spoilt_losses(monkeypatch, {3, 5, 7}):
        ended = command(train.main, *tiny_flags, *SAVES, "--checkpoint-output-dir", tmp_path)
    assert ended.status == 0 and len(re.findall(r"step [357]: .* not finite, update skipped", ended.out)) == 3
    saved = checkpoint.read(tmp_path / "dalle_2.pt")
    assert saved["progress"]["skipped"] == 3 and saved["trainer"]["updates"] == 6 and saved["step"] == 9
    total, count = checkpoint.read(tmp_path / "dalle_step_8.pt")["progress"]["epoch_loss"]
    assert count == 1 and math.isfinite(total)  # of steps 7 and 8 only the second counts
    assert all(torch.isfinite(tensor).all() for tensor in saved["weights"].values() if tensor.is_floating_point())


def test_too_many_such_batches_end_the_run(command, tiny_flags, tmp_path, monkeypatch):
    flags = [*tiny_flags, "--epochs", 30, "--checkpoint-save-epochs", 2, "--checkpoint-output-dir", tmp_path]
    with spoilt_losses(monkeypatch, set(range(8, 1000))):
        ended = command(train.main, *flags)
    ended.refused("no longer finite at step 17", "--learning-rate", f"the last good checkpoint is {tmp_path}")


KILLED_FLAGS = """--ff-dropout 0.1 --attn-dropout 0.1 --caption-dropout 0.2 --ema-decay 0.95 --max-grad-norm 0.5
    --weight-decay 0.1 --validation-split 0.2 --validation-steps 7 --checkpoint-save-steps 4"""
KILLED = {  # flags; steps for each kill: what a process makes in two seconds or so
    "codes": (KILLED_FLAGS, 80),
    "pixels": (f"{KILLED_FLAGS} --no-codes-cache --dataloader-workers 1 --lr-scheduler cosine", 80),
    "muon": (f"{KILLED_FLAGS} --optimizer Muon --lr-scheduler trapezoid --warmup-steps 20", 60),
    "torchrun": (KILLED_FLAGS, 40),
    "ipu": ("--device ipu --checkpoint-save-steps 4 --weight-decay 0.1 --optimizer AdamW", 40),
}


@pytest.mark.parametrize("kind, kills", [("codes", 1), *(pytest.param(k, 20, marks=pytest.mark.slow) for k in KILLED)])
def test_a_run_survives_being_killed(kind, kills, command, tiny_flags, tmp_path, monkeypatch):
    launcher = TORCHRUN if kind == "torchrun" else ()
    if kind == "ipu":
        monkeypatch.setenv("PYTHONPATH", str(STANDIN))
        monkeypatch.setenv("POPLAR_SDK_ENABLED", "/opt/poplar")
    words, steps = KILLED[kind]
    flags = [*tiny_flags, *words.split(), "--epochs", "100000", "--checkpoint-save-epochs", "5"]
    flags += ["--max-steps", str(steps * kills), "--checkpoint-output-dir"]

    def run_to_the_end(*flags):
        if kind in ("torchrun", "ipu"):
            ended = python(*launcher, "train.py", *flags)
            assert ended.returncode == 0, ended.stderr
        else:
            command(train.main, *flags).ok()

    run_to_the_end(*flags, tmp_path / "whole")
    resumed, chance, hits = [*flags, str(tmp_path / "killed"), "--resume"], random.Random(f"{kind} {kills}"), 0
    while hits < kills:
        delay = chance.uniform(0, 1.5)
        status, out, err = interrupt("train.py", resumed, "Compiled model", ROOT, signal.SIGKILL, delay, launcher)
        assert "Traceback" not in err, err
        if status != -signal.SIGKILL:
            break
        hits += 1
    assert hits > kills / 2, out
    run_to_the_end(*resumed)
    assert not list((tmp_path / "killed").glob("*.tmp"))
    paths = [max((tmp_path / name).glob("dalle_*.pt"), key=checkpoint.step_of) for name in ("killed", "whole")]
    ours, theirs = map(checkpoint.read, paths)
    for part in ("step", "progress", "scheduler_state"):
        assert ours[part] == theirs[part]
    for part in ("weights", "ema_weights"):
        assert_equal(ours.get(part, {}), theirs.get(part, {}))
