"""What update N of a run takes: its samples, which processes share and which can be entered anywhere; its rate."""

import json
import math
import pickle
import random

import numpy as np
import pytest
import torch

import train
from args import train_arguments
from data.loader import EpochOrder, RunOrder, SamplesLost, epoch_order
from training.loop import OverfittingMonitor, open_loop
from training.run import LearningRate, build, multi_step, trapezoid
from training.validation import split_among_processes
from utils.optimization import cosine

PEAK = 5e-3


def epoch(number, *arguments, **options):
    order = EpochOrder(*arguments, **options)
    return [order.batch(number, place * order.global_batch) for place in range(order.batches_per_epoch)]


def test_an_epoch_is_a_permutation_and_each_epoch_another():
    orders = [epoch_order(1000, 42, number) for number in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15  # deviation 0.03
    assert (orders[0] == orders[1]).sum() < 10 and (orders[1] == orders[2]).sum() < 10
    assert np.array_equal(epoch_order(1000, 42, 1), orders[1])
    assert (epoch_order(1000, 43, 0) == orders[0]).sum() < 10


def test_a_run_is_its_epochs_one_after_the_other():
    expected = [batch for number in range(4) for batch in epoch(number, 10, 3, seed=1)]
    batches = EpochOrder(10, 3, seed=1)
    run = RunOrder(batches, 0, 11)
    assert list(run) == expected[:11] and len(run) == 11
    assert list(RunOrder(batches, 5, 11)) == expected[5:11]
    there = pickle.loads(pickle.dumps(run))
    assert [there[place] for place in (10, 0, 4, 4)] == [expected[place] for place in (10, 0, 4, 4)]
    for beyond in (11, -1):
        with pytest.raises(IndexError):
            run[beyond]


@pytest.mark.parametrize("num_samples", [37, 48, 9])
def test_processes_share_the_common_order(num_samples):
    alone = epoch(1, num_samples, 8, seed=2)
    shares = [epoch(1, num_samples, 2, seed=2, rank=rank, world_size=4) for rank in range(4)]
    assert [sum(batches, []) for batches in zip(*shares)] == alone
    keys = sum(alone, [])
    assert len(keys) == len(set(keys)) == num_samples // 8 * 8
    with pytest.raises(ValueError, match="64 samples, but the set has 26"):
        EpochOrder(26, 32, rank=0, world_size=2)


@pytest.mark.parametrize("length, size, world", [(12, 4, 1), (13, 4, 1), (1, 8, 2), (9, 2, 2), (7, 3, 4), (100, 7, 3)])
def test_processes_validate_every_sample_once_in_as_many_batches(length, size, world):
    shares = [split_among_processes(length, size, rank, world) for rank in range(world)]
    batches = sum(shares, [])
    assert sorted(sum(batches, [])) == [(0, index) for index in range(length)]
    assert len({len(share) for share in shares}) == 1 and max(map(len, batches)) <= size


def test_another_batch_size_continues_at_the_same_place():
    whole = EpochOrder(12, 1, seed=3)
    for seen, size in ((36, 3), (38, 3), (41, 4), (46, 3), (47, 5)):
        batches = EpochOrder(12, size, seed=3)
        batches.enter(seen, seen)  # the run had batches of one sample
        steps = batches.steps_of(6)
        keys = [key for batch in RunOrder(batches, seen, steps) for key in batch]
        rest = [key for (key,) in RunOrder(whole, seen, 72)]
        used = [key for key in rest if key in set(keys)]
        assert keys == used and batches.place(steps) == (6, 0)
        dropped = {epoch: 12 - sum(key[0] == epoch for key in keys) for epoch in range(4, 6)}
        assert set(dropped.values()) == {12 % size}
        first_epoch = [index for epoch, index in keys if epoch == 3]
        assert len(first_epoch) == (48 - seen) // size * size
        for step in range(seen, steps):  # a run that stops there and continues takes the same batches
            again = EpochOrder(12, size, seed=3)
            again.enter(step, batches.samples_seen(step))
            assert again.steps_of(6) == steps and again.equivalent_step(steps) == batches.equivalent_step(steps)
            assert list(RunOrder(again, step, steps)) == list(RunOrder(batches, step, steps))
    assert [whole.equivalent_step(step) for step in range(30)] == list(range(30))


def test_a_validation_loss_that_rises_while_training_falls_is_noticed_once():
    def warned(losses):
        monitor, steps = OverfittingMonitor(), []
        for step, (training, validation) in enumerate(losses):
            monitor.add(training)
            monitor.add(training)
            if monitor.validated(validation):
                steps.append(step)
        return steps

    assert warned([(5, 5), (4, 4), (3, 4.1), (2, 4.2), (1, 4.3), (0.5, 4.4), (0.4, 4.5)]) == [4]
    assert warned([(5, 5), (4, 4), (3, 4.1), (2, 4.2), (1, 4.1), (0.9, 4.2), (0.8, 4.3)]) == []  # not in a row
    assert warned([(5, 4), (4, 4.1), (4.5, 4.2), (4.4, 4.3), (4.3, 4.4)]) == []  # training does not fall throughout


def schedule(name, *, epochs=10, steps=100, warmup_steps=0):
    rates = LearningRate(name, PEAK, warmup_steps)
    rates.epochs, rates.steps = epochs, steps
    return rates


def test_multi_step_over_ten_epochs():
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]
    assert [multi_step(epoch, 10) for epoch in range(10)] == pytest.approx(expected, rel=1e-12)
    assert [multi_step(epoch, 10, late=1) for epoch in range(10)] == pytest.approx([1 / 3, 2 / 3] + [1] * 8, rel=1e-12)
    rates = schedule("multi_step")
    assert [rates.at(10 * epoch + 3, epoch) for epoch in range(10)] == pytest.approx([PEAK * e for e in expected])


def test_trapezoid_and_cosine_begin_and_end_where_they_should():
    factors = [trapezoid(step, 100, 4) for step in range(100)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and factors[4:51] == [1.0] * 47
    assert factors[51:] == pytest.approx([0.02 * left for left in range(49, 0, -1)])
    assert trapezoid(0, 1, 0) == 1 and trapezoid(100, 100, 4) == 0
    assert max(trapezoid(step, 10, 50) for step in range(10)) < 0.2  # a warm-up longer than the run
    assert [cosine(step, 100, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert [cosine(step, 100, 4) for step in (28, 52, 100)] == pytest.approx([0.8535534, 0.5, 0], abs=1e-7)
    assert cosine(0, 100, 0) == 1
    assert [cosine(step, 3, 5) for step in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])  # all warm-up


def loss_series():
    drawn = random.Random(0)
    return {
        "falling": [1 / (1 + epoch) for epoch in range(60)],
        "rising": [float(epoch) for epoch in range(80)],
        "noisy": [2 * 0.99**epoch + 0.1 * drawn.random() for epoch in range(300)],
        "almost falling": [1 - 1e-6 * epoch for epoch in range(100)],  # less than the threshold of 1e-4
        "broken": [1.0] * 5 + [math.nan] * 30 + [0.5] * 30,
        "endless": [1.0] * 700,
    }


def torchs_plateau(losses):
    """Learning rate of each epoch and of the one after the last, by torch's scheduler on an optimizer of its own."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    options = {"mode": "min", "factor": 0.5, "patience": 10, "cooldown": 10, "min_lr": 1e-6}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
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


def test_a_sharded_process_that_fails_alone_does_not_wait_for_the_others(tiny_flags, tmp_path, monkeypatch):
    flags = [*tiny_flags, "--checkpoint-output-dir", str(tmp_path), "--max-steps", "2", "--checkpoint-save-steps", "1"]
    run = build(train_arguments(flags))
    train.train(run)
    run.settings.shard = True
    monkeypatch.delattr(type(run.trainer), "state_dict")  # which all processes of a sharded run call together
    last = tmp_path / "dalle_step_2.pt"
    with pytest.raises(SamplesLost, match=f"^gone; the last good checkpoint is {last}$"), open_loop(run):
        raise SamplesLost("gone")
