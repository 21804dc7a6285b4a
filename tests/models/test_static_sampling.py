"""Sampling with fixed shapes against the whole pass for every code; settings and image prompts differ in a batch."""

import pytest
import torch

from models.sampling import Sampling, gumbel_noise, sample_codes
from models.static_sampling import FullPass, StaticSampler, settings_row
from models.transformer import PATTERNS
from tests.builders import WholePassStepper, small_dalle

# Each with its number of given codes; sequences i and i + 3 are one guided image.
UNGUIDED = [(Sampling(), 0), (Sampling(top_k=None), 7), (Sampling(top_k=5), 1), (Sampling(temperature=0.5), 15)]
UNGUIDED += [(Sampling(top_k=0.5, top_p=0.6), 0), (Sampling(top_k=1), 3)]
GUIDED = [(Sampling(cond_scale=2.0), 0), (Sampling(top_k=0.5, top_p=0.9, temperature=0.8, cond_scale=3.0), 5)]
GUIDED += [(Sampling(top_k=None, cond_scale=0.0), 2)]


def images(seed=1):
    text = torch.randint(1, 50, (6, 6), generator=torch.Generator().manual_seed(seed))
    text[1:, 3:] = 0
    return text, torch.randint(0, 32, (6, 16), generator=torch.Generator().manual_seed(seed))


def expected_codes(dalle, text, given, plans):
    stepper, codes = WholePassStepper(dalle), []
    for row, (sampling, count) in enumerate(plans):
        generators, one = [torch.Generator().manual_seed(row)], slice(row, row + 1)
        codes.append(sample_codes(dalle, text[one], stepper, sampling, generators, given[one, :count]))
    return torch.cat(codes)


def sequences(dalle, text, given, plans):
    """Return the inputs of a StaticSampler for these images; guided ones get a second sequence."""
    noise = gumbel_noise(len(plans), 16, 32, [torch.Generator().manual_seed(row) for row in range(len(plans))], "cpu")
    settings = torch.stack([settings_row(sampling, count, dalle) for sampling, count in plans])
    if len(plans) == 6:
        return text, noise, given, settings
    half = text[:3]
    return (torch.cat((half, torch.zeros_like(half))), *(torch.cat((x[:3], x[:3])) for x in (noise, given, settings)))


@pytest.mark.parametrize("plans", [UNGUIDED, GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("patterns", [*((pattern,) for pattern in PATTERNS), PATTERNS])
def test_one_batch_serves_all_settings(tiny_vae, patterns, plans):
    dalle = small_dalle(tiny_vae, weight_std=0.3, depth=len(patterns), attn_types=patterns).eval()
    text, given = images()
    expected = expected_codes(dalle, text, given, plans)
    inputs = sequences(dalle, text, given, plans)
    found = StaticSampler(dalle)(*inputs)
    assert found.dtype == torch.int32 and torch.equal(found[: len(plans)].long(), expected)

    text, noise, given, settings = inputs
    codes = torch.full((6, 16), 31)  # arbitrary ones in places that are still to come
    for place in range(16):
        chosen = FullPass(dalle)(text, noise, codes, settings, torch.tensor([place]))[:, 0]
        codes[:, place] = torch.where(place < settings[:, -1], given[:, place], chosen)
    assert torch.equal(codes[: len(plans)], expected)
