"""The order of an epoch: a permutation of its own, in batches that processes share and that can be entered anywhere."""

import pickle

import numpy as np
import pytest

from data.order import EpochOrder, RunOrder, epoch_order


def test_an_epoch_is_a_permutation_and_each_epoch_another():
    orders = [epoch_order(1000, 42, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15  # deviation 0.03
    assert (orders[0] == orders[1]).sum() < 10 and (orders[1] == orders[2]).sum() < 10
    assert np.array_equal(epoch_order(1000, 42, 1), orders[1])
    assert (epoch_order(1000, 43, 0) == orders[0]).sum() < 10


def test_every_place_is_equally_likely():
    places = np.array([epoch_order(4, 7, epoch).tolist().index(0) for epoch in range(2000)])
    assert np.bincount(places, minlength=4).min() > 430  # 500 expected, deviation 19


def test_batches_carry_the_epoch_and_cover_it_once():
    batches = EpochOrder(10, 3, seed=1, epoch=4)
    keys = [key for batch in batches for key in batch]
    assert len(batches) == 3 and [len(batch) for batch in batches] == [3, 3, 3]
    assert {epoch for epoch, _ in keys} == {4} and len({index for _, index in keys}) == 9
    assert [index for _, index in keys] == epoch_order(10, 1, 4)[:9].tolist()
    in_order = [[index for _, index in batch] for batch in EpochOrder(7, 3, shuffle=False, drop_last=False)]
    assert in_order == [[0, 1, 2], [3, 4, 5], [6]]


def test_entering_anywhere_continues_the_same_order():
    whole = list(EpochOrder(50, 4, seed=9, epoch=2))
    for start in range(len(whole) + 1):
        entered = EpochOrder(50, 4, seed=9, epoch=2, start_batch=start)
        assert list(entered) == whole[start:] and len(entered) == len(whole) - start
        assert entered.batches_per_epoch == 12
    entered.set_epoch(3)
    assert list(entered) == list(EpochOrder(50, 4, seed=9, epoch=3))
    with pytest.raises(ValueError, match="13"):
        entered.set_epoch(3, start_batch=13)


def test_a_run_is_its_epochs_one_after_the_other():
    expected = [batch for epoch in range(4) for batch in EpochOrder(10, 3, seed=1, epoch=epoch)]
    batches = EpochOrder(10, 3, seed=1)
    run = RunOrder(batches, 0, 11)
    assert list(run) == expected[:11] and len(run) == 11
    assert list(RunOrder(batches, 5, 11)) == expected[5:11]
    there = pickle.loads(pickle.dumps(run))
    assert [there[place] for place in (10, 0, 4, 4)] == [expected[place] for place in (10, 0, 4, 4)]
    for beyond in (11, -1):
        with pytest.raises(IndexError):
            run[beyond]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num_samples", [37, 48, 9])
def test_processes_share_the_common_order(num_samples, drop_last):
    alone = list(EpochOrder(num_samples, 8, seed=2, epoch=1, drop_last=drop_last))
    shares = [
        list(EpochOrder(num_samples, 2, seed=2, epoch=1, drop_last=drop_last, rank=rank, world_size=4))
        for rank in range(4)
    ]
    keys = [key for share in shares for batch in share for key in batch]
    assert len(keys) == len(set(keys)) == (num_samples if not drop_last else num_samples // 8 * 8)
    for step, batch in enumerate(alone):
        together = [key for share in shares if step < len(share) for key in share[step]]
        assert together == batch
    for rank, share in enumerate(shares):
        batches = EpochOrder(num_samples, 2, drop_last=drop_last, rank=rank, world_size=4)
        assert len(batches) == batches.batches_per_epoch == len(share)


def test_a_set_smaller_than_a_step_is_refused():
    with pytest.raises(ValueError, match="64 samples = 32 × 2 processes, but the set has 26") as error:
        EpochOrder(26, 32, rank=0, world_size=2)
    assert "\n" not in str(error.value)
    assert [len(batch) for batch in EpochOrder(5, 8, drop_last=False)] == [5]
    with pytest.raises(ValueError, match="the set has 0"):
        EpochOrder(0, 8, drop_last=False)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochOrder(9, 1, rank=2, world_size=2)
