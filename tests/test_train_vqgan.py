"""train_vqgan.py as a user starts it: its files in taming's format, its figures, and how it is stopped."""

import contextlib
import itertools
import re
import signal
from argparse import Namespace

import pytest
import torch
import yaml
from PIL import Image

import train_vqgan
from benchmarks import peer
from data.images import load_images
from data.loader import EpochOrder
from data.sources import find_images
from models.vqgan_files import load_vqgan
from models.vqgan_training import VQGanTrainer
from tests.builders import interrupt
from training.vqgan import endless_batches

FILES = {"vqgan.ckpt", "vqgan.yaml", "vqgan_training.pt", ".lock"}


@pytest.fixture
def flags(drawn_pictures):
    model = "--image-size 32 --patch-size 8 --ch 32 --ch-mult 1 --num-res-blocks 1 --z-channels 16 --embed-dim 8"
    run = "--n-embed 32 --batch-size 8 --max-steps 40 --continuous-steps 10 --warmup-steps 2 --device cpu"
    words = f"{model} {run} --precision fp32 --dataloader-workers 0 --validation-split 0 --attn-resolutions="
    return [*words.split(), "--input-folder", str(drawn_pictures)]


@pytest.fixture
def trained(command, flags, tmp_path, monkeypatch):
    """trained(*more flags) → (output folder, what was logged)."""
    monkeypatch.setattr("models.vqgan_training.SEED_CELLS", 1024)  # twelve pictures have 192, over and over
    folders = []

    def run(*more):
        folders.append(tmp_path / f"vqgan{len(folders)}")
        ended = command(train_vqgan.main, *flags, "--output-dir", folders[-1], *more).ok()
        return folders[-1], ended.out

    return run


def psnr(vae, folder, size):
    """Mean over the folder's pictures of what comes back of them, in dB."""
    pixels = load_images(sorted(folder.glob("*.png")), size) / 255
    error = (vae.decode(vae.get_codebook_indices(pixels)) - pixels).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def test_the_files_are_tamings(trained, drawn_pictures):
    folder, out = trained()
    assert {path.name for path in folder.iterdir()} == {*FILES, "reconstructions.png"}
    config = yaml.safe_load((folder / "vqgan.yaml").read_text())["model"]
    params = config["params"]
    assert config["target"] == "taming.models.vqgan.VQModel"
    assert (params["n_embed"], params["embed_dim"], params["patch_size"]) == (32, 8, 8)
    stored = torch.load(folder / "vqgan.ckpt", weights_only=True)
    peer.TamingVQGAN(params).load_state_dict(stored["state_dict"], strict=True)
    assert stored["global_step"] == 40
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in stored["state_dict"].values())

    vae = load_vqgan(str(folder))
    told = float(re.findall(r"PSNR (\S+) dB on 12 training images", out)[-1])
    assert abs(psnr(vae, drawn_pictures, 32) - told) < 0.02
    assert Image.open(folder / "reconstructions.png").size == (274, 70)  # eight, above what comes back of them


def test_ctrl_c_saves_what_there_is(flags, tmp_path):
    # 16 × 16 codes a picture, so that the codebook begins at once.
    words = [*flags, "--output-dir", tmp_path / "v", "--patch-size", "2", "--max-steps", "100000"]
    words += ["--continuous-steps", "1"]
    status, out, err = interrupt("train_vqgan.py", words, "the codebook starts", tmp_path)
    assert status == 130 and err == "", err
    assert re.search(r"interrupted at step \d+ of 100000; saved the VQGAN so far", out)
    assert load_vqgan(str(tmp_path / "v")).fmap_size == 16
    assert {path.name for path in (tmp_path / "v").iterdir()} == FILES


@contextlib.contextmanager
def interrupted(monkeypatch, after):
    """Send SIGTERM to a run while it makes step `after`, which it completes."""
    step = VQGanTrainer.step

    def interrupting(trainer, *arguments):
        if trainer.steps == after - 1:
            first = trainer.optimizers[0]
            update = first.step
            patch.setattr(first, "step", lambda: (update(), signal.raise_signal(signal.SIGTERM)))
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(VQGanTrainer, "step", interrupting)
        yield


def test_a_resumed_run_equals_an_uninterrupted_one(trained, command, flags, tmp_path, monkeypatch):
    settings = ["--max-steps", "24", "--revival-interval", "5"]
    whole, _ = trained(*settings)
    words = [*flags, "--output-dir", tmp_path / "v", *settings]
    with interrupted(monkeypatch, 13):
        assert command(train_vqgan.main, *words).status == 130
    left = [tmp_path / "v" / f"{name}.77.tmp" for name in ("vqgan.ckpt", "vqgan.yaml", "vqgan_training.pt")]
    for path in left:  # as a run that is killed leaves them
        path.write_bytes(b"half of a file")
    ended = command(train_vqgan.main, *words, "--resume")
    assert ended.status == 0 and "resumed at step 13 of 24" in ended.out
    assert not any(path.exists() for path in left)
    assert load_vqgan(str(tmp_path / "v")).fingerprint() == load_vqgan(str(whole)).fingerprint()
    ended = command(train_vqgan.main, *words, "--max-steps", "30", "--resume", "--ch", "64")
    ended.refused("vqgan_training.pt is not of this VQGAN")


def test_a_run_starts_with_the_codes_or_the_weights_of_another(trained, command, flags, drawn_pictures, tmp_path):
    first, _ = trained()
    second, out = trained("--decoder-of", first, "--learning-rate", "0.005")
    old, new = load_vqgan(str(first)), load_vqgan(str(second))
    pixels = load_images(sorted(drawn_pictures.glob("*.png")), 32) / 255
    assert torch.equal(old.get_codebook_indices(pixels), new.get_codebook_indices(pixels))
    assert psnr(new, drawn_pictures, 32) > psnr(old, drawn_pictures, 32) + 1
    words = ["--input-folder", drawn_pictures, "--output-dir", tmp_path / "fine", "--init-from", first]
    run = "--device cpu --batch-size 8 --max-steps 20 --learning-rate 0.005 --precision fp32"
    ended = command(train_vqgan.main, *words, *run.split(), "--config", "vqgan_photos")  # whose sizes are others
    assert ended.status == 0 and "32 × 32 pixels to 4 × 4 codes of 32" in ended.out, ended
    assert "the codebook starts" not in ended.out
    vae = load_vqgan(str(tmp_path / "fine"))
    assert vae.hparams == old.hparams and psnr(vae, drawn_pictures, 32) > psnr(old, drawn_pictures, 32)
    command(train_vqgan.main, *words, *run.split(), "--ch", 64).refused("--ch: the sizes are those of --init-from")
    words[3] = tmp_path / "split"
    ended = command(train_vqgan.main, *words, *run.split(), "--validation-split", 0.99, "--max-steps", 1)
    assert "1 training images, 11 validation images" in ended.ok().out  # of twelve, one is left


def test_a_finished_vqgan_is_never_overwritten(trained, command, flags, monkeypatch):
    folder, _ = trained("--max-steps", "12")
    finished = load_vqgan(str(folder)).fingerprint()
    words = [*flags, "--output-dir", folder]
    ended = command(train_vqgan.main, *words).refused(f"--output-dir {folder}: has the VQGAN of an earlier run")
    ended = command(train_vqgan.main, *words, "--max-steps", 12, "--resume")
    assert ended.status == 0 and "has a VQGAN of 12 steps already" in ended.out, ended

    with interrupted(monkeypatch, 16):
        ended = command(train_vqgan.main, *words, "--max-steps", 20, "--resume")
    assert ended.status == 130 and load_vqgan(str(folder)).fingerprint() != finished
    assert load_vqgan(str(folder / "step_12")).fingerprint() == finished
    ended = command(train_vqgan.main, *words, "--max-steps", 20, "--resume")
    assert ended.status == 0 and "resumed at step 16 of 20" in ended.out, ended
    assert load_vqgan(str(folder)).fingerprint() != finished
    assert load_vqgan(str(folder / "step_12")).fingerprint() == finished
    (folder / "vqgan_training.pt").unlink()
    command(train_vqgan.main, *words, "--max-steps", 30, "--resume").refused("has a VQGAN without vqgan_training.pt")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_continue_without_end_and_skip_what_cannot_be_read(tmp_path, logged, workers):
    for i in range(6):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = find_images(tmp_path)

    def reds(source, batch_size, count, first=0):
        settings = Namespace(batch_size=batch_size, image_size=4, random_seed=3, dataloader_workers=workers)
        batches = endless_batches(source, settings, first)
        return [batch[:, 0, 0, 0].tolist() for batch in itertools.islice(batches, count)]

    images = load_images(paths, 4)
    for size in (4, 2, 99):
        order = EpochOrder(6, min(size, 6), seed=3)
        expected = [[40 * index for _, index in order.batch(*order.place(number))] for number in range(9)]
        assert reds(images, size, 9) == expected == reds(paths, size, 9)
        assert reds(images, size, 4, first=5) == expected[5:]
    for i in (0, 1, 2, 4):
        paths[i].write_bytes(b"damaged")
    assert sorted(reds(paths, 1, 8)) == [[120]] * 4 + [[200]] * 4 and len(logged.messages) == 4
    for i in (3, 5):
        paths[i].write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of 6 images can be read"):
        reds(paths, 2, 1)
