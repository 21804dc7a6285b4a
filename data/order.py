"""The order of samples in a run, and random numbers that depend only on what they are for.

An epoch's order is a function of (seed, epoch), so workers, processes and resumed runs share no state.
"""

from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np

Key = Union[int, Tuple[int, int]]  # index, or (epoch, index)

_ORDER = 2  # first name of a random number; data/loader.py uses others


class EpochOrder:
    """The batches of every epoch, as lists of (epoch, index).

    The order of an epoch is a permutation that depends on (seed, epoch) alone. It is cut into global batches of
    batch_size × world_size samples, and process `rank` takes its own batch_size of each: N processes together see the
    batches that one process with an N times larger batch_size sees. The rest of an epoch is dropped.

    Raises:
        ValueError: the set is smaller than one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int = 42, rank: int = 0, world_size: int = 1):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: need batch_size >= 1 and rank < world_size"
            )
        self.global_batch = batch_size * world_size
        if num_samples < self.global_batch:
            split = f" = {batch_size} × {world_size} processes" if world_size > 1 else ""
            raise ValueError(f"one step takes {self.global_batch} samples{split}, but the set has {num_samples}")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches_per_epoch = num_samples // self.global_batch
        self._latest: Optional[Tuple[int, np.ndarray]] = None  # epoch and order used last
        self._entered = 0, 0, 0  # an update, its epoch, and the samples before it in the epoch

    def enter(self, step: int, samples_seen: int) -> None:
        """Let update `step` continue after the first `samples_seen` of the run, as `samples_seen` counts them."""
        epoch, taken = divmod(samples_seen, self.num_samples)
        if self.num_samples - taken < self.global_batch:  # too few are left in this epoch
            epoch, taken = epoch + 1, 0
        self._entered = step, epoch, taken

    def place(self, step: int) -> Tuple[int, int]:
        """Return the epoch of update `step`, and how many samples of the epoch come before it."""
        first, epoch, taken = self._entered
        left = (self.num_samples - taken) // self.global_batch  # batches in the epoch that was entered
        if step - first < left:
            return epoch, taken + (step - first) * self.global_batch
        epochs, number = divmod(step - first - left, self.batches_per_epoch)
        return epoch + 1 + epochs, number * self.global_batch

    def samples_seen(self, step: int) -> int:
        """Return how many samples come before update `step`, with those that were dropped at the ends of epochs."""
        epoch, taken = self.place(step)
        return epoch * self.num_samples + taken

    def equivalent_step(self, step: int) -> int:
        """Return the number that update `step` would have if the whole run had had batches of this size."""
        epoch, taken = self.place(step)
        return epoch * self.batches_per_epoch + taken // self.global_batch

    def steps_of(self, epochs: int) -> int:
        """Return the number of updates until `epochs` epochs have ended."""
        first, epoch, taken = self._entered
        left = (self.num_samples - taken) // self.global_batch
        return first + left + (epochs - epoch - 1) * self.batches_per_epoch if epochs > epoch else first

    def batch(self, epoch: int, taken: int) -> List[Tuple[int, int]]:
        """Return this process's keys (epoch, index) of the global batch after the first `taken` samples of an epoch."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, epoch_order(self.num_samples, self.seed, epoch)
        start = taken + self.rank * self.batch_size
        return [(epoch, index) for index in self._latest[1][start : start + self.batch_size].tolist()]


class RunOrder(Sequence):
    """The batches of a run from update `first` to before update `last`, epoch after epoch.

    A picklable sequence, so that a loader in another process can start anywhere in it.
    """

    def __init__(self, batches: EpochOrder, first: int, last: int):
        self.batches, self.first, self.last = batches, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, place: Any) -> List[Tuple[int, int]]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.batches.batch(*self.batches.place(self.first + place))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch, int64 (num_samples,), equal on every machine and with every numpy."""
    start = random_bits(seed, _ORDER, epoch)
    weights = _mix(np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start))
    return np.argsort(weights, kind="stable")


# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) turns a counter into 64
# random bits. It carries no state and takes about 1 µs per number; seeding a torch or numpy generator takes 10 µs.
_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(bits: Any) -> Any:
    """Apply SplitMix64's output function, a bijection of 64-bit numbers, to an int or a uint64 array."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _MASK
    return bits ^ (bits >> 31)


def random_bits(*names: int) -> int:
    """Return 64 random bits, an int in [0, 2**64), that depend only on the given numbers and their order."""
    bits = 0
    for name in names:
        bits = _mix((bits + _GOLDEN + name) & _MASK)
    return bits


def epoch_and_index(key: Key, length: int) -> Tuple[int, int]:
    """Split a key into (epoch, index), 0 <= index < length; an index alone belongs to epoch 0.

    Raises:
        IndexError: the index lies outside [-length, length).
    """
    epoch, index = key if isinstance(key, tuple) else (0, key)
    if not -length <= index < length:
        raise IndexError(f"index {index} in a set of {length}")
    return int(epoch), int(index) % length
