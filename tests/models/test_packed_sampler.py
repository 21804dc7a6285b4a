"""Drawing with prepared weights and small caches against the plain loop of sampling.py."""

import pytest
import torch
from torch.nn import functional as F

from models.attention import PATTERNS, pattern_mask
from models.packed_sampler import PackedStepper, cache_plan
from models.sampling import generate_codes, sample_codes
from models.transformer import GEGLU
from tests.builders import small_dalle

SHAPINGS = (
    {"top_k": None, "top_p": None, "temperature": 1.0, "cond_scale": 1.0},
    {"top_k": 0.5, "top_p": 0.9, "temperature": 0.8, "cond_scale": 2.0},
)


def plain(weight, bias, geglu=False):
    def product(x):
        out = F.linear(x, weight, bias)
        return GEGLU()(out) if geglu else out

    return product


def dalle_of(vae, patterns=PATTERNS, sandwich=False):
    return small_dalle(vae, weight_std=0.3, depth=4, attn_types=patterns, sandwich_norm=sandwich).eval()


def some_text(count=4):
    text = torch.randint(1, 50, (count, 6), generator=torch.Generator().manual_seed(1))
    text[1:, 3:] = 0
    return text


def drawn(model, text, given, shaping, decoder=None):
    """The plain loop's codes, or the decoder's; picture i has seed i."""
    given = {"generator": [torch.Generator().manual_seed(i) for i in range(len(text))], "image_codes": given, **shaping}
    return sample_codes(model, text, decoder.logits, **given) if decoder else generate_codes(model, text, **given)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_plan_reads_what_the_mask_shows(pattern):
    """Played through with the codes' own numbers as keys."""
    mask = pattern_mask(pattern, 7, 5)[7:, 7:]
    slots, reads = cache_plan(mask)
    cache = torch.full((1 + max(slots),), -1)
    for place in range(len(mask)):
        cache[slots[place]] = place
        assert sorted(cache[reads[place]].tolist()) == mask[place].nonzero().flatten().tolist()


def test_a_cache_is_small_and_its_keys_lie_together():
    plans = {pattern: cache_plan(pattern_mask(pattern, 81, 16)[81:, 81:]) for pattern in PATTERNS}
    places = {pattern: 1 + max(slots) for pattern, (slots, _) in plans.items()}
    assert places == {"full": 255, "axial_row": 16, "axial_col": 255, "conv_like": 4 * 16 + 5}
    for pattern, (_, reads) in plans.items():  # views: nothing is gathered
        assert pattern == "conv_like" or all(isinstance(read, slice) for read in reads)


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("patterns", [*((pattern,) for pattern in PATTERNS), PATTERNS])
def test_codes_are_those_of_the_plain_loop(tiny_vae, patterns, sandwich):
    model = dalle_of(tiny_vae, patterns, sandwich)
    decoder = PackedStepper(model, plain, torch.float32)
    every = some_text()
    for rows in ([0, 1, 2, 3], [0, 1, 0, 2, 1, 3], [2, 1, 1, 2, 2, 1], [1] * 5):  # few; no even shares; threes; all one
        text = every[rows]
        for shaping in SHAPINGS:
            for count in (0, 1, 15) if len(rows) < 5 else (0, 6):
                given = torch.randint(0, 32, (4, count))[rows]
                expected = drawn(model, text, given, shaping)
                assert torch.equal(drawn(model, text, given, shaping, decoder), expected)


def test_each_caption_passes_once(tiny_vae, monkeypatch):
    model = dalle_of(tiny_vae)
    rows, forward = [], model.transformer.forward
    monkeypatch.setattr(model.transformer, "forward", lambda x, **more: rows.append(len(x)) or forward(x, **more))
    decoder = PackedStepper(model, plain, torch.float32)
    text = some_text(2)[[0, 1, 0, 0, 1]]
    shaping = {"top_k": None, "top_p": None, "temperature": 1.0, "cond_scale": 1.5}
    with torch.no_grad():
        sample_codes(model, text, decoder.logits, generator=None, image_codes=None, **shaping)
    assert rows == [3]  # two captions and the empty one


def test_the_weights_of_the_model_stay(tiny_vae):
    model = dalle_of(tiny_vae)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PackedStepper(model, plain, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
