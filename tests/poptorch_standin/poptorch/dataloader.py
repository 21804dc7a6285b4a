"""DataLoader: batches of all that one call takes, and the asynchronous loaders' traps.

An asynchronous loader here works in this process, but on a pickled copy of the dataset, as the real one's worker does,
and hands out the buffers of a ring: a batch that is kept without cloning is overwritten by a later one.
"""

import pickle

import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, Subset

from . import checks
from .device import tensors_in
from .enums import DataLoaderMode, SharingStrategy
from .options import Options

ASYNC_OPTIONS = {
    "buffer_size": lambda value: checks.whole("buffer_size", value),
    "miss_sleep_time_in_ms": lambda value: checks.number("miss_sleep_time_in_ms", value),
    "load_indefinitely": lambda value: checks.of_type("load_indefinitely", value, bool),
    "early_preload": lambda value: checks.of_type("early_preload", value, bool),
    "sharing_strategy": lambda value: checks.member("sharing_strategy", value, SharingStrategy),
}
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
        """batch_sampler: yields the keys of whole combined batches. kwargs: torch's further arguments."""
        if not isinstance(options, Options):
            raise TypeError(f"DataLoader wants poptorch.Options first, not {type(options).__name__}")
        if isinstance(dataset, IterableDataset):
            raise NotImplementedError("iterable datasets are not in the stand-in")
        options._freeze()
        self._mode = checks.member("mode", mode, DataLoaderMode)
        self._ring = self._ring_size(async_options)
        self._terminated = False
        self.combinedBatchSize = checks.whole("batch_size", batch_size) * options._micro_batches
        self._parts = options._micro_batches
        loaded = self.combinedBatchSize
        if mode is DataLoaderMode.AsyncRebatched:
            loaded = self._rebatched(rebatched_worker_size, batch_sampler)
        elif rebatched_worker_size is not None:
            raise ValueError("rebatched_worker_size is for DataLoaderMode.AsyncRebatched")
        if persistent_workers and num_workers == 0:
            raise ValueError("persistent_workers=True wants num_workers > 0")
        if auto_distributed_partitioning and options.Distributed.numProcesses > 1:
            if batch_sampler is not None or "sampler" in kwargs:
                raise ValueError("a sampler deals out the whole dataset: pass auto_distributed_partitioning=False")
            dataset = _share(dataset, options.Distributed.processId, options.Distributed.numProcesses)
        if mode is not DataLoaderMode.Sync:
            dataset, batch_sampler, kwargs = _travel((dataset, batch_sampler, kwargs))
        self._drop_last = drop_last
        if batch_sampler is not None:
            if batch_size != 1 or shuffle:
                raise ValueError("batch_sampler excludes batch_size and shuffle")
            kwargs["batch_sampler"] = batch_sampler
            self.combinedBatchSize = None
        else:
            # Of small worker batches the last may be short; whole batches are made of them afterwards.
            kwargs.update(batch_size=loaded, shuffle=shuffle, drop_last=drop_last and loaded == self.combinedBatchSize)
        persistent = num_workers > 0 if persistent_workers is None else persistent_workers
        super().__init__(dataset, num_workers=num_workers, persistent_workers=persistent, **kwargs)

    def _ring_size(self, async_options):
        given = {} if async_options is None else async_options
        if given and self._mode is DataLoaderMode.Sync:
            raise ValueError("async_options are for asynchronous loaders")
        for name, value in given.items():
            if name not in ASYNC_OPTIONS:
                raise ValueError(f"async_options has no {name!r}; it has {', '.join(ASYNC_OPTIONS)}")
            ASYNC_OPTIONS[name](value)
        return given.get("buffer_size", RING)

    def _rebatched(self, worker_size, batch_sampler):
        combined = self.combinedBatchSize
        if batch_sampler is not None:
            raise ValueError("AsyncRebatched cuts the batches itself and takes no batch_sampler")
        if combined == 1:
            raise ValueError("AsyncRebatched needs a combined batch of more than 1")
        worker_size = combined if worker_size is None else checks.whole("rebatched_worker_size", worker_size)
        if worker_size > combined:
            raise ValueError(f"rebatched_worker_size {worker_size} exceeds the combined batch of {combined}")
        return worker_size

    def __len__(self):
        if self._mode is not DataLoaderMode.AsyncRebatched:
            return super().__len__()
        whole, rest = divmod(len(self.dataset), self.combinedBatchSize)
        return whole + (1 if rest and not self._drop_last else 0)

    def __iter__(self):
        if self._terminated:
            raise RuntimeError("the loader is terminated")
        if self._mode is DataLoaderMode.Sync:
            return self._checked(super().__iter__())
        source = super().__iter__()
        if self._mode is DataLoaderMode.AsyncRebatched:
            source = self._whole_batches(source)
        return self._through_ring(self._checked(source))

    def _checked(self, source):
        for batch in source:
            sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.dim()}
            odd = [size for size in sizes if size % self._parts]
            if odd and self.combinedBatchSize is None:
                raise RuntimeError(f"batch_sampler gave {odd[0]} samples, which is not a multiple of {self._parts}")
            yield batch

    def _whole_batches(self, source):
        """Worker batches, in their order, put together to combined ones."""
        pending = None
        for batch in source:
            pending = batch if pending is None else _map(lambda *pair: torch.cat(pair), pending, batch)
            while _length(pending) >= self.combinedBatchSize:
                yield _map(lambda tensor: tensor[: self.combinedBatchSize], pending)
                pending = _map(lambda tensor: tensor[self.combinedBatchSize :], pending)
        if pending is not None and _length(pending) and not self._drop_last:
            yield pending

    def _through_ring(self, source):
        """A slot is filled anew as soon as the batch after it is asked for."""
        slots = []
        for batch in source:
            slots.append(_map(torch.clone, batch))
            if len(slots) == self._ring:
                break
        number, filled = 0, len(slots)
        while number < filled:
            slot = slots[number % self._ring]
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


def _share(dataset, process, processes):
    """The contiguous part of the dataset that this process reads; a rest that does not divide is left out."""
    size = len(dataset) // processes
    return Subset(dataset, range(process * size, (process + 1) * size))


def _travel(parts):
    """What a worker process gets: a copy, through pickle."""
    try:
        return pickle.loads(pickle.dumps(parts))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RuntimeError(f"an asynchronous loader's process needs a dataset that can be pickled: {error}") from error


def _map(function, *batches):
    """function over the tensors of nested lists, tuples and dicts of one structure."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return function(*batches)
    if isinstance(first, dict):
        return {name: _map(function, *(batch[name] for batch in batches)) for name in first}
    if type(first) in (list, tuple):
        return type(first)(_map(function, *members) for members in zip(*batches))
    raise TypeError(
        f"an asynchronous loader's batches are tensors in lists, tuples and dicts, not {type(first).__name__}"
    )


def _length(batch):
    return len(next(tensors_in(batch)))
