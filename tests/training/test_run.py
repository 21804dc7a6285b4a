"""--init-from: a new run with the weights of any checkpoint that generate.py reads; the sample grids of a run."""

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from data.images import load_image
from generation.loading import read_model
from models.discrete_vae import DiscreteVAE
from tests.builders import metrics_in, tokenize
from tests.test_generate import their_vocabulary, weights_of, write_reference  # noqa: F401
from tests.utils.test_dalle_pytorch import SHAPES, save, theirs  # noqa: F401  # a fixture
from training import validation as samples
from utils import checkpoint
from utils.checkpoint_info import main as export


@pytest.fixture
def started(command, drawn_pictures, tmp_path):
    """started(*flags): runs train.py for one epoch with the weights of a file → (output folder, Ended)."""

    def run(path, *flags, status=0, name="run"):
        machine = ["--device", "cpu", "--precision", "fp32", "--dataloader-workers", 0, "--sample-steps", 0]
        places = ["--input-folder", drawn_pictures, "--codes-cache", tmp_path / "codes"]
        places += ["--checkpoint-output-dir", tmp_path / name, "--init-from", path, "--batch-size", 4]
        ended = command(train.main, *machine, *places, *flags)
        assert ended.status == status, ended
        return tmp_path / name, ended

    return run


def read_losses(folder):
    return [(line["step"], line["loss/total"]) for line in metrics_in(folder) if "loss/total" in line]


def files(kind, request, tmp_path):
    """Return a checkpoint of another program or run, and the flags for what it lacks."""
    if kind == "dalle-pytorch":
        return save(tmp_path / "dalle.pt", request.getfixturevalue("theirs")), ["--bpe-path", SHAPES]
    if kind == "reference":
        vocabulary = ["--bpe-path", request.getfixturevalue("their_vocabulary")]
        return write_reference(tmp_path / "dalle_3.pt", weights_of(request.getfixturevalue("tiny_vqgan"))), vocabulary
    ours = request.getfixturevalue("tiny_checkpoint")
    if kind == "safetensors":
        export([str(ours), "--export", str(tmp_path / "dalle.safetensors")])
        return tmp_path / "dalle.safetensors", []
    return ours, []


@pytest.mark.parametrize("kind", ["ours", "safetensors", "reference", "dalle-pytorch"])
def test_a_new_run_starts_with_the_weights_of_a_file(kind, request, started, tmp_path):
    path, vocabulary = files(kind, request, tmp_path)
    folder, ended = started(path, *vocabulary, "--learning-rate", 1e-30, "--optimizer", "AdamW")
    assert "12 images, 3 steps" in ended.out and "resuming" not in ended.out
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3]
    saved = checkpoint.read(folder / "dalle_0.pt")
    assert saved["step"] == 3 and saved["settings"]["init_from"] == str(path)
    before, tokenizer, _ = read_model(path, None, None, *vocabulary[1:])
    after, _, _ = read_model(folder / "dalle_0.pt")  # needs no vocabulary by path
    assert isinstance(after.vae, DiscreteVAE) is (kind == "dalle-pytorch")
    text, codes = tokenize(tokenizer, ["red star", "blue"], before.text_seq_len), torch.randint(0, 24, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(after(text, codes), before(text, codes))
    if kind != "ours":
        return
    first = read_losses(folder)[0][1]
    started(path, *vocabulary, "--learning-rate", 1e-2, "--epochs", 4, "--optimizer", "AdamW", name="longer")
    losses = read_losses(tmp_path / "longer")
    assert losses[0][1] == pytest.approx(first, rel=1e-3) and losses[-1][1] < losses[0][1]


def test_the_same_command_with_resume_continues(request, started, tmp_path):
    path, vocabulary = files("dalle-pytorch", request, tmp_path)
    started(path, *vocabulary)
    started(path, *vocabulary, status=2)[1].refused("has dalle_0.pt of an earlier run; continue it with --resume")
    folder, ended = started(path, *vocabulary, "--resume", "--epochs", 2)
    assert "at step 3" in ended.out and checkpoint.read(folder / "dalle_1.pt")["hparams"]["rotary_emb"] is True


def test_what_contradicts_the_file_is_refused(started, tiny_checkpoint):
    for flags, message in (
        ("--hidden-size 64", "argument --hidden-size: the network is that of --init-from"),
        ("--pretrained-checkpoint x.pt", "argument --init-from: starts a new run, --pretrained-checkpoint continues"),
        ("--bpe-path bpe/bpe_shapes_vocab.txt", "bpe_shapes_vocab.txt: fingerprint"),
    ):
        started(tiny_checkpoint, *flags.split(), status=2)[1].refused(message)


def test_a_configuration_does_not_contradict_the_file(started, tiny_checkpoint):
    folder, _ = started(tiny_checkpoint, "--config", "photos", "--max-steps", "2", "--validation-split", "0.2")
    assert checkpoint.read(folder / "dalle_0.pt")["hparams"]["dim"] == 32


SAMPLED = ["--epochs", 2, "--batch-size", 3, "--checkpoint-save-epochs", 99]


@pytest.fixture
def trained(command, tiny_flags, tmp_path):
    """trained(name, *flags): train.py with SAMPLED and these → its output folder."""

    def run(name, *flags):
        ended = command(train.main, *tiny_flags, *SAMPLED, "--checkpoint-output-dir", tmp_path / name, *flags)
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
