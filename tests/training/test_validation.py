"""Held-out batches: every sample once among all processes, and as many lists in each."""

import pytest

from training.validation import split_among_processes


@pytest.mark.parametrize("length, size, world", [(12, 4, 1), (13, 4, 1), (1, 8, 2), (9, 2, 2), (7, 3, 4), (100, 7, 3)])
def test_every_sample_once(length, size, world):
    shares = [split_among_processes(length, size, rank, world) for rank in range(world)]
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(keys) == [(0, index) for index in range(length)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= size for share in shares for batch in share)
