"""Which samples each update takes, and the worker processes that read them.

Everything random is a function of numbers that name it: an epoch's order of (seed, epoch), a caption's choice of (seed,
epoch, index), a generated sample of (seed, index). So workers, processes and resumed runs share no state. Keys carry
the epoch: `dataset[(epoch, index)]` returns that sample.
"""

import collections
import contextlib
import logging
import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Deque, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.files import defer_sigchld, ignore_interrupts_in_worker, start_workers

logger = logging.getLogger("minidalle")
NOTICE_SECONDS = 5.0  # in which torch reports a worker whose pipe has broken
BROKEN_PIPE = (ConnectionError, EOFError)
RESTARTS = 3  # of the workers; without a limit, a machine short of memory would kill them forever
CALM = 1000  # micro-batches without a killed worker, after which as many restarts are allowed again
SHARE = 0.1  # of a GPU's free memory for a set; COCO's takes 0.3 GB
MEMORY_ADVICE = "; if memory ran out, fewer --dataloader-workers need less"
CAPTION, DROPOUT, _ORDER, _GENERATED, _VALIDATION = range(5)  # first names of random numbers

Key = Union[int, Tuple[int, int]]  # (epoch, index), or an index alone, in epoch 0


class SamplesLost(OSError):
    """The loader can give no more samples; the message is one line."""


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


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch, int64 (num_samples,), equal on every machine and with every numpy."""
    start = random_bits(seed, _ORDER, epoch)
    weights = _mix(np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start))
    return np.argsort(weights, kind="stable")


class EpochOrder:
    """The batches of every epoch, as lists of (epoch, index).

    The order of an epoch is a permutation that depends on (seed, epoch) alone. It is cut into global batches of
    batch_size × world_size samples, and process `rank` takes its own batch_size of each: N processes together see the
    batches that one process with an N times larger batch_size sees. The rest of an epoch is dropped.

    Raises:
        ValueError: the set is smaller than one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 42, rank: int = 0, world_size: int = 1):
        self.global_batch = batch_size * world_size
        if num_samples < self.global_batch:
            raise ValueError(f"one step takes {self.global_batch} samples, but the set has {num_samples}")
        self.num_samples, self.batch_size, self.seed, self.rank = num_samples, batch_size, seed, rank
        self.batches_per_epoch = num_samples // self.global_batch
        self._latest: Optional[Tuple[int, np.ndarray]] = None  # epoch and order used last
        self.enter(0, 0)

    def enter(self, step: int, samples_seen: int) -> None:
        """Let update `step` continue after the run's first samples, as many as the method samples_seen has returned."""
        epoch, taken = divmod(samples_seen, self.num_samples)
        if self.num_samples - taken < self.global_batch:  # too few are left in this epoch
            epoch, taken = epoch + 1, 0
        self._entered = step, epoch, taken
        self._left = (self.num_samples - taken) // self.global_batch  # batches in that epoch

    def place(self, step: int) -> Tuple[int, int]:
        """Return the epoch of update `step`, and how many samples of the epoch come before it."""
        first, epoch, taken = self._entered
        if step - first < self._left:
            return epoch, taken + (step - first) * self.global_batch
        epochs, number = divmod(step - first - self._left, self.batches_per_epoch)
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
        first, epoch, _ = self._entered
        return first + self._left + (epochs - epoch - 1) * self.batches_per_epoch if epochs > epoch else first

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


def count_validation(images: int, share: float) -> int:
    return max(1, round(share * images))


@dataclass(eq=False)
class GeneratedDataset(Dataset):
    """Random samples for measuring speed without data; each depends only on `seed` and its index.

    text   int64 (text_seq_len,), tokens from 1 to num_text_tokens - 1
    image  as in TextImageDataset: float32 or, if `byteio`, uint8 (3, image_size, image_size); int64 (image_seq_len,)
           codes below num_image_codes if they are given
    """

    length: int
    text_seq_len: int
    num_text_tokens: int
    image_size: int = 256
    byteio: bool = False
    seed: int = 42
    num_image_codes: Optional[int] = None
    image_seq_len: Optional[int] = None
    lost = to_encode = 0  # as in TextImageDataset

    def __len__(self) -> int:
        return self.length

    def split_off(self, share: float) -> "GeneratedDataset":
        """Return a dataset of this share of the length, at least one sample, with another seed."""
        return replace(self, length=count_validation(self.length, share), seed=random_bits(self.seed, _VALIDATION))

    def exclude_images_of(self, message: str) -> List[str]:
        """Return an empty list: no image was read."""
        return []

    def tables(self, most: float) -> None:
        """Return None: samples are generated when they are read."""

    def fingerprint(self) -> str:
        return f"{self.length} generated samples of seed {self.seed}"

    def captions(self, index: int) -> List[np.ndarray]:
        """Return an empty list: random tokens are no captions."""
        return []

    def __getitem__(self, key: Key) -> Tuple[torch.Tensor, torch.Tensor]:
        index = range(len(self))[key[1] if isinstance(key, tuple) else key]
        random = np.random.Generator(np.random.Philox(key=random_bits(self.seed, _GENERATED, index)))
        text = torch.from_numpy(random.integers(1, self.num_text_tokens, self.text_seq_len, dtype=np.int64))
        if self.num_image_codes is not None:
            return text, torch.from_numpy(random.integers(0, self.num_image_codes, self.image_seq_len, dtype=np.int64))
        shape = (3, self.image_size, self.image_size)
        if self.byteio:
            return text, torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))
        return text, torch.from_numpy(random.random(shape, dtype=np.float32))


class SetOnDevice:
    """The captions and codes of a set on a GPU, where samples are gathered; one small copy each step.

    Attributes:
        fits: whether they take at most SHARE of the free memory, and can be uploaded at all.
    """

    def __init__(self, dataset: Any, device: torch.device, free: int):
        self.dataset, self.device = dataset, device
        tables = dataset.tables(SHARE * free)
        self.fits = tables is not None
        if tables is not None:
            texts, codes, self.before = tables
            self.texts, self.codes = texts.to(device), codes.to(device)

    def gather(self, keys: Sequence[Any]) -> Tuple[Tensor, Tensor]:
        """Return text and codes of samples, int64 (B, …), on the device."""
        rows = self.dataset.rows(keys, self.before).pin_memory().to(self.device, non_blocking=True)
        return self.texts[rows[0]].long(), self.codes[rows[1]].long()


def read_batches(
    dataset: Any, batches: Iterable[Any], workers: int, handle_death: Callable[[Exception], None], **options: Any
) -> Iterator[Any]:
    """Yield what a DataLoader makes of each batch of keys, in order; new workers continue after one was killed.

    Args:
        handle_death: is called before new workers start, with the error that torch raised; may raise it again.
        options: further arguments of DataLoader.
    """
    left: Iterator[Any] = iter(batches)
    missing: Deque[Any] = collections.deque()  # batches that workers got and that are not yielded yet

    def hand_out(again: List[Any]) -> Iterator[Any]:
        yield from again
        while True:
            with defer_sigchld():  # torch's error would end `left`
                batch = next(left, None)
                if batch is None:
                    return
                missing.append(batch)
            yield batch

    while True:
        loader = DataLoader(
            dataset,
            batch_sampler=hand_out(list(missing)),  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=ignore_interrupts_in_worker,
            **options,
        )
        with contextlib.ExitStack() as handling:
            try:
                with notice_dead_worker():
                    for content in start_workers(loader):
                        with defer_sigchld():
                            missing.popleft()
                            yield content
                return
            except (RuntimeError, *BROKEN_PIPE) as error:
                handling.enter_context(defer_sigchld())  # another worker may have been killed as well
                handle_death(error)


def read_in_workers(
    dataset: Any, order: Sequence[List[Any]], size: int, workers: int, pin_memory: bool
) -> Iterator[Tuple[Tensor, Tensor]]:
    """Yield the (text, image) tensors of each micro-batch.

    A sample depends on its key alone, so new workers continue at the missing micro-batch after one was killed; another
    image replaces the one that it was reading.

    Raises:
        SamplesLost: workers keep being killed, or no image can be read any more.
    """
    done = killed = latest = 0  # micro-batches, workers killed in a row, micro-batches before the latest of them

    def handle_death(error: Exception) -> None:
        nonlocal killed, latest
        reason, names = explain_dead_worker(error, dataset)
        killed, latest = (killed if done - latest < CALM else 0) + 1, done
        if killed > RESTARTS:
            raise SamplesLost(reason + MEMORY_ADVICE)
        replaced = "another image replaces it, and " if names else ""
        logger.warning("%s; %snew workers continue", reason, replaced)

    micro_batches = (keys[first : first + size] for keys in order for first in range(0, len(keys), size))
    try:
        for micro_batch in read_batches(dataset, micro_batches, workers, handle_death, pin_memory=pin_memory):
            done += 1
            yield micro_batch
    except (ValueError, OSError) as error:
        raise SamplesLost(last_line(error)) from None


@contextlib.contextmanager
def notice_dead_worker() -> Iterator[None]:
    """Let torch report the end of a worker (RuntimeError) whose pipe broke before torch noticed it."""
    try:
        yield
    except BROKEN_PIPE:
        time.sleep(NOTICE_SECONDS)  # torch raises its error within
        raise


def explain_dead_worker(error: Exception, dataset: Any) -> Tuple[str, List[str]]:
    """Return a line about the killed worker, and the names of the images that it was reading.

    Any other error is raised again.
    """
    if isinstance(error, BROKEN_PIPE):
        return "DataLoader worker has ended", []
    reason = str(error).splitlines()[0].rstrip(". ")
    if not reason.startswith("DataLoader worker"):
        raise error
    names = dataset.exclude_images_of(reason)
    return f"{reason}, reading {' and '.join(names)}" if names else reason, names


def last_line(error: Exception) -> str:
    """Return an exception's message; of one from a worker, which holds a whole traceback, the last line's."""
    message = str(error).strip()
    return message.splitlines()[-1].partition(": ")[2] if "in DataLoader worker process" in message else message
