"""Several processes: how they divide a step."""

import pytest

from backends.native.backend import split_step


@pytest.mark.parametrize(
    "batch_size, micro_batches, size, expected",
    [
        (4, 6, 1, (4, 6)),
        (4, 6, 3, (4, 2)),
        (8, 1, 2, (4, 1)),  # smaller micro-batches if there is only one
        (6, 1, 3, (2, 1)),
        (4, 3, 2, (3, 2)),  # six samples each, in the largest micro-batches that fit
        (1, 8, 8, (1, 1)),
    ],
)
def test_processes_take_together_what_one_takes(batch_size, micro_batches, size, expected):
    assert split_step(batch_size, micro_batches, size) == expected
    assert expected[0] * expected[1] * size == batch_size * micro_batches and expected[0] <= batch_size


def test_an_uneven_step_is_refused():
    with pytest.raises(ValueError, match="^one step takes 9 samples .* not a multiple of the 2 processes$"):
        split_step(3, 3, 2)
