"""Options and the DataLoader: what they take, what they refuse, batches and their buffers."""

import pytest
import torch

from tests.poptorch_standin.helpers import Net, options_of, trainer_of


@pytest.mark.parametrize(
    "error, calls",
    [
        (
            ValueError,
            [
                lambda p, o: o.deviceIterations(0),
                lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1.5}),
                lambda p, o: o.Training.gradientAccumulation(-1),
                lambda p, o: o.Distributed.configureProcessId(2, 2),
            ],
        ),
        (
            TypeError,
            [
                lambda p, o: o.deviceIterations(2.0),
                lambda p, o: o.replicationFactor(True),
                lambda p, o: o.outputMode("All"),
                lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1}),
                lambda p, o: o.Training.accumulationAndReplicationReductionType("mean"),
                lambda p, o: o.Precision.setPartialsType(torch.bfloat16),
                lambda p, o: o.TensorLocations.setOptimizerLocation(True),
                lambda p, o: p.Options(deviceIterations=2),
            ],
        ),
        (AttributeError, [lambda p, o: o.Training.gradientClipping(1.0), lambda p, o: o.autoRoundNumIpus(True)]),
        (KeyError, [lambda p, o: o._Popart.set("outlineTreshold", 10.0)]),
        (NotImplementedError, [lambda p, o: o.Training.accumulationAndReplicationReductionType(p.ReductionType.Sum)]),
    ],
)
def test_options_refuse(poptorch, error, calls):
    for call in calls:
        with pytest.raises(error):
            call(poptorch, poptorch.Options())


def test_options_freeze(poptorch):
    def make_loader(options):
        return poptorch.DataLoader(options, [torch.zeros(1)])

    makers = (make_loader, lambda o: poptorch.inferenceModel(Net(), o), lambda o: trainer_of(poptorch, options=o))
    for make in makers:
        options = poptorch.Options()
        make(options)
        for change in (options.deviceIterations, options.Training.gradientAccumulation):
            with pytest.raises(AttributeError, match="frozen"):
                change(2)
        with pytest.raises(AttributeError, match="frozen"):
            options._Popart.set("outlineThreshold", 1.0)


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
def test_loader_gives_whole_batches_in_order(poptorch, mode, workers):
    loader = poptorch.DataLoader(
        options_of(poptorch, 2, 3, 1),
        Numbers(),
        num_workers=workers,
        mode=getattr(poptorch.DataLoaderMode, mode),
        rebatched_worker_size=4 if mode == "AsyncRebatched" else None,
    )
    assert loader.combinedBatchSize == 6 and len(loader) == 3
    for _ in range(2):
        rows = [index.tolist() for _, index in loader]
        assert rows == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    loader.terminate()
    with pytest.raises(RuntimeError, match="terminated"):
        iter(loader)


def test_asynchronous_batches_must_be_cloned(poptorch):
    def stay_as_they_were(mode):
        loader = poptorch.DataLoader(poptorch.Options(), Numbers(), batch_size=2, mode=mode)
        kept = [(batch, batch[1].tolist()) for batch in loader]
        return [batch[1].tolist() == was for batch, was in kept]

    assert all(stay_as_they_were(poptorch.DataLoaderMode.Sync))
    assert stay_as_they_were(poptorch.DataLoaderMode.Async) == 7 * [False] + 3 * [True]


def test_loader_shares_the_dataset_among_processes(poptorch):
    options = poptorch.Options()
    options.Distributed.configureProcessId(1, 2)
    shared = poptorch.DataLoader(options, Numbers(), batch_size=5)
    whole = poptorch.DataLoader(options, Numbers(), batch_size=5, auto_distributed_partitioning=False)
    assert [i[0].item() for _, i in shared] == [10, 15] and [i[0].item() for _, i in whole] == [0, 5, 10, 15]
    with pytest.raises(ValueError, match="auto_distributed_partitioning=False"):
        poptorch.DataLoader(options, Numbers(), sampler=[1])
    with pytest.raises(poptorch.Error, match=r"popdist\.poptorch\.Options"):
        trainer_of(poptorch, options=options)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"persistent_workers": True}, ValueError),
        ({"mode": "Async"}, TypeError),
        ({"rebatched": True, "batch_size": 4, "rebatched_worker_size": 5}, ValueError),
        ({"rebatched_worker_size": 1}, ValueError),
        ({"batch_sampler": [[1]]}, NotImplementedError),
        ({"dataset": Endless()}, NotImplementedError),
    ],
)
def test_loaders_refuse(poptorch, arguments, error):
    arguments = {"options": poptorch.Options(), "dataset": Numbers(), **arguments}
    if arguments.pop("rebatched", False):
        arguments["mode"] = poptorch.DataLoaderMode.AsyncRebatched
    with pytest.raises(error):
        poptorch.DataLoader(**arguments)
