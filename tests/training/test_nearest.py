"""The nearest training images: found among others, and a model that copies is caught."""

import json

import torch
from PIL import Image

import evaluate
import train
from training.nearest import nearest_by_codes, nearest_by_pixels


def test_the_nearest_are_those_of_a_plain_comparison():
    generator = torch.Generator().manual_seed(0)
    codes, others = (torch.randint(0, 4, (n, 16), generator=generator) for n in (5, 9))
    codes[2] = others[7]
    found = nearest_by_codes(codes, others)
    shares = (codes[:, None] == others[None]).float().mean(dim=2)
    assert found.which.tolist() == shares.argmax(dim=1).tolist() and torch.allclose(found.figure, shares.amax(dim=1))
    assert found.which[2] == 7 and found.figure[2] == 1
    without = nearest_by_codes(others, others, range(9))
    shares = (others[:, None] == others[None]).float().mean(dim=2).fill_diagonal_(-1)
    assert torch.allclose(without.figure, shares.amax(dim=1))
    pixels = torch.randint(0, 256, (6, 3, 4, 4), generator=generator).byte()
    found = nearest_by_pixels(pixels[[4, 1]].float() + 2.55, pixels)
    assert found.which.tolist() == [4, 1] and torch.allclose(found.figure, torch.tensor(0.01))


def test_a_model_that_memorized_its_images_is_caught(command, tiny_flags, drawn_pictures, tmp_path):
    flags = [*tiny_flags, "--epochs", 60, "--optimizer", "Muon", "--learning-rate", 2e-2, "--lr-scheduler", "cosine"]
    assert command(train.main, *flags, "--checkpoint-output-dir", tmp_path, "--keep-checkpoints", 1).status == 0
    (path,) = tmp_path.glob("dalle_*.pt")
    measure = ["--dalle_path", path, "--nearest", drawn_pictures, "--device", "cpu", "--outputs-dir", tmp_path / "out"]
    ended = command(evaluate.main, *measure, "--top_k", "1").ok()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["nearest"]
    assert found["training_images"] == len(found["captions"]) == 12
    assert found["copies"] >= 9 and "prompt accuracy" not in ended.out
    names = sorted(image.name for image in drawn_pictures.glob("*.png"))
    assert sum(one == two for one, two in zip(found["nearest_by_codes"], names)) >= 8  # its own caption's image
    assert set(found["nearest_by_pixels"]) <= set(names) and Image.open(tmp_path / "out" / "nearest.png").width > 300
