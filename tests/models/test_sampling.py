"""All ways to sample, with fixed shapes too, against the whole pass for every code; filters; what a seed decides."""

import pytest
import torch
from torch.nn import functional as F

from models.packed_sampler import CachedStepper, PackedStepper, plan_slots
from models.sampling import Pace, Sampling, choose_from_nucleus, gumbel_noise, keep_top_p, sample_codes
from models.static_sampling import FullPass, StaticSampler, settings_row
from models.transformer import GEGLU, PATTERNS, pattern_mask
from tests.builders import WholePassStepper, small_dalle

PLAIN = Sampling(top_k=None)
SETTINGS = (PLAIN, Sampling(top_k=0.5, top_p=0.9, temperature=0.8, cond_scale=2.0))


def dalle_of(vae, patterns=PATTERNS, sandwich=False):
    model = small_dalle(vae, weight_std=0.3, depth=len(patterns), attn_types=patterns, sandwich_norm=sandwich)
    return model.eval()


def captions(count=3):
    text = torch.randint(1, 50, (count, 6), generator=seeded(1))
    text[1:, 3:] = 0
    return text


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def codes_by(stepper, text, sampling=PLAIN, given=None):
    """Sample; image i has seed i."""
    return sample_codes(stepper.dalle, text, stepper, sampling, [seeded(i) for i in range(len(text))], given)


def packed_stepper(dalle, *windows):
    def plain_pack(weight, bias, geglu=False):
        return lambda x: GEGLU()(F.linear(x, weight, bias)) if geglu else F.linear(x, weight, bias)

    return PackedStepper(dalle, plain_pack, torch.float32, windows=windows or (1,))


OPTIONS = {"rotary_emb": True, "shift_tokens": True, "stable": True, "reversible": True, "shared_ff_ids": (0, 1)}


@pytest.mark.parametrize("options", [*({name: value} for name, value in OPTIONS.items()), OPTIONS], ids=str)
def test_the_cache_knows_every_option_of_the_network(tiny_vae, options):
    dalle = small_dalle(tiny_vae, weight_std=0.3, depth=len(PATTERNS), attn_types=PATTERNS, **options).eval()
    assert_same_codes(dalle, [CachedStepper(dalle)])


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("patterns", [*((pattern,) for pattern in PATTERNS), PATTERNS])
def test_every_way_to_sample_gives_the_same_codes(tiny_vae, patterns, sandwich):
    dalle = dalle_of(tiny_vae, patterns, sandwich)
    assert_same_codes(dalle, [CachedStepper(dalle), *(packed_stepper(dalle, window) for window in (1, 2, 5, 16))])


def assert_same_codes(dalle, steppers):
    for sampling in SETTINGS:
        for count in (0, 1, 7, 15):
            given = torch.randint(0, 32, (3, count), generator=seeded())
            expected = codes_by(WholePassStepper(dalle), captions(), sampling, given)
            assert expected.shape == (3, 16) and expected.dtype == torch.int64
            assert torch.equal(expected[:, :count], given) and (len(expected[:, count:].unique()) > 1 or count == 15)
            for stepper in steppers:
                assert torch.equal(codes_by(stepper, captions(), sampling, given), expected)


def test_images_of_one_caption_start_from_its_keys(tiny_vae):
    dalle, rows = dalle_of(tiny_vae), [0, 1, 0, 2, 1, 3]
    text, stepper = captions(4)[rows], packed_stepper(dalle, 4)
    for sampling in SETTINGS:
        for count in (0, 6):
            given = torch.randint(0, 32, (4, count), generator=seeded())[rows]
            expected = codes_by(WholePassStepper(dalle), text, sampling, given)
            assert torch.equal(codes_by(stepper, text, sampling, given), expected)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_a_complete_image_leaves_the_batch(tiny_vae, monkeypatch, sampling):
    dalle, text, rows = dalle_of(tiny_vae), captions(8), []
    stepper, seen = packed_stepper(dalle, 5), []
    following = stepper.next
    monkeypatch.setattr(stepper, "next", lambda codes, *others: rows.append(len(codes)) or following(codes, *others))
    given = torch.randint(0, 32, (8, 3), generator=seeded())
    generators = [seeded(i) for i in range(8)]
    codes = sample_codes(dalle, text, stepper, sampling, generators, given, lambda codes: seen.append(codes.clone()))
    assert torch.equal(codes, codes_by(WholePassStepper(dalle), text, sampling, given))
    assert [part.shape[1] for part in seen] == list(range(4, 17))
    assert all(torch.equal(part, codes[:, : part.shape[1]]) for part in seen)
    assert rows == sorted(rows, reverse=True) and rows[0] > rows[-1]


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9, 0.999])
def test_a_code_of_the_nucleus_is_chosen(mass):
    logits, noise = torch.randn(20, 3, 40, generator=seeded()) * 3, gumbel_noise(20, 3, 40, seeded(), "cpu")
    logits[:, :, ::7] = float("-inf")
    kept = keep_top_p(logits, mass)
    for row, kept_row in zip(logits.flatten(0, 1), kept.flatten(0, 1)):
        order = row.argsort(descending=True).tolist()
        sums = row.double().softmax(-1)[order].cumsum(-1).tolist()
        nucleus = order[: 1 + sum(value < mass for value in sums)]
        assert {*kept_row.isfinite().nonzero()[:, 0].tolist()} == {code for code in nucleus if row[code].isfinite()}
    assert torch.equal(choose_from_nucleus(logits, noise, mass), (kept + noise).argmax(-1))
    choose_from_nucleus(logits / 1e-40, noise, mass)  # ends, although probabilities are not finite


def test_each_caption_passes_once(tiny_vae, monkeypatch):
    dalle = dalle_of(tiny_vae)
    rows, forward = [], dalle.transformer.forward
    monkeypatch.setattr(dalle.transformer, "forward", lambda x, **more: rows.append(len(x)) or forward(x, **more))
    codes_by(packed_stepper(dalle), captions(2)[[0, 1, 0, 0, 1]], Sampling(cond_scale=1.5))
    assert rows == [3]  # two captions and the empty one


@pytest.mark.parametrize("window", [1, 4, 24])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_keys_stay_in_their_slots_while_they_are_seen(pattern, window):
    """Fill the slots with the codes' numbers; each pass writes a whole window before it reads."""
    mask = pattern_mask(pattern, 7, 5)[7:, 7:]
    slots = plan_slots(mask, window)
    owners = {}
    for place in range(len(mask)):
        owners.update({slots[written]: written for written in range(place, min(place + window, len(mask)))})
        assert all(owners[slots[seen]] == seen for seen in mask[place].nonzero().flatten().tolist())


def test_the_window_is_the_one_with_the_most_codes_per_second():
    seconds = {1: 1.0, 2: 1.2, 4: 1.3, 8: 2.0}
    pace = Pace(seconds)
    assert pace.window() == 4
    pace.record(4, 0, 8)  # no guess of this window was right, which says nothing about the others
    assert pace.window() == 8
    pace.record(8, 70, 0)
    assert pace.window() == 8
    for _ in range(4):
        pace.record(pace.window(), 0, 99)
    assert pace.window() == 1
    assert Pace({16: 1.0}).window() == 16
    # A pass of a quarter of the images with 4 codes each takes as long as one of all with 1.
    assert Pace({1: 1.0, 2: 2.0, 4: 4.0}).window() == 1 and Pace({1: 1.0, 2: 2.0, 4: 4.0}).window(0.25) == 4


def test_top_k_is_a_fraction_to_drop_or_a_number_to_keep():
    kept = {0.0: 88, 0.5: 44, 0.99: 1, 1.0: 1, 5: 5, None: None}  # of 88 tokens
    assert {value: Sampling(top_k=value).codes_to_keep(88) for value in kept} == kept
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    noise = torch.tensor([[0.0, 0.0, 0.0, 9.0]])
    assert [int(Sampling(top_k=top_k).choose(logits, noise, 88)) for top_k in (3, 4)] == [1, 3]


# Each with its number of given codes; sequences i and i + 3 are one guided image.
UNGUIDED = [(Sampling(), 0), (Sampling(top_k=None), 7), (Sampling(top_k=5), 1), (Sampling(temperature=0.5), 15)]
UNGUIDED += [(Sampling(top_k=0.5, top_p=0.6), 0), (Sampling(top_k=1), 3)]
GUIDED = [(Sampling(cond_scale=2.0), 0), (Sampling(top_k=0.5, top_p=0.9, temperature=0.8, cond_scale=3.0), 5)]
GUIDED += [(Sampling(top_k=None, cond_scale=0.0), 2)]


def sequences(dalle, text, given, plans):
    """Return the inputs of a StaticSampler for these images; guided ones get a second sequence."""
    noise = gumbel_noise(len(plans), 16, 32, [seeded(row) for row in range(len(plans))], "cpu")
    settings = torch.stack([settings_row(sampling, count, dalle) for sampling, count in plans])
    if len(plans) == 6:
        return text, noise, given, settings
    half = text[:3]
    return (torch.cat((half, torch.zeros_like(half))), *(torch.cat((x[:3], x[:3])) for x in (noise, given, settings)))


@pytest.mark.parametrize("plans", [UNGUIDED, GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("patterns", [*((pattern,) for pattern in PATTERNS), PATTERNS])
def test_one_batch_serves_all_settings(tiny_vae, patterns, plans):
    dalle = small_dalle(tiny_vae, weight_std=0.3, depth=len(patterns), attn_types=patterns).eval()
    text, given = captions(6), torch.randint(0, 32, (6, 16), generator=seeded(1))
    stepper, expected = WholePassStepper(dalle), []
    for row, (sampling, count) in enumerate(plans):
        one = slice(row, row + 1)
        expected.append(sample_codes(dalle, text[one], stepper, sampling, [seeded(row)], given[one, :count]))
    expected = torch.cat(expected)
    inputs = sequences(dalle, text, given, plans)
    found = StaticSampler(dalle)(*inputs)
    assert found.dtype == torch.int32 and torch.equal(found[: len(plans)].long(), expected)

    text, noise, given, settings = inputs
    codes = torch.full((6, 16), 31)  # arbitrary ones in places that are still to come
    for place in range(16):
        chosen = FullPass(dalle)(text, noise, codes, settings, torch.tensor([place]))[:, 0]
        codes[:, place] = torch.where(place < settings[:, -1], given[:, place], chosen)
    assert torch.equal(codes[: len(plans)], expected)
