"""Read the samples of each step: from a GPU's memory if the set fits there, otherwise in worker processes.

If a worker is killed, new ones start. Torch raises its error for a killed worker wherever the program is at that
moment, for example in an update. Here it is deferred until the next micro-batch is due, when nothing is half done.
"""

import itertools
import logging
import time
from typing import Any, Iterable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from backends.base import SamplesLost
from utils import interrupts

logger = logging.getLogger("minidalle")
NOTICE_SECONDS = 5.0  # in which torch reports a worker whose pipe has broken
RESTARTS = 3  # of the workers; without a limit, a machine short of memory would kill them forever
SHARE = 0.1  # of a GPU's free memory for a set; COCO's takes 0.3 GB
MEMORY_ADVICE = "; if memory ran out, fewer --dataloader-workers need less"


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


class MicroBatches:
    """A batch sampler that cuts each list of keys into micro-batches of `size`, skipping the first `done`."""

    def __init__(self, order: Iterable[List[Any]], size: int, done: int = 0):
        self.order, self.size, self.done = order, size, done

    def __iter__(self) -> Iterator[List[Any]]:
        """Yield the keys of each micro-batch; none has keys of two lists."""
        cut = (keys[first : first + self.size] for keys in self.order for first in range(0, len(keys), self.size))
        return itertools.islice(cut, self.done, None)


def read(
    dataset: Any, order: Sequence[List[Any]], size: int, workers: int, pin_memory: bool
) -> Iterator[Tuple[Tensor, Tensor]]:
    """Yield the (text, image) tensors of each micro-batch.

    A sample depends on its key alone, so new workers continue at the missing micro-batch after one was killed; another
    image replaces the one that it was reading.

    Raises:
        SamplesLost: workers keep being killed, or no image can be read any more.
    """
    done = killed = 0
    while True:
        loader = DataLoader(
            dataset,
            batch_sampler=MicroBatches(order, size, done),
            num_workers=workers,
            worker_init_fn=interrupts.ignore_interrupts_in_worker,
            pin_memory=pin_memory,
        )
        try:
            for micro_batch in loader:
                done += 1
                with interrupts.defer_sigchld():
                    yield micro_batch
            return
        except (RuntimeError, ConnectionError) as error:
            reason, names = explain_dead_worker(error, dataset)
        except (ValueError, OSError) as error:
            raise SamplesLost(last_line(error)) from None
        killed += 1
        if killed > RESTARTS:
            raise SamplesLost(reason + MEMORY_ADVICE)
        replaced = "another image replaces it, and " if names else ""
        logger.warning("%s; %snew workers continue", reason, replaced)


def explain_dead_worker(error: Exception, dataset: Any) -> Tuple[str, List[str]]:
    """Return a line about the killed worker, and the names of the images that it was reading.

    Any other error is raised again.
    """
    if isinstance(error, ConnectionError):  # its pipe broke before torch noticed its end
        try:
            time.sleep(NOTICE_SECONDS)
        except RuntimeError as noticed:
            error = noticed
        else:
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
