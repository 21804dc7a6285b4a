"""Sample grids: what is in them, that they are repeatable, and that drawing them changes nothing of the training."""

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from data.images import load_image
from generation.loading import read_model
from training import validation as samples
from utils import checkpoint

FLAGS = ["--epochs", 2, "--batch-size", 3, "--checkpoint-save-epochs", 99]


@pytest.fixture
def trained(command, tiny_flags, tmp_path):
    """trained(name, *flags): train.py with FLAGS and these → its output folder."""

    def run(name, *flags):
        ended = command(train.main, *tiny_flags, *FLAGS, "--checkpoint-output-dir", tmp_path / name, *flags)
        assert ended.status == 0 and "no sample" not in ended.out, ended
        return tmp_path / name

    return run


def test_sampling_changes_no_bit_of_the_training(trained):
    flags = ["--ff-dropout", 0.3, "--attn-dropout", 0.3, "--ema-decay", 0.9]
    folders = [trained("with", *flags, "--sample-steps", 1), trained("without", *flags)]
    assert len(list((folders[0] / "samples").glob("*.png"))) == 8 and not (folders[1] / "samples").exists()
    first, second = (checkpoint.read(folder / "dalle_1.pt") for folder in folders)
    for part in ("weights", "ema_weights", "opt_state"):
        torch.testing.assert_close(first[part], second[part], atol=0, rtol=0)


def rows_of(grid, columns):
    """The three pictures of each column, as the file shows them: (3, columns, 32, 32, 3)."""
    pixels = np.asarray(grid)
    top, pitch = samples.FONT_SIZE + 2 * samples.GAP, samples.SIDES[0] + samples.GAP
    places = [(top + row * pitch, samples.MARGIN + column * pitch) for row in range(3) for column in range(columns)]
    found = [pixels[y + 2 : y + samples.SIDES[0] : 5, x + 2 : x + samples.SIDES[0] : 5] for y, x in places]
    return np.stack(found).reshape(3, columns, 32, 32, 3)


def test_what_a_grid_shows(trained, command, drawn_pictures, tmp_path):
    shaping = ["--temperature", 0.5, "--top-k", 0.9, "--ema-decay", 0.5]
    folder = trained("run", "--sample-steps", 99, "--learning-rate", 0.01, *shaping)
    captions = (folder / "samples/captions.txt").read_text().splitlines()
    pictures = sorted(drawn_pictures.glob("*.png"))[:8]
    assert captions == [path.with_suffix(".txt").read_text().splitlines()[0] for path in pictures]
    real, again, drawn = rows_of(Image.open(folder / "samples/step_8.png"), 8)
    pixels = np.stack([load_image(path, 32) for path in pictures])
    assert np.array_equal(real, pixels)
    model, tokenizer, recommended = read_model(folder / "dalle_1.pt")  # the averaged weights
    codes = model.vae.get_codebook_indices(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    decoded = (model.vae.decode(codes) * 255).permute(0, 2, 3, 1)
    assert abs(again.astype(int) - decoded.round().numpy()).max() <= 1  # another order of additions
    assert recommended.temperature == 0.5
    for place, caption in enumerate(captions):  # what generate.py draws with the same noise
        flags = ["--dalle_path", folder / "dalle_1.pt", "--seed", 42 + place, "--num_images", 1, "--device", "cpu"]
        flags += ["--precision", "fp32", "--outputs_dir", tmp_path / str(place), "--text", caption]
        command(generate.main, *flags).ok()
        (grid,) = (tmp_path / str(place)).rglob("grid.png")
        generated = np.asarray(Image.open(grid))[2:34, 2:34].astype(int)
        assert abs(drawn[place] - generated).max() <= 1  # a batch of 8 and of 1: another order of additions


def test_what_goes_wrong_in_drawing_does_not_stop_the_run(command, tiny_flags, tmp_path):
    (tmp_path / "samples").write_text("a file where the folder should be")
    ended = command(train.main, *tiny_flags, "--sample-steps", 2, "--checkpoint-output-dir", tmp_path)
    assert ended.status == 0 and (tmp_path / "dalle_0.pt").exists()
    assert ended.out.count("no sample images of step") == 2
