"""evaluate.py as a user starts it: its figures are those of train.py and train_vqgan.py and right about images of known
content; the grid and its prompts; the nearest training images.
"""

import contextlib
import io
import json
import random
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import evaluate
import generate
import log
import train
from backends.native import backend
from data.images import load_images
from data.shapes import COLORS, draw_scene, parse_caption, validation_prompts
from generation.images import make_grid
from generation.loading import read_model
from models.vqgan_training import evaluate as evaluate_vqgan
from training import checkpoints, evaluation
from training.nearest import nearest_by_codes, nearest_by_pixels
from utils import checkpoint


@pytest.fixture
def evaluated(command, tiny_checkpoint, tmp_path):
    """evaluated(*flags): runs evaluate.py on a checkpoint that has learnt next to nothing → its output."""

    def run(*flags):
        ended = command(evaluate.main, "--dalle_path", tiny_checkpoint, "--outputs-dir", tmp_path / "out", *flags).ok()
        return ended.out

    return run


def test_figure_grid_and_prompts_which_the_seed_decides_and_not_the_batch_size(evaluated, tmp_path):
    out = evaluated("--prompts", 5, "--batch-size", 2)
    assert re.search(r"^prompt accuracy: \d+\.\d % \(5 prompts\)$", out, re.M)
    assert str(tmp_path / "out" / "grid.png") in out and str(tmp_path / "out" / "prompts.txt") in out
    assert (tmp_path / "out" / "prompts.txt").read_text().splitlines() == validation_prompts("score", 5, 0)
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 * 34 + 2, 3 * 34 + 2)  # five of 32 × 32 in two columns
    grids = []
    for flags in (["--batch-size", 4], ["--batch-size", 3], ["--seed", 1], ["--top_k", 1]):
        evaluated("--prompts", 4, *flags)
        grids.append((tmp_path / "out" / "grid.png").read_bytes())
    assert grids[0] == grids[1] and len(set(grids)) == 3


def test_the_likeliest_of_several_images_is_the_one_that_generate_keeps(evaluated, tiny_checkpoint, tmp_path):
    evaluated("--prompts", 2, "--rank", 3)
    loaded = generate.load(tiny_checkpoint)
    prompts = validation_prompts("score", 2, 0)
    kept = [generate.generate(loaded, prompt, seed=3 * number, rank=3)[0] for number, prompt in enumerate(prompts)]
    assert ImageChops.difference(Image.open(tmp_path / "out" / "grid.png"), make_grid(kept)).getbbox() is None


def test_pictures_of_known_content_get_their_marks():
    prompts = validation_prompts("score", 6)
    drawn = [draw_scene(parse_caption(prompt), random.Random(number)) for number, prompt in enumerate(prompts)]
    drawn[1] = np.full_like(drawn[1], 247)  # nothing to be seen
    scene = parse_caption(prompts[2])
    colour = next(name for name in COLORS if name not in (scene.first.color, scene.second.color))
    drawn[2] = draw_scene(scene._replace(first=scene.first._replace(color=colour)), random.Random(2))
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255
    share, wrong = evaluation.judge(pictures, evaluation.shape_faults(prompts))
    assert share == 4 / 6 and wrong == {"count": 1, "colour": 1}


def test_scores_decode_one_batch_at_a_time(evaluated, drawn_pictures, monkeypatch):
    decoder, sizes = backend.decoder, []

    def recorded(*given):
        decode = decoder(*given)
        return lambda codes: sizes.append(len(codes)) or decode(codes)

    monkeypatch.setattr(backend, "decoder", recorded)
    scorers = (lambda images, texts: torch.ones(len(images))), Mock(**{"distance.return_value": 2.0})
    monkeypatch.setattr(evaluation, "load_scorers", lambda *given: scorers)
    out = evaluated("--input-folder", drawn_pictures, "--batch-size", 5)
    assert "CLIP score: 1.00 (ViT-B-32, 12 images)" in out and "FID: 2.00 (12 images" in out and max(sizes) == 5


@pytest.fixture(scope="module")
def validated(tiny_flags, drawn_pictures, tmp_path_factory):
    """(a checkpoint, the losses in the last line of validation) of a run with averaged weights and cut captions."""
    folder, out = tmp_path_factory.mktemp("validated"), io.StringIO()
    flags = [*tiny_flags, "--checkpoint-output-dir", str(folder), "--validation-folder", str(drawn_pictures)]
    more = "--ema-decay 0.5 --random-seed 7 --text-seq-len 6 --truncate-captions --batch-size 6"
    flags += more.split()
    log.set_up()
    with contextlib.redirect_stdout(out):
        train.main(flags)
    return folder / "dalle_0.pt", re.findall(r"validation: (.*)", out.getvalue())[-1]


def evaluate_folder(command, path, drawn_pictures, out, *flags):
    fixed = ["--dalle_path", path, "--input-folder", drawn_pictures, "--outputs-dir", out, "--precision", "fp32"]
    ended = command(evaluate.main, *fixed, "--device", "cpu", *flags).ok()
    (path,) = out.glob("*.json*")
    return ended.out, json.loads(path.read_text())


def test_losses_are_those_of_train(command, validated, drawn_pictures, tmp_path):
    path, told = validated
    before = sorted(drawn_pictures.iterdir())
    out, found = evaluate_folder(command, path, drawn_pictures, tmp_path / "out", "--batch-size", 6)
    assert f"losses of 12 pairs: {told}" in out
    kept = checkpoint.read(path)
    assert found["losses"]["total"] == kept["progress"]["held_out_loss"]  # to the last digit
    assert found["averaged_weights"] and "prompt_accuracy" not in found and sorted(drawn_pictures.iterdir()) == before
    _, others = evaluate_folder(command, path, drawn_pictures, tmp_path / "other", "--batch-size", 5)
    assert others["losses"] == pytest.approx(found["losses"], rel=1e-5)
    kept["settings"]["random_seed"] = 8  # other captions
    checkpoints.write(tmp_path / "seed.pt", kept)
    _, others = evaluate_folder(command, tmp_path / "seed.pt", drawn_pictures, tmp_path / "seed")
    assert others["losses"]["text"] != pytest.approx(found["losses"]["text"], rel=1e-5)
    del kept["ema_weights"]
    checkpoints.write(tmp_path / "trained.pt", kept)
    _, others = evaluate_folder(command, tmp_path / "trained.pt", drawn_pictures, tmp_path / "trained")
    assert not others["averaged_weights"]
    assert others["losses"]["image"] != pytest.approx(found["losses"]["image"], rel=1e-5)


def test_reconstructions_are_those_of_train_vqgan(command, tiny_checkpoint, drawn_pictures, tmp_path):
    _, found = evaluate_folder(command, tiny_checkpoint, drawn_pictures, tmp_path / "out")
    vae = read_model(tiny_checkpoint)[0].vae
    pictures = load_images(sorted(drawn_pictures.glob("*.png")), 32)
    expected = evaluate_vqgan(vae.model, pictures, 4)
    assert found["reconstruction_psnr"] == pytest.approx(expected.psnr, abs=1e-3)
    grid = np.array(Image.open(tmp_path / "out" / "reconstructions.png")).astype(int)
    assert grid.shape == (2 * 34 + 2, 8 * 34 + 2, 3)
    for number in range(8):
        left = 2 + 34 * number
        assert np.array_equal(grid[2:34, left : left + 32], pictures[number].permute(1, 2, 0).numpy())
        below = grid[36:68, left : left + 32] - expected.reconstructions[number].permute(1, 2, 0).numpy()
        assert np.abs(below).max() <= 1


def test_a_few_pairs_of_a_folder_with_a_bad_picture(command, tiny_checkpoint, picture_folder, tmp_path):
    header = (picture_folder / "03.png").read_bytes()[:60]
    (picture_folder / "03.png").write_bytes(header)
    out, found = evaluate_folder(command, tiny_checkpoint, picture_folder, tmp_path / "out")
    assert found["pairs"] == 11 and "1 file (unreadable image)" in out
    _, found = evaluate_folder(command, tiny_checkpoint, picture_folder, tmp_path / "out", "--max-pairs", 5)
    assert found["pairs"] in (4, 5) and found["losses"]["perplexity"] == pytest.approx(np.exp(found["losses"]["image"]))


def test_what_it_refuses(command, tiny_checkpoint, picture_folder, tmp_path, monkeypatch):
    (picture_folder / "03.txt").write_text("red " * 50)
    flags = ["--dalle_path", tiny_checkpoint, "--input-folder", picture_folder, "--outputs-dir", tmp_path / "out"]
    command(evaluate.main, *flags).refused("--truncate-captions")
    assert not (tmp_path / "out").exists()
    command(evaluate.main, *flags, "--truncate-captions").ok()
    monkeypatch.setenv("WORLD_SIZE", "2")
    command(evaluate.main, *flags[:2], *flags[4:]).refused("without torchrun")


def test_the_nearest_are_those_of_a_plain_comparison():
    generator = torch.Generator().manual_seed(0)
    codes, others = (torch.randint(0, 4, (n, 16), generator=generator) for n in (5, 9))
    codes[2] = others[7]
    found = nearest_by_codes(codes, others)
    shares = (codes[:, None] == others[None]).float().mean(dim=2)
    assert found.which.tolist() == shares.argmax(dim=1).tolist() and torch.allclose(found.score, shares.amax(dim=1))
    assert found.which[2] == 7 and found.score[2] == 1
    without = nearest_by_codes(others, others, range(9))
    shares = (others[:, None] == others[None]).float().mean(dim=2).fill_diagonal_(-1)
    assert torch.allclose(without.score, shares.amax(dim=1))
    pixels = torch.randint(0, 256, (6, 3, 4, 4), generator=generator).byte()
    found = nearest_by_pixels(pixels[[4, 1]].float() + 2.55, pixels)
    assert found.which.tolist() == [4, 1] and torch.allclose(found.score, torch.tensor(0.01))


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
