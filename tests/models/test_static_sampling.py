"""Drawing with fixed shapes against the loop of sampling.py: the same codes for the same noise."""

import pytest
import torch

from models.attention import PATTERNS
from models.sampling import generate_codes, gumbel_noise, sample_codes
from models.static_sampling import FullPass, StaticSampler
from tests.builders import small_dalle

SHAPINGS = [
    {"top_k": None, "top_p": None, "temperature": 1.0, "cond_scale": 1.0},
    {"top_k": 0.9, "top_p": None, "temperature": 0.7, "cond_scale": 1.0},
    {"top_k": None, "top_p": 0.8, "temperature": 1.0, "cond_scale": 1.5},
    {"top_k": 0.5, "top_p": 0.9, "temperature": 1.3, "cond_scale": 3.0},
]


@pytest.fixture
def dalle(tiny_vae):
    return small_dalle(tiny_vae, weight_std=0.3, depth=4, attn_types=PATTERNS).eval()


def some_text(count=3):
    text = torch.randint(1, 50, (count, 6), generator=torch.Generator().manual_seed(1))
    text[1:, 3:] = 0
    return text


def generators(count=3):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("given", [0, 1, 5, 15])
def test_static_codes_are_those_of_the_loop(dalle, shaping, given):
    codes = torch.randint(0, 32, (3, given), generator=torch.Generator().manual_seed(2)) if given else None
    expected = generate_codes(dalle, some_text(), generator=generators(), image_codes=codes, **shaping)
    noise = gumbel_noise(3, 16, 32, generators(), torch.device("cpu"))
    found = StaticSampler(dalle, **shaping)(some_text(), noise, *([codes] if given else []))
    assert found.dtype == torch.int32 and torch.equal(found.long(), expected)
    assert len(expected[:, given:].unique()) > 1 or given == 15


@pytest.mark.parametrize("given", [0, 7])
def test_a_full_pass_a_code_gives_the_same(dalle, given):
    shaping = SHAPINGS[2]
    codes = torch.randint(0, 32, (3, given)) if given else None
    full_pass = FullPass(dalle)

    def logits_of(dalle, text, codes, cache):
        unseen = torch.full((len(text), 16 - codes.shape[1]), 31)  # whatever stands there
        return full_pass(text, torch.cat((codes, unseen), dim=1), torch.tensor([codes.shape[1]]))

    found = sample_codes(dalle, some_text(), logits_of, generator=generators(), image_codes=codes, **shaping)
    expected = generate_codes(dalle, some_text(), generator=generators(), image_codes=codes, **shaping)
    assert torch.equal(found, expected)


def test_the_loop_and_the_write_are_the_callers(dalle):
    """Every write has one row a picture, at the place it is told; the loop runs once a code that is not the first."""
    counts, places = [], []

    def loop(count, body, inputs):
        counts.append(count)
        for _ in range(count):
            inputs = body(*[tensor.clone() for tensor in inputs])
        return inputs

    def update(tensor, source, dim, start, size):
        assert start.shape == (1,) and size == 1 and source.shape[dim] == 1 and source.dtype == tensor.dtype
        places.append((dim, int(start)))
        return tensor.index_copy(dim, start.long(), source)

    noise = gumbel_noise(3, 16, 32, generators(), torch.device("cpu"))
    found = StaticSampler(dalle, loop=loop, update=update, **SHAPINGS[0])(some_text(), noise)
    assert torch.equal(found.long(), generate_codes(dalle, some_text(), generator=generators(), **SHAPINGS[0]))
    assert counts == [15]
    keys_and_values = [place for dim, place in places if dim == 2]
    assert keys_and_values == [7 + step for step in range(15) for _ in range(2 * 4)]  # <bos>, six tokens, codes
    assert [place for dim, place in places if dim == 1] == list(range(1, 16))


def test_settings_are_checked(dalle):
    with pytest.raises(ValueError, match="temperature"):
        StaticSampler(dalle, top_k=None, top_p=None, temperature=0, cond_scale=1)
