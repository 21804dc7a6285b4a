"""DataLoader: a batch holds everything for one call; asynchronous loaders have traps.

An asynchronous loader works in this process, but on a pickled copy of the dataset, as the real one's worker does. It
hands out the buffers of a ring: a later batch overwrites one that is kept without cloning.
"""

import pickle

import torch
from torch.utils.data import DataLoader as TorchLoader

from .device import tensors_in
from .options import DataLoaderMode, Options, check_int, check_type

RING = 3


class DataLoader(TorchLoader):
    def __init__(self, options, dataset, batch_size=1, *, mode=DataLoaderMode.Sync, rebatched_worker_size=None, **more):
        check_type("DataLoader's options", options, Options)
        num_workers, worker_init_fn = more.pop("num_workers", 0), more.pop("worker_init_fn", None)
        shared = more.pop("auto_distributed_partitioning", True) and options.Distributed.numProcesses > 1
        if shared or more.pop("shuffle", False) or not more.pop("drop_last", True) or more:
            raise NotImplementedError("the stand-in reads whole batches in order, of a dataset for this process")
        options._freeze()
        self._mode = check_type("mode", mode, DataLoaderMode)
        self.combinedBatchSize = loaded = check_int("batch_size", batch_size) * options._micro_batches
        if mode is DataLoaderMode.AsyncRebatched:
            if loaded == 1:
                raise ValueError("AsyncRebatched needs a combined batch of more than 1")
            if rebatched_worker_size is not None:
                loaded = check_int("rebatched_worker_size", rebatched_worker_size)
            if loaded > self.combinedBatchSize:
                raise ValueError(f"rebatched_worker_size {loaded} exceeds the combined batch {self.combinedBatchSize}")
        elif rebatched_worker_size is not None:
            raise ValueError("rebatched_worker_size is for DataLoaderMode.AsyncRebatched")
        if mode is not DataLoaderMode.Sync:
            dataset, worker_init_fn = pickle.loads(pickle.dumps((dataset, worker_init_fn)))  # what a worker gets
        # The last of small worker batches may be short; whole batches are made of them afterwards.
        super().__init__(
            dataset,
            batch_size=loaded,
            num_workers=num_workers,
            drop_last=loaded == self.combinedBatchSize,
            persistent_workers=num_workers > 0,
            worker_init_fn=worker_init_fn,
        )

    def __iter__(self):
        source = super().__iter__()
        if self._mode is DataLoaderMode.AsyncRebatched:
            source = self._whole_batches(source)
        return source if self._mode is DataLoaderMode.Sync else self._through_ring(source)

    def _whole_batches(self, source):
        """Join worker batches, in their order, into combined ones."""
        pending = None
        for batch in source:
            pending = batch if pending is None else _map(lambda *pair: torch.cat(pair), pending, batch)
            while len(next(tensors_in(pending))) >= self.combinedBatchSize:
                yield _map(lambda tensor: tensor[: self.combinedBatchSize], pending)
                pending = _map(lambda tensor: tensor[self.combinedBatchSize :], pending)

    def _through_ring(self, source):
        """Yield batches in reused buffers: a slot is filled again as soon as the batch after it is asked for."""
        slots = []
        for batch in source:
            slots.append(_map(torch.clone, batch))
            if len(slots) == RING:
                break
        number, filled = 0, len(slots)
        while number < filled:
            slot = slots[number % RING]
            yield slot
            number += 1
            upcoming = next(source, None)
            if upcoming is not None:
                _map(lambda old, new: old.copy_(new), slot, upcoming)
                filled += 1

    def terminate(self):
        pass


def _map(function, *batches):
    """Apply a function to the tensors of nested lists and tuples of one structure."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return function(*batches)
    return type(first)(_map(function, *members) for members in zip(*batches))
