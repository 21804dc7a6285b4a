"""The cached loop against the whole pass, filtering against its definition, and what a seed fixes."""

import pytest
import torch

from models.attention import PATTERNS
from models.sampling import (
    check_sampling,
    generate_codes,
    generate_codes_naive,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    top_k_count,
)
from tests.builders import small_dalle


def dalle_of(vae, attn_types, sandwich_norm=False):
    changes = {"depth": len(attn_types), "attn_types": attn_types, "sandwich_norm": sandwich_norm}
    return small_dalle(vae, weight_std=0.3, **changes)


def captions():
    text = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    text[1, 2:] = 0
    return text


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("attn_types", [*((pattern,) for pattern in PATTERNS), PATTERNS])
@pytest.mark.parametrize("cond_scale", [1.0, 1.7])
@pytest.mark.parametrize("sandwich_norm", [False, True])
def test_cached_codes_equal_uncached(tiny_vae, attn_types, cond_scale, sandwich_norm):
    dalle = dalle_of(tiny_vae, attn_types, sandwich_norm)
    settings = dict(top_k=0.7, top_p=0.95, temperature=0.9, cond_scale=cond_scale)
    cached = generate_codes(dalle, captions(), generator=seeded(), **settings)
    assert cached.shape == (3, 16) and cached.dtype == torch.int64
    assert torch.equal(cached, generate_codes_naive(dalle, captions(), generator=seeded(), **settings))
    assert not torch.equal(cached, generate_codes(dalle, captions(), generator=seeded(8), **settings))


@pytest.mark.parametrize("count", [1, 9, 15, 16])
def test_given_codes_are_kept(tiny_vae, count):
    dalle = dalle_of(tiny_vae, ("full", "axial_col"))
    given = torch.randint(0, 32, (3, count), generator=seeded())
    cached = generate_codes(dalle, captions(), generator=seeded(), image_codes=given)
    assert torch.equal(cached[:, :count], given) and cached.shape == (3, 16)
    assert torch.equal(cached, generate_codes_naive(dalle, captions(), generator=seeded(), image_codes=given))


def test_a_picture_depends_on_its_own_generator_alone(tiny_vae):
    dalle = dalle_of(tiny_vae, ("full",))
    together = generate_codes(dalle, captions(), generator=[seeded(i) for i in range(3)])
    alone = [generate_codes(dalle, captions()[i : i + 1], generator=[seeded(i)]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_drawing_leaves_no_trace(tiny_vae):
    dalle = dalle_of(tiny_vae, ("full",)).train()
    codes = generate_codes(dalle, captions())
    assert dalle.training and not codes.requires_grad
    assert all(parameter.grad is None for parameter in dalle.parameters())


def test_noise_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = gumbel_noise(1, 40000, 4, seeded(), "cpu")[0]
    shares = torch.bincount((logits + noise).argmax(-1), minlength=4) / 40000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.01, rtol=0)


def test_filters_keep_what_they_say():
    logits = torch.tensor([[0.1, 3.0, 2.0, 1.0]])
    inf = float("-inf")
    assert keep_top_k(logits, 2).tolist() == [[inf, 3.0, 2.0, inf]]
    assert torch.equal(keep_top_k(logits, 9), logits)
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = keep_top_p(probabilities, 0.75)
    assert torch.equal(kept[:, :2], probabilities[:, :2]) and kept[0, 2:].tolist() == [inf, inf]
    assert torch.isfinite(keep_top_p(probabilities, 1e-9)).sum() == 1
    assert torch.equal(keep_top_p(probabilities, 1.0), probabilities)
    assert top_k_count(0.99, 9472) == 94 and top_k_count(1.0, 9472) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", -0.1), ("top_k", 1.5), ("top_p", 0.0), ("temperature", 0.0), ("cond_scale", -1.0)]
)
def test_settings_out_of_range_are_named(name, value):
    settings = {"top_k": 0.9, "top_p": 0.9, "temperature": 1.0, "cond_scale": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        check_sampling(**settings)
