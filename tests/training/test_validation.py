"""Held-out batches: every sample once among all processes, and as many lists in each."""

import pytest

from training.validation import OverfittingMonitor, split_among_processes


@pytest.mark.parametrize("length, size, world", [(12, 4, 1), (13, 4, 1), (1, 8, 2), (9, 2, 2), (7, 3, 4), (100, 7, 3)])
def test_every_sample_once(length, size, world):
    shares = [split_among_processes(length, size, rank, world) for rank in range(world)]
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(keys) == [(0, index) for index in range(length)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= size for share in shares for batch in share)


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
