"""The order in which an epoch meets its samples, and random numbers that depend on nothing but what names them.

An epoch's order is a function of (seed, epoch), so workers, processes and resumed runs need share no state. Which
samples there are is data/loader.py's.
"""

from typing import Iterator, List, Optional, Tuple, Union

import numpy as np
from torch.utils.data import Sampler

Key = Union[int, Tuple[int, int]]  # index, or (epoch, index)

_ORDER = 2  # what a random number is for, beside those of data/loader.py


class EpochOrder(Sampler):
    """The batches of one epoch as lists of (epoch, index), for DataLoader's `batch_sampler`.

    The order of an epoch is a permutation that depends on (seed, epoch) alone. It is cut into global batches of
    batch_size × world_size, and process `rank` takes its own batch_size of each: N processes together see the batches
    that one process with an N times larger batch_size sees. Entering at `start_batch` costs nothing.

    Without `drop_last` the samples left at the end are shared out as evenly as they go; a process may then have one
    batch fewer than another.

    Set the epoch in the parent process before each pass; workers may be persistent, because the keys carry the epoch:

        batches = EpochOrder(len(dataset), batch_size, seed=seed)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=4, persistent_workers=True)
        for epoch in range(first_epoch, epochs):
            batches.set_epoch(epoch, start_batch=resume_at if epoch == first_epoch else 0)
            for text, image in loader: ...

    Raises ValueError when the set is smaller than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 42,
        epoch: int = 0,
        start_batch: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: need batch_size >= 1 and rank < world_size"
            )
        together = batch_size * world_size
        if num_samples < together and (drop_last or num_samples < 1):
            split = f" = {batch_size} × {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"one step takes {together} samples{split}, but the set has {num_samples}; "
                f"lower the batch size, accumulation or replication to at most {num_samples} together, or add pictures"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.full_batches, left = divmod(num_samples, together)
        self.left = 0 if drop_last else left
        self._latest: Optional[Tuple[int, np.ndarray]] = None  # epoch and order that were asked for last
        self.set_epoch(epoch, start_batch)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this process in a whole epoch, wherever this one was entered."""
        return self.full_batches + (self.rank < self.left)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next pass that of `epoch`, without its first `start_batch` batches."""
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch} lies outside an epoch of {self.batches_per_epoch} batches")
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        epoch = self.epoch
        for number in range(self.start_batch, self.batches_per_epoch):
            yield self.batch(epoch, number)

    def batch(self, epoch: int, number: int) -> List[Tuple[int, int]]:
        """Batch `number` of any epoch, wherever this one was entered."""
        order = self._order_of(epoch)
        if number < self.full_batches:
            start = (number * self.world_size + self.rank) * self.batch_size
            share = order[start : start + self.batch_size]
        else:
            tail = order[self.full_batches * self.world_size * self.batch_size :]
            share = np.array_split(tail, self.world_size)[self.rank]
        return [(epoch, index) for index in share.tolist()]

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            order = epoch_order(self.num_samples, self.seed, epoch) if self.shuffle else np.arange(self.num_samples)
            self._latest = epoch, order
        return self._latest[1]


class RunOrder:
    """The batches of a run from update `first` up to `last`, epoch after epoch: a sequence, so that a loader in another
    process can be handed a place in it, and picklable.
    """

    def __init__(self, batches: EpochOrder, first: int, last: int):
        self.batches, self.first, self.last = batches, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, place: int) -> List[Tuple[int, int]]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.batches.batch(*divmod(self.first + place, self.batches.batches_per_epoch))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, int64 (num_samples,): the same on every machine and with every numpy."""
    start = random_bits(seed, _ORDER, epoch)
    weights = _mix(np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start))
    return np.argsort(weights, kind="stable")


# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): a counter goes in, 64
# mixed bits come out. No state to carry, and about a microsecond a number, where seeding a torch or numpy generator
# takes ten.
_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(bits):
    """SplitMix64's output function, a bijection of 64-bit numbers; takes a Python int or a uint64 array."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _MASK
    return bits ^ (bits >> 31)


def random_bits(*names: int) -> int:
    """64 random bits, as an int in [0, 2**64), that depend on the numbers given and their order alone."""
    bits = 0
    for name in names:
        bits = _mix((bits + _GOLDEN + name) & _MASK)
    return bits


def epoch_and_index(key: Key, length: int) -> Tuple[int, int]:
    """A key as (epoch, index), index counted from 0; an index alone belongs to epoch 0. IndexError outside the set."""
    epoch, index = key if isinstance(key, tuple) else (0, key)
    if not -length <= index < length:
        raise IndexError(f"index {index} in a set of {length}")
    return int(epoch), int(index) % length
