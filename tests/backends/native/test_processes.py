"""Sharing a step among processes, and what is said where they cannot be reached."""

import pytest
import torch

from backends.native.processes import Processes, share


@pytest.mark.parametrize(
    "batch_size, micro_batches, size, expected",
    [
        (4, 6, 1, (4, 6)),
        (4, 6, 3, (4, 2)),
        (8, 1, 2, (4, 1)),  # smaller micro-batches where there is one
        (6, 1, 3, (2, 1)),
        (4, 3, 2, (3, 2)),  # six samples each, in as large micro-batches as fit
        (1, 8, 8, (1, 1)),
    ],
)
def test_processes_take_as_much_together_as_one(batch_size, micro_batches, size, expected):
    assert share(batch_size, micro_batches, size) == expected
    assert expected[0] * expected[1] * size == batch_size * micro_batches and expected[0] <= batch_size


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="one step takes 9 samples .* 2 processes .* a multiple of 2") as error:
        share(3, 3, 2)
    assert "\n" not in str(error.value)


def test_alone_nothing_is_exchanged(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes()
    alone.connect(torch.device("cpu"))
    assert (alone.rank, alone.size) == (0, 1)
    assert torch.equal(alone.mean(torch.arange(3.0)), torch.arange(3.0))
    with pytest.raises(RuntimeError, match="Connection closed"), alone.together():
        raise RuntimeError("Connection closed by peer")


def test_a_missing_meeting_place_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="the other processes cannot be reached: .*MASTER_ADDR") as error:
        Processes().connect(torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_only_a_lost_connection_counts_as_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = Processes()
    with pytest.raises(ConnectionError, match="another process of this run has ended"), processes.together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="out of memory"), processes.together():
        raise RuntimeError("out of memory")
