"""The order of an epoch: its own permutation, in batches that processes share and that can be entered anywhere."""

import pickle

import numpy as np
import pytest

from data.order import EpochOrder, RunOrder, epoch_order


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


def test_a_set_smaller_than_a_step_is_refused():
    with pytest.raises(ValueError, match="64 samples = 32 × 2 processes, but the set has 26") as error:
        EpochOrder(26, 32, rank=0, world_size=2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochOrder(9, 1, rank=2, world_size=2)


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
