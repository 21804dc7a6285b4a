"""Drawing with prepared weights and small caches against the plain loop of sampling.py."""

import pytest
import torch
from torch.nn import functional as F

from models.attention import PATTERNS, pattern_mask
from models.dalle import DALLE
from models.decoder import Decoder, cache_plan
from models.sampling import draw_codes, generate_codes


def plain(weight, bias):
    return lambda x: F.linear(x, weight, bias)


def dalle_of(vae, patterns=PATTERNS, sandwich=False):
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_text_tokens": 50, "text_seq_len": 6, "depth": 4, "heads": 2, "dim_head": 16}
    model = DALLE(vae=vae, attn_types=patterns, sandwich_norm=sandwich, **sizes).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def some_text(count=4):
    text = torch.randint(1, 50, (count, 6), generator=torch.Generator().manual_seed(1))
    text[1:, 3:] = 0
    return text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_plan_reads_what_the_mask_shows(pattern):
    """Played through with the positions' own numbers as keys."""
    mask = pattern_mask(pattern, 7, 5)
    slots, reads = cache_plan(mask)
    cache = [None] * (1 + max(slots))
    for position in range(len(mask)):
        cache[slots[position]] = position
        read = range(reads[position]) if isinstance(reads[position], int) else reads[position].tolist()
        assert sorted(cache[slot] for slot in read) == mask[position].nonzero().flatten().tolist()


def test_a_row_needs_no_more_than_itself():
    slots, reads = cache_plan(pattern_mask("axial_row", 81, 16))
    assert 1 + max(slots) == 81 + 16 and all(isinstance(read, int) for read in reads)  # views, nothing is gathered
    slots, reads = cache_plan(pattern_mask("full", 81, 16))
    assert slots == list(range(336)) and reads == list(range(1, 337))


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("patterns", [*((pattern,) for pattern in PATTERNS), PATTERNS])
def test_codes_are_those_of_the_plain_loop(tiny_vae, patterns, sandwich):
    model = dalle_of(tiny_vae, patterns, sandwich)
    decoder = Decoder(model, plain, torch.float32, torch.float32)
    for shaping in (
        {"top_k": None, "top_p": None, "temperature": 1.0, "cond_scale": 1.0},
        {"top_k": 0.5, "top_p": 0.9, "temperature": 0.8, "cond_scale": 2.0},
    ):
        for given in (None, torch.randint(0, 32, (4, 1)), torch.randint(0, 32, (4, 6)), torch.randint(0, 32, (4, 15))):
            draws = {"generator": None, "image_codes": given, **shaping}
            found, expected = (
                draw({**draws, "generator": [torch.Generator().manual_seed(i) for i in range(4)]})
                for draw in (
                    lambda settings: draw_codes(model, some_text(), decoder.logits, **settings),
                    lambda settings: generate_codes(model, some_text(), **settings),
                )
            )
            assert torch.equal(found, expected)


def test_each_caption_passes_once(tiny_vae, monkeypatch):
    model = dalle_of(tiny_vae)
    rows, forward = [], model.transformer.forward
    monkeypatch.setattr(model.transformer, "forward", lambda x, **more: rows.append(len(x)) or forward(x, **more))
    decoder = Decoder(model, plain, torch.float32, torch.float32)
    text = some_text(2)[[0, 1, 0, 0, 1]]
    shaping = {"top_k": None, "top_p": None, "temperature": 1.0, "cond_scale": 1.5}
    with torch.no_grad():
        draw_codes(model, text, decoder.logits, generator=None, image_codes=None, **shaping)
    assert rows == [3]  # two captions and the empty one


def test_the_weights_of_the_model_stay(tiny_vae):
    model = dalle_of(tiny_vae)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Decoder(model, plain, torch.float32, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
