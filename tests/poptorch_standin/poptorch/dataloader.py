"""DataLoader: a batch holds everything for one call; asynchronous loaders have traps.

An asynchronous loader works in this process, but on a pickled copy of the dataset, as the real one's worker does. It
hands out the buffers of a ring: a later batch overwrites one that is kept without cloning.
"""

import pickle

import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, Subset

from .device import tensors_in
from .options import DataLoaderMode, Options, check_instance, check_int

RING = 3


class DataLoader(TorchLoader):
    def __init__(
        self,
        options,
        dataset,
        batch_size=1,
        shuffle=None,
        num_workers=0,
        drop_last=True,
        persistent_workers=None,
        auto_distributed_partitioning=True,
        mode=DataLoaderMode.Sync,
        async_options=None,
        rebatched_worker_size=None,
        batch_sampler=None,
        **kwargs,
    ):
        if not isinstance(options, Options):
            raise TypeError(f"DataLoader takes poptorch.Options first, not {type(options).__name__}")
        if isinstance(dataset, IterableDataset) or async_options is not None or batch_sampler is not None:
            raise NotImplementedError("iterable datasets, async_options and batch_sampler are not in the stand-in")
        options._freeze()
        self._mode = check_instance("mode", mode, DataLoaderMode)
        self._terminated, self._drop_last = False, drop_last
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
        if persistent_workers and num_workers == 0:
            raise ValueError("persistent_workers=True needs num_workers > 0")
        if auto_distributed_partitioning and options.Distributed.numProcesses > 1:
            if "sampler" in kwargs:
                raise ValueError("a sampler covers the whole dataset: pass auto_distributed_partitioning=False")
            dataset = _share_of(dataset, options.Distributed.processId, options.Distributed.numProcesses)
        if mode is not DataLoaderMode.Sync:
            dataset, kwargs = _pickled_copy((dataset, kwargs))
        # The last of small worker batches may be short; whole batches are made of them afterwards.
        kwargs.update(batch_size=loaded, shuffle=shuffle, drop_last=drop_last and loaded == self.combinedBatchSize)
        persistent = num_workers > 0 if persistent_workers is None else persistent_workers
        super().__init__(dataset, num_workers=num_workers, persistent_workers=persistent, **kwargs)

    def __len__(self):
        if self._mode is not DataLoaderMode.AsyncRebatched:
            return super().__len__()
        whole, rest = divmod(len(self.dataset), self.combinedBatchSize)
        return whole + (1 if rest and not self._drop_last else 0)

    def __iter__(self):
        if self._terminated:
            raise RuntimeError("the loader is terminated")
        source = super().__iter__()
        if self._mode is DataLoaderMode.AsyncRebatched:
            source = self._whole_batches(source)
        return source if self._mode is DataLoaderMode.Sync else self._through_ring(source)

    def _whole_batches(self, source):
        """Join worker batches, in their order, into combined ones."""
        pending = None
        for batch in source:
            pending = batch if pending is None else _map(lambda *pair: torch.cat(pair), pending, batch)
            while _length(pending) >= self.combinedBatchSize:
                yield _map(lambda tensor: tensor[: self.combinedBatchSize], pending)
                pending = _map(lambda tensor: tensor[self.combinedBatchSize :], pending)
        if pending is not None and _length(pending) and not self._drop_last:
            yield pending

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
                if [x.shape for x in tensors_in(upcoming)] != [x.shape for x in tensors_in(slot)]:
                    raise RuntimeError("an asynchronous loader's batches must all have one shape; use drop_last=True")
                _map(lambda old, new: old.copy_(new), slot, upcoming)
                filled += 1

    def terminate(self):
        self._terminated = True


def _share_of(dataset, process, processes):
    """Return the contiguous part of the dataset that this process reads; a remainder is dropped."""
    size = len(dataset) // processes
    return Subset(dataset, range(process * size, (process + 1) * size))


def _pickled_copy(parts):
    """Return what a worker process gets: a copy, through pickle."""
    try:
        return pickle.loads(pickle.dumps(parts))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RuntimeError(f"an asynchronous loader's process needs a dataset that can be pickled: {error}") from error


def _map(function, *batches):
    """Apply a function to the tensors of nested lists, tuples and dicts of one structure."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return function(*batches)
    if isinstance(first, dict):
        return {name: _map(function, *(batch[name] for batch in batches)) for name in first}
    if type(first) in (list, tuple):
        return type(first)(_map(function, *members) for members in zip(*batches))
    raise TypeError(f"an asynchronous loader's batches are tensors in lists, tuples and dicts, not {type(first)}")


def _length(batch):
    return len(next(tensors_in(batch)))
