"""All ways to sample against the whole pass for every code; filters against their definition; what a seed decides."""

import pytest
import torch
from torch.nn import functional as F

from models import sampling as sampling_module
from models.packed_sampler import PackedStepper, plan_cache
from models.sampling import (
    Pace,
    Sampling,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    measure_windows,
    sample_codes,
)
from models.static_sampling import FullPass, StaticSampler
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


def plain_pack(weight, bias, geglu=False):
    return lambda x: GEGLU()(F.linear(x, weight, bias)) if geglu else F.linear(x, weight, bias)


def packed_stepper(dalle, *windows):
    return PackedStepper(dalle, plain_pack, torch.float32, windows=windows or (1,))


class FullPassStepper:
    """An IPU's steps, with arbitrary codes in unused places."""

    windows, seconds = (1,), {}  # noqa: RUF012  never changed

    def __init__(self, dalle):
        self.dalle, self.full_pass = dalle, FullPass(dalle)

    def begin(self, text, codes):
        self.text, self.codes = text, codes
        unused = torch.full((len(text), 16 - codes.shape[1]), 31)
        return self.full_pass(text, torch.cat((codes, unused), dim=1), torch.tensor([codes.shape[1]]))

    def next(self, codes, places):
        return self.begin(self.text, torch.cat((self.codes, codes), dim=1))[:, None]


def static_codes(dalle, text, sampling, given, **operators):
    noise = gumbel_noise(len(text), 16, 32, [seeded(i) for i in range(len(text))], "cpu")
    found = StaticSampler(dalle, sampling, **operators)(text, noise, *([] if given is None else [given]))
    assert found.dtype == torch.int32
    return found.long()


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("patterns", [*((pattern,) for pattern in PATTERNS), PATTERNS])
def test_every_way_to_sample_gives_the_same_codes(tiny_vae, patterns, sandwich):
    dalle = dalle_of(tiny_vae, patterns, sandwich)
    for sampling in SETTINGS:
        for count in (0, 1, 7, 15):
            given = torch.randint(0, 32, (3, count), generator=seeded())
            expected = codes_by(WholePassStepper(dalle), captions(), sampling, given)
            assert expected.shape == (3, 16) and expected.dtype == torch.int64
            assert torch.equal(expected[:, :count], given) and (len(expected[:, count:].unique()) > 1 or count == 15)
            windows = [packed_stepper(dalle, window) for window in (1, 2, 5, 16)]
            for stepper in (*windows, FullPassStepper(dalle), WholePassStepper(dalle, (3,))):
                assert torch.equal(codes_by(stepper, captions(), sampling, given), expected)
            assert torch.equal(static_codes(dalle, captions(), sampling, given if count else None), expected)


@pytest.mark.parametrize("rows", [[0, 1, 0, 2, 1, 3], [2, 1, 1, 2, 2, 1], [1] * 5], ids=["uneven", "threes", "all one"])
def test_images_of_one_caption_share_its_keys(tiny_vae, rows):
    dalle = dalle_of(tiny_vae)
    text, stepper = captions(4)[rows], packed_stepper(dalle)
    for sampling in SETTINGS:
        for count in (0, 6):
            given = torch.randint(0, 32, (4, count), generator=seeded())[rows]
            expected = codes_by(WholePassStepper(dalle), text, sampling, given)
            assert torch.equal(codes_by(stepper, text, sampling, given), expected)


def test_each_caption_passes_once(tiny_vae, monkeypatch):
    dalle = dalle_of(tiny_vae)
    rows, forward = [], dalle.transformer.forward
    monkeypatch.setattr(dalle.transformer, "forward", lambda x, **more: rows.append(len(x)) or forward(x, **more))
    codes_by(packed_stepper(dalle), captions(2)[[0, 1, 0, 0, 1]], Sampling(cond_scale=1.5))
    assert rows == [3]  # two captions and the empty one


def test_packing_leaves_the_model_as_it_is(tiny_vae):
    dalle = dalle_of(tiny_vae)
    before = {name: tensor.clone() for name, tensor in dalle.state_dict().items()}
    packed_stepper(dalle)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dalle.state_dict().items())


@pytest.mark.parametrize("window", [1, 4, 24])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cache_plan_reads_what_the_mask_shows(pattern, window):
    """Play the plan through with the codes' numbers as keys; each pass writes a whole window before it reads."""
    mask = pattern_mask(pattern, 7, 5)[7:, 7:]
    slots, reads = plan_cache(mask, window)
    cache = torch.full((1 + max(slots),), -1)
    for place in range(len(mask)):
        for written in range(place, min(place + window, len(mask))):
            cache[slots[written]] = written
        assert sorted(cache[reads[place]].tolist()) == mask[place].nonzero().flatten().tolist()


def test_a_planned_cache_is_small_and_its_keys_are_adjacent():
    plans = {pattern: plan_cache(pattern_mask(pattern, 81, 16)[81:, 81:]) for pattern in PATTERNS}
    sizes = {pattern: 1 + max(slots) for pattern, (slots, _) in plans.items()}
    windows = {"conv_like": 2 * 16 + 3, "conv_up_left": 4 * 16 + 5}
    assert sizes == {"full": 255, "axial_row": 16, "axial_col": 255, **windows}
    for pattern, (_, reads) in plans.items():  # slices are views, for which nothing is gathered
        assert pattern in windows or all(isinstance(read, slice) for read in reads)


def test_the_window_is_the_one_with_the_most_codes_per_second():
    seconds, most = {1: 1.0, 2: 1.2, 4: 1.3, 8: 2.0}, torch.tensor([4, 4])
    assert Pace(seconds).window() == 4
    for accepted, window in ((most, 8), (most - 3, 1)):  # all guesses right, or the first one wrong
        pace = Pace(seconds)
        for _ in range(10):
            pace.record(accepted, most)
        assert pace.window() == window
    pace.record(torch.tensor([0, 2]), torch.tensor([0, 2]))  # a complete image, and one that these two complete
    assert pace.wrong == 1 + 20 and pace.right == 3 + 1
    assert Pace({16: 1.0}).window() == 16


def test_passes_are_timed_once_for_each_number_of_rows(tiny_vae, monkeypatch):
    calls, now = [], [0.0]

    class Timed(WholePassStepper):
        seconds = {}  # noqa: RUF012

        def next(self, codes, places):
            calls.append(tuple(codes.shape))
            now[0] += {1: 4, 2: 9, 4: 5, 8: 6}[codes.shape[1]] * (1 if len(calls) % 2 else 2)  # another program runs
            return super().next(codes, places)

    monkeypatch.setattr(sampling_module.time, "perf_counter", lambda: now[0])
    stepper = Timed(dalle_of(tiny_vae, ("full",)), (1, 2, 4, 8))
    stepper.begin(captions(), torch.zeros(3, 0, dtype=torch.long))
    codes, places = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, dtype=torch.long)
    for _ in range(2):
        assert measure_windows(stepper, codes, places) == {1: 4, 2: 5, 4: 5, 8: 6}  # a smaller pass is not slower
    assert calls == [(3, window) for window in (1, 2, 4, 8) for _ in range(2)]
    stepper.windows = (8,)
    assert list(measure_windows(stepper, codes[:2], places[:2])) == [8] and len(calls) == 8  # no choice, no timing


def test_static_sampling_takes_its_loop_and_its_writes_from_the_caller(tiny_vae):
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

    dalle = dalle_of(tiny_vae)
    found = static_codes(dalle, captions(), PLAIN, None, loop=loop, update=update)
    assert torch.equal(found, codes_by(WholePassStepper(dalle), captions()))
    assert counts == [15]
    # Keys and values of each layer at the positions after <bos> and six tokens, and codes from the second on.
    tensors = 2 * len(PATTERNS)
    assert [place for dim, place in places if dim == 2] == [7 + step for step in range(15) for _ in range(tensors)]
    assert [place for dim, place in places if dim == 1] == list(range(1, 16))


def test_complete_codes_stay_and_wrong_ones_are_refused(tiny_vae):
    dalle = dalle_of(tiny_vae, ("full",))
    given = torch.randint(0, 32, (3, 16), generator=seeded())
    assert torch.equal(codes_by(WholePassStepper(dalle), captions(), given=given), given)
    for wrong in (given[:2], torch.cat((given, given), dim=1)):
        with pytest.raises(ValueError, match=r"image_codes has shape .*3 rows of at most 16"):
            codes_by(WholePassStepper(dalle), captions(), given=wrong)


def test_an_image_depends_on_its_own_generator_alone(tiny_vae):
    dalle = dalle_of(tiny_vae, ("full",))
    text, stepper = captions(), WholePassStepper(dalle)
    together = sample_codes(dalle, text, stepper, generator=[seeded(i) for i in range(3)])
    alone = [sample_codes(dalle, text[i : i + 1], stepper, generator=[seeded(i)]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    first, again, other = (sample_codes(dalle, text, stepper, PLAIN, seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        sample_codes(dalle, text, stepper, generator=[seeded(), seeded()])


def test_sampling_leaves_no_trace(tiny_vae):
    dalle = small_dalle(tiny_vae, attn_dropout=0.5, ff_dropout=0.5).train()
    draws = [sample_codes(dalle, captions(), WholePassStepper(dalle), generator=seeded()) for _ in range(2)]
    assert dalle.training and torch.equal(*draws) and not draws[0].requires_grad  # without dropout
    assert all(parameter.grad is None for parameter in dalle.parameters())


def test_noise_samples_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = gumbel_noise(1, 40000, 4, seeded(), "cpu")[0]
    shares = torch.bincount((logits + noise).argmax(-1), minlength=4) / 40000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.01, rtol=0)


def test_filters_keep_what_they_should():
    inf, logits = float("-inf"), torch.tensor([[0.1, 3.0, 2.0, 1.0]])
    assert keep_top_k(logits, 2).tolist() == [[inf, 3.0, 2.0, inf]]
    assert torch.equal(keep_top_k(logits, 9), logits)
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = keep_top_p(probabilities, 0.75)
    assert torch.equal(kept[:, :2], probabilities[:, :2]) and kept[0, 2:].tolist() == [inf, inf]
    assert keep_top_p(torch.tensor([[0.25, 0.5, 0.25]]).log(), 0.5)[0, [0, 2]].tolist() == [
        inf,
        inf,
    ]
    assert torch.isfinite(keep_top_p(probabilities, 1e-9)).sum() == 1
    assert torch.equal(keep_top_p(probabilities, 1.0), probabilities)


def chosen(sampling, logits, num_tokens=4):
    """The codes that can be chosen: every one of them gets the best noise once."""
    noise = 1e6 * torch.eye(logits.shape[-1])
    return set(sampling.choose(logits.repeat_interleave(len(noise), 0), noise, num_tokens).tolist())


def test_settings_change_the_choice():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert chosen(PLAIN, logits) == {0, 1, 2, 3}
    assert chosen(Sampling(top_k=0.5), logits) == {0, 1} and chosen(Sampling(top_k=3), logits) == {0, 1, 2}
    assert chosen(Sampling(top_k=1.0), logits) == {0} and chosen(Sampling(top_k=0.8), logits, 15) == {0, 1}
    assert chosen(Sampling(top_k=None, top_p=0.7), logits) == {0, 1}
    assert chosen(Sampling(top_k=None, top_p=0.7, temperature=0.5), logits) == {0}
    guided, noise = Sampling(top_k=None, cond_scale=3.0), torch.tensor([[0.0, 0.0, 4.5, 0.0]])
    both = torch.tensor([[4.0, 3.0, 0, 0], [3.0, 4.0, 0, 0]])  # 3 + 3 · (4 − 3) = 6 for the first code
    assert guided.choose(both, noise, 4).tolist() == [0]
    assert Sampling(top_k=None, cond_scale=0.0).choose(both, noise, 4).tolist() == [2]


def test_overriding_keeps_what_is_not_given():
    changed = Sampling(top_p=0.8).override({"top_k": None, "temperature": 2.0, "prompt": "red"})
    assert changed == Sampling(top_k=0.99, top_p=0.8, temperature=2.0, cond_scale=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_k", -0.1), ("top_k", 1.5), ("top_k", float("inf")), ("top_p", 0.0), ("top_p", 1.01)),
        *(("temperature", 0.0), ("temperature", float("nan")), ("cond_scale", -1.0), ("cond_scale", float("inf"))),
    ],
)
def test_settings_out_of_range_are_named(tiny_vae, name, value):
    sampling = Sampling()._replace(**{name: value})
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        sampling.check()
    with pytest.raises(ValueError, match=f"{name} is"):
        StaticSampler(dalle_of(tiny_vae, ("full",)), sampling)
