"""Checkpoint files of DALLE-pytorch: what each version wrote, which are refused, and images from them."""

import copy
import re

import pytest
import torch
from PIL import Image

import generate
from generation.loading import load
from models.discrete_vae import DiscreteVAE
from models.sampling import sample_codes
from models.vae import VQGanVAE
from models.vqgan_files import load_vqgan
from tests.builders import WholePassStepper, one_line
from tests.conftest import ROOT
from tests.models.test_vae import sizes
from utils.checkpoint_info import main as describe

SHAPES = ROOT / "bpe" / "bpe_shapes_vocab.txt"
VAE = {"image_size": 32, "num_layers": 3, "num_tokens": 24, "codebook_dim": 8, "hidden_dim": 8, "num_resnet_blocks": 1}
SIZES = {"num_text_tokens": 132, "text_seq_len": 12, "dim": 24, "depth": 4, "heads": 2, "dim_head": 16}
FOUR = ("full", "axial_row", "axial_col", "conv_like")


@pytest.fixture
def theirs(dalle_pytorch):
    """A dalle-pytorch DALLE with its defaults, rotary embeddings and token shift, and large random weights."""
    torch.manual_seed(0)
    model = dalle_pytorch.DALLE(vae=dalle_pytorch.DiscreteVAE(**VAE), attn_types=FOUR, **SIZES)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.eval()


def save(path, model, **changes):
    """Write a checkpoint as train_dalle.py of 1.6.6 does."""
    hparams = {**SIZES, "attn_types": FOUR, "loss_img_weight": 7, "reversible": False, "stable": False}
    saved = {"hparams": hparams, "vae_params": VAE, "epoch": 3, "version": "1.6.6", "vae_class_name": "DiscreteVAE"}
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    saved.update(weights=model.state_dict(), opt_state=adam, scheduler_state=None)
    saved.update({key: value for key, value in changes.items() if key != "hparams"})
    saved["hparams"] = {**hparams, **changes.get("hparams", {})}
    torch.save({key: value for key, value in saved.items() if value != "absent"}, path)
    return path


def logits(model):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 130, (3, 12), generator=generator)
    codes = torch.randint(0, 24, (3, 16), generator=generator)
    text[1, 5:] = 0
    with torch.no_grad():
        return model(text, codes)


def test_a_checkpoint_generates_with_a_vocabulary_given_by_path(theirs, command, tmp_path):
    path = save(tmp_path / "dalle.pt", theirs)
    flags = ["--dalle_path", path, "--bpe_path", SHAPES, "--outputs_dir", tmp_path / "out", "--num_images", 2]
    command(generate.main, *flags, "--text", "a red circle", "--seed", 1, "--device", "cpu").ok()
    assert [Image.open(image).size for image in (tmp_path / "out").rglob("*.jpg")] == [(32, 32)] * 2
    loaded = load(path, bpe_path=SHAPES, precision="fp32", device="cpu")
    assert (logits(loaded.model) - logits(theirs)).abs().max() < 1e-5
    text, seeds = torch.randint(1, 130, (2, 12)), lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    expected = sample_codes(loaded.model, text, WholePassStepper(loaded.model), generator=seeds())
    assert torch.equal(loaded.sampler(text, generator=seeds()), expected)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), theirs.vae.get_codebook_indices(images))
    pixels = (theirs.vae.decode(expected) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(loaded.decode(expected), pixels, atol=1e-5, rtol=0)
    ended = command(describe, path).ok()
    assert "rotary_emb on" in ended.out and "dalle-pytorch 1.6.6" in ended.out


def test_the_window_of_conv_like_is_that_of_the_version(theirs, tmp_path):
    up_left, centered = {0, 1, 4, 5, 8, 9, 12, 13}, {4, 5, 6, 7, 8, 9, 10, 11, 12, 13}
    for old_names, version, seen in (
        (False, "1.6.6", up_left),
        (False, "1.4.2", centered),
        (False, "absent", up_left),
        (True, "1.2.0", centered),
        (True, "absent", centered),
    ):
        weights = theirs.state_dict()
        if old_names:  # of 1.0 to 1.2: other wrappers, no angle for the last code, and a dimension more
            pattern_of_names = re.compile(r"(\.fn){2,}\.(to_qkv|to_out|net)")
            weights = {pattern_of_names.sub(r".fn.fn.fn.\2", name): tensor for name, tensor in weights.items()}
            weights["transformer.pos_emb"] = weights["transformer.pos_emb"][None, :, :-1]
        path = save(tmp_path / "dalle.pt", theirs, weights=weights, version=version)
        model = load(path, bpe_path=SHAPES, device="cpu").model
        row = model.transformer.layers[3][0].fn.fn.mask[13 + 13, 13:]  # of the code in row 3, column 1
        assert set(row.nonzero().flatten().tolist()) == seen, version
        assert torch.isfinite(logits(model)).all()


def test_what_cannot_be_used_is_named(theirs, tmp_path):
    for changes, message in (
        ({"hparams": {"attn_types": ("full", "mlp")}}, r"attn_types include mlp \(gated MLPs\)"),
        ({"hparams": {"attn_types": ["sparse"]}}, "attn_types include sparse"),
        ({"weights": "To get a working standard checkpoint, look into …"}, "files of DeepSpeed"),
        ({"hparams": {"dim": None}}, "its hparams lack dim"),
        ({"hparams": {"depth": 5}}, "transformer.layers.4.* is missing"),
    ):
        path = save(tmp_path / "dalle.pt", theirs, **changes)
        with one_line(f"{path}: .*{message}"):
            load(path, bpe_path=SHAPES, device="cpu")


def test_a_vae_pickled_among_the_hparams_is_not_run(theirs, tmp_path):
    path = save(tmp_path / "dalle.pt", theirs, hparams={"vae": copy.deepcopy(theirs.vae)})
    assert (logits(load(path, bpe_path=SHAPES, device="cpu").model) - logits(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize("gumbel", [False, True], ids=["VQModel", "GumbelVQ"])
def test_the_sizes_of_a_vqgan_follow_from_its_weights(theirs, tmp_path, gumbel):
    torch.manual_seed(1)
    vae = VQGanVAE(sizes(resolution=8, attn_resolutions=(4,), gumbel=gumbel, n_embed=24), gumbel)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("vae.")}
    weights.update({f"vae.{name}": tensor for name, tensor in vae.state_dict().items()})
    weights["vae.model.loss.perceptual_loss.weight"] = torch.ones(2)
    path = save(tmp_path / "dalle.pt", theirs, weights=weights, vae_params=None, vae_class_name="VQGanVAE")
    found = load(path, bpe_path=SHAPES, device="cpu").model.vae
    assert found.hparams == vae.hparams and found.fingerprint() == vae.fingerprint()
    del weights["vae.model.encoder.conv_in.weight"]
    with pytest.raises(ValueError, match="its VQGAN has no encoder.conv_in.weight; give the VQGAN"):
        load(save(path, theirs, weights=weights, vae_params=None), bpe_path=SHAPES, device="cpu")


def test_a_discrete_vae_by_path(theirs, tmp_path):
    torch.save({"hparams": VAE, "weights": theirs.vae.state_dict()}, tmp_path / "vae.pt")
    vae = load_vqgan(str(tmp_path / "vae.pt"))
    images = torch.rand(2, 3, 32, 32)
    assert isinstance(vae, DiscreteVAE) and torch.equal(vae(images), theirs.vae.get_codebook_indices(images))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "vae.pt").read_bytes()[:-100])
    with one_line(f"{tmp_path}/cut.pt: not a VQGAN checkpoint, or damaged"):
        load_vqgan(str(tmp_path / "cut.pt"))
    for setting, problem in (
        ("hidden_dim", "does not fit its hparams: encoder.0.0.weight is"),
        ("channels", "4 channels"),
    ):
        torch.save({"hparams": {**VAE, setting: 4}, "weights": theirs.vae.state_dict()}, tmp_path / "vae.pt")
        with one_line(f"{tmp_path}/vae.pt: .*{problem}"):
            load_vqgan(str(tmp_path / "vae.pt"))
