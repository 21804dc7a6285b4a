"""The model against dalle-pytorch with the same weights, its sizes, its losses and its attention patterns."""

import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

from models.dalle import DALLE, parameter_groups
from models.transformer import Transformer, pattern_mask
from tests.builders import small_dalle
from utils.dalle_pytorch import convert

SIZES = dict(dim=32, num_text_tokens=50, text_seq_len=6, depth=4, heads=2, dim_head=16)


def converted(weights, **options):
    """Return our hparams and weights of a dalle-pytorch checkpoint."""
    saved = convert({"hparams": {**SIZES, **options}, "weights": weights, "version": "1.6.6"})
    known = {*inspect.signature(DALLE).parameters, *inspect.signature(Transformer).parameters}
    hparams = {name: value for name, value in saved["hparams"].items() if name in known}
    return hparams, {name: tensor for name, tensor in saved["weights"].items() if not name.startswith("vae.")}


def both_models(dalle_pytorch, **options):
    torch.manual_seed(0)
    vae = dalle_pytorch.DiscreteVAE(image_size=32, num_layers=3, num_tokens=24, codebook_dim=8, hidden_dim=8)
    options = {"rotary_emb": False, "shift_tokens": False, **options}
    theirs = dalle_pytorch.DALLE(vae=vae, **{**SIZES, **options})
    for parameter in theirs.parameters():  # LayerScale's 0.1 and zero biases would hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.3
    hparams, weights = converted(theirs.state_dict(), **options)
    ours = DALLE(vae=vae, **hparams)
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("vae.") for name in missing)
    return ours.eval(), theirs.eval()


def some_batch(ours, batch=3):
    text = torch.randint(1, 50, (batch, 6))
    text[1, 3:] = 0
    text[2] = 0
    return text, torch.randint(0, 24, (batch, ours.image_seq_len))


OPTIONS = ("rotary_emb", "shift_tokens", "stable", "sandwich_norm", "reversible", "share_input_output_emb")
FOUR = ("full", "axial_row", "axial_col", "conv_like")
SHARED = {"depth": 8, "shared_attn_ids": (0, 1, 2, 3), "shared_ff_ids": (0, 1)}
EVERY_COMBINATION = [dict(zip(OPTIONS, values)) for values in itertools.product((False, True), repeat=len(OPTIONS))]
ONE_OR_ALL = [options for options in EVERY_COMBINATION if sum(options.values()) in (1, len(OPTIONS))]
CASES = [*(((pattern,), ONE_OR_ALL[-1:]) for pattern in FOUR), (FOUR, ONE_OR_ALL)]
CASES.append(pytest.param(FOUR, EVERY_COMBINATION, marks=pytest.mark.slow))


@pytest.mark.parametrize("shared", [{}, SHARED], ids=["", "shared"])
@pytest.mark.parametrize("attn_types, combinations", CASES)
def test_logits_equal_dalle_pytorch_with_its_options(dalle_pytorch, attn_types, combinations, shared):
    for options in combinations:
        ours, theirs = both_models(dalle_pytorch, attn_types=attn_types, **shared, **options)
        text, codes = some_batch(ours)
        with torch.no_grad():
            difference = (ours(text, codes) - theirs(text, codes)).abs().max()
            partial = (ours(text, codes[:, :5]) - theirs(text, codes[:, :5])).abs().max()
        assert max(difference, partial) < 1e-5, options


@pytest.mark.parametrize("options", [{}, dict.fromkeys(OPTIONS[:4], True)], ids=["plain", "options"])
def test_loss_and_gradients_equal_dalle_pytorch(dalle_pytorch, options):
    options = {"attn_types": FOUR, **SHARED, **options}
    ours, theirs = both_models(dalle_pytorch, **options)
    text, codes = some_batch(ours)
    loss = ours.train()(text, codes, return_loss=True).total
    expected_loss = theirs.train()(text, codes, return_loss=True)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected_loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    _, expected = converted(expected, **options)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-3)


WINDOWS = {  # <bos> and a 6 × 6 image: what codes (row, column) see of the image
    ("conv_like", 3, 2): "...... 11111. 11111. 111... ...... ......",
    ("conv_like", 1, 5): "...111 ...111 ...... ...... ...... ......",
    ("conv_like", 4, 0): "...... ...... 111... 111... 1..... ......",
    ("conv_up_left", 4, 4): "11111. 11111. 11111. 11111. 11111. ......",
    ("conv_up_left", 1, 5): ".11111 .11111 ...... ...... ...... ......",
}


def test_windows_of_the_convolutions_are_these():
    """conv_like is centered on the code, as in Graphcore's application; dalle-pytorch looks up and to the left."""
    for (pattern, row, column), window in WINDOWS.items():
        seen = [cell == "1" for cell in window.replace(" ", "")]
        assert pattern_mask(pattern, 1, 6)[1 + 6 * row + column].tolist() == [True, *seen][:-1], (pattern, row, column)


def test_masked_logits_and_split_loss_agree(tiny_vae):
    torch.manual_seed(0)
    dalle = DALLE(vae=tiny_vae, attn_types=("full", "conv_like"), **SIZES)
    text, codes = torch.randint(1, 50, (2, 6)), torch.randint(0, 32, (2, 16))
    logits = dalle(text, codes)
    assert logits.shape == (2, 22, 50 + 6 + 32)
    assert (logits[:, :6, 56:] < -1e38).all() and (logits[:, 6:, :56] < -1e38).all()
    losses = dalle(text, codes, return_loss=True)
    torch.testing.assert_close(F.cross_entropy(logits[:, :6].flatten(0, 1), text.flatten()), losses.text)
    torch.testing.assert_close(F.cross_entropy(logits[:, 6:].flatten(0, 1), codes.flatten() + 56), losses.image)
    torch.testing.assert_close((losses.text + 7 * losses.image) / 8, losses.total)
    torch.testing.assert_close(dalle.eval()(text, codes, return_loss=True).total, losses.total)
    as_bytes = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    codes = tiny_vae.get_codebook_indices(as_bytes.float() / 255)
    expected = dalle(text, codes, return_loss=True).total
    for images in (as_bytes, as_bytes.float() / 255):
        assert torch.equal(dalle(text, images, return_loss=True).total, expected)


def test_masks_are_these():
    def text_block(rows):  # two text positions, <bos> one of them, then a 3 × 3 picture without its last code
        return torch.tensor([[int(c) for c in row] for row in rows.split()], dtype=torch.bool)

    row = text_block("1000000000 1100000000 1110000000 1111000000 1111100000 1100010000 1100011000 1100011100")
    assert torch.equal(pattern_mask("axial_row", 2, 3)[:8], row)
    col = text_block("1110000000 1101000000 1100100000 1110010000 1101001000 1100100100 1110010010 1101001001")
    assert torch.equal(pattern_mask("axial_col", 2, 3)[2:], col)
    assert torch.equal(pattern_mask("full", 2, 3), torch.ones(10, 10, dtype=torch.bool).tril())


@pytest.mark.parametrize("sandwich_norm", [False, True])
def test_matrices_decay_and_nothing_else(tiny_vae, sandwich_norm):
    tiny_vae.frozen = torch.nn.Linear(3, 3)
    dalle = small_dalle(tiny_vae, sandwich_norm=sandwich_norm)
    names = {id(parameter): name for name, parameter in dalle.named_parameters()}
    decaying, others = parameter_groups(dalle, 0.25)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    expected = ["text_emb.weight", "image_emb.weight", "text_pos_emb.weight"]
    for layer in "01":
        attention, feed_forward = (f"transformer.layers.{layer}.{block}.fn.fn" for block in "01")
        expected += [f"{attention}.to_qkv.weight", f"{attention}.to_out.0.weight"]
        expected += [f"{feed_forward}.net.0.weight", f"{feed_forward}.net.3.weight"]
    expected += ["to_logits.1.weight"]
    assert [names[id(parameter)] for parameter in decaying["params"]] == expected
    rest = {names[id(parameter)] for parameter in others["params"]}
    assert len(rest) == len(others["params"])
    assert rest == {name for name in names.values() if not name.startswith("vae.")} - set(expected)
    assert {"image_pos_emb.weights_0", "transformer.layers.0.0.scale", "to_logits.1.bias"} <= rest
