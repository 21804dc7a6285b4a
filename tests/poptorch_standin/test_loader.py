"""The DataLoader: whole batches in order, asynchronous modes, samplers and processes."""

import pytest
import torch

from tests.poptorch_standin.helpers import options_of, trainer_of


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(int, 1)


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length=20):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


@pytest.mark.parametrize("mode", ["Sync", "Async", "AsyncRebatched"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_whole_batches_in_order(poptorch_standin, mode, workers):
    loader = poptorch_standin.DataLoader(
        options_of(poptorch_standin, 2, 3, 1),
        Numbers(),
        num_workers=workers,
        mode=getattr(poptorch_standin.DataLoaderMode, mode),
        rebatched_worker_size=4 if mode == "AsyncRebatched" else None,
    )
    assert loader.combinedBatchSize == 6 and len(loader) == 3
    for _ in range(2):
        rows = [index.tolist() for _, index in loader]
        assert rows == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    loader.terminate()
    with pytest.raises(RuntimeError, match="terminated"):
        iter(loader)


def test_asynchronous_batches_must_be_cloned(poptorch_standin):
    def load(mode, **more):
        loader = poptorch_standin.DataLoader(poptorch_standin.Options(), Numbers(), batch_size=2, mode=mode, **more)
        kept = [(batch, batch[1].tolist()) for batch in loader]
        return [batch[1].tolist() == was for batch, was in kept]

    modes = poptorch_standin.DataLoaderMode
    assert all(load(modes.Sync))
    assert load(modes.Async, async_options={"buffer_size": 3}) == 7 * [False] + 3 * [True]


def test_asynchronous_loaders_work_on_a_copy(poptorch_standin):
    dataset = Numbers()
    dataset.local = lambda: None
    with pytest.raises(RuntimeError, match="pickled"):
        poptorch_standin.DataLoader(poptorch_standin.Options(), dataset, mode=poptorch_standin.DataLoaderMode.Async)
    dataset = Numbers(4)
    loader = poptorch_standin.DataLoader(
        poptorch_standin.Options(), dataset, mode=poptorch_standin.DataLoaderMode.Async
    )
    dataset.length = 2
    assert len(list(loader)) == 4


def test_batch_samplers_give_combined_batches(poptorch_standin):
    def load(keys):
        options = options_of(poptorch_standin, accumulation=2)
        return [i.tolist() for _, i in poptorch_standin.DataLoader(options, Numbers(), batch_sampler=keys)]

    assert load([[5, 3], [1, 2, 7, 7]]) == [[5, 3], [1, 2, 7, 7]]
    with pytest.raises(RuntimeError, match="not a multiple of 2"):
        load([[5, 3, 1]])


def test_loader_shares_the_dataset_among_processes(poptorch_standin):
    options = poptorch_standin.Options()
    options.Distributed.configureProcessId(1, 2)
    shared = poptorch_standin.DataLoader(options, Numbers(), batch_size=5)
    whole = poptorch_standin.DataLoader(options, Numbers(), batch_size=5, auto_distributed_partitioning=False)
    assert [i[0].item() for _, i in shared] == [10, 15] and [i[0].item() for _, i in whole] == [0, 5, 10, 15]
    with pytest.raises(ValueError, match="auto_distributed_partitioning=False"):
        poptorch_standin.DataLoader(options, Numbers(), batch_sampler=[[1]])
    with pytest.raises(RuntimeError, match=r"popdist\.poptorch\.Options"):
        trainer_of(poptorch_standin, options=options)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"persistent_workers": True}, ValueError),
        ({"mode": "Async"}, TypeError),
        ({"rebatched": True, "batch_size": 1}, ValueError),
        ({"rebatched": True, "batch_size": 4, "rebatched_worker_size": 5}, ValueError),
        ({"rebatched": True, "batch_size": 4, "batch_sampler": [[1]]}, ValueError),
        ({"rebatched_worker_size": 1}, ValueError),
        ({"async_options": {"buffer_size": 2}}, ValueError),
        ({"rebatched": True, "batch_size": 4, "async_options": {"buffers": 2}}, ValueError),
        ({"rebatched": True, "batch_size": 4, "async_options": {"buffer_size": 2.0}}, TypeError),
        ({"batch_sampler": [[1]], "batch_size": 2}, ValueError),
        ({"batchsize": 2}, TypeError),
        ({"dataset": Endless()}, NotImplementedError),
        ({"options": None}, TypeError),
    ],
)
def test_loaders_refuse(poptorch_standin, arguments, error):
    arguments = {"options": poptorch_standin.Options(), "dataset": Numbers(), **arguments}
    if arguments.pop("rebatched", False):
        arguments["mode"] = poptorch_standin.DataLoaderMode.AsyncRebatched
    with pytest.raises(error):
        poptorch_standin.DataLoader(**arguments)
