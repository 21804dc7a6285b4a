"""Learning rates against values reckoned by hand and torch's own scheduler; which parameters decay."""

import json
import math
import random

import pytest
import torch

from tests.builders import small_dalle
from utils.optimization import LearningRate, cosine, multi_step, parameter_groups, trapezoid

PEAK = 5e-3


def schedule(name, *, epochs=10, steps=100, warmup_steps=0):
    return LearningRate(name, PEAK, epochs=epochs, steps=steps, warmup_steps=warmup_steps)


def test_multi_step_over_ten_epochs():
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]
    assert [multi_step(epoch, 10) for epoch in range(10)] == pytest.approx(expected, rel=1e-12)
    rates = schedule("multi_step")
    assert [rates.at(10 * epoch + 3, epoch) for epoch in range(10)] == pytest.approx([PEAK * e for e in expected])


def test_cosine_begins_and_ends_where_it_should():
    assert [cosine(step, 100, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert cosine(52, 100, 4) == pytest.approx(0.5)
    assert cosine(28, 100, 4) == pytest.approx(0.8535534)
    assert 0 < cosine(99, 100, 4) < 3e-4 and cosine(100, 100, 4) == pytest.approx(0, abs=1e-15)
    assert cosine(0, 100, 0) == 1
    assert [cosine(step, 3, 5) for step in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])  # all warm-up
    factors = [cosine(step, 100, 4) for step in range(4, 100)]
    assert factors == sorted(factors, reverse=True)


def test_trapezoid_begins_and_ends_where_it_should():
    factors = [trapezoid(step, 100, 4) for step in range(100)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4:51] == [1.0] * 47
    assert factors[51:] == pytest.approx([0.02 * left for left in range(49, 0, -1)])
    assert trapezoid(0, 1, 0) == 1 and trapezoid(100, 100, 4) == 0
    assert max(trapezoid(step, 10, 50) for step in range(10)) < 0.2  # a warm-up longer than the run


def loss_series():
    drawn = random.Random(0)
    return {
        "falling": [1 / (1 + epoch) for epoch in range(60)],
        "flat": [1.0] * 150,
        "rising": [float(epoch) for epoch in range(80)],
        "noisy": [2 * 0.99**epoch + 0.1 * drawn.random() for epoch in range(300)],
        "almost falling": [1 - 1e-6 * epoch for epoch in range(100)],  # less than the threshold of 1e-4
        "broken": [1.0] * 5 + [math.nan] * 30 + [0.5] * 30,
        "endless": [1.0] * 700,
    }


def torchs_plateau(losses):
    """Learning rate of each epoch and of the one after the last, by torch's scheduler on an optimizer of its own."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", factor=0.5, patience=10, cooldown=10, min_lr=1e-6
    )
    rates = [PEAK]
    for loss in losses:
        plateau.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", loss_series())
def test_plateau_is_torchs_own(name):
    losses = loss_series()[name]
    rates, seen = schedule("ReduceLROnPlateau"), []
    for epoch, loss in enumerate(losses):
        seen.append(rates.at(3 * epoch, epoch))
        assert rates.at(3 * epoch + 2, epoch) == seen[-1]
        rates.epoch_ended(loss)
    assert [*seen, rates.at(0, len(losses))] == torchs_plateau(losses)


@pytest.mark.parametrize("stop", [3, 23, 40])
def test_a_resumed_plateau_goes_on_as_if_it_had_not_stopped(stop):
    losses = loss_series()["noisy"][:20] + [1.0] * 60
    first = schedule("ReduceLROnPlateau")
    for loss in losses[:stop]:
        first.epoch_ended(loss)
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == state  # plain values, which is what a checkpoint may hold
    second = schedule("ReduceLROnPlateau")
    second.load_state_dict(state)
    for loss in losses[stop:]:
        assert second.at(0, 0) == first.at(0, 0)
        first.epoch_ended(loss)
        second.epoch_ended(loss)
    assert second.at(0, 0) == first.at(0, 0) == torchs_plateau(losses)[-1] < PEAK


def test_the_reference_applications_plateau_gives_its_rate():
    """Its state is torch's own; its multi_step is a LambdaLR, which has `_last_lr`, too."""
    parameter = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(parameter, factor=0.5, patience=10, cooldown=10)
    for _ in range(20):
        plateau.step(1.0)
    resumed, other = schedule("ReduceLROnPlateau"), schedule("constant")
    resumed.load_state_dict(plateau.state_dict())
    other.load_state_dict(plateau.state_dict())
    assert resumed.at(0, 0) == PEAK / 2 and other.at(99, 9) == PEAK


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
