"""Micro-batches out of worker processes that read samples, and what is done where such a process is killed.

Torch raises its error for a killed worker wherever the program is at that moment, in the middle of an update, say. Here
it waits until the next micro-batch is wanted, where nothing is half done.
"""

import itertools
import logging
import signal
import time

from torch.utils.data import DataLoader

from backends.base import SamplesLost
from utils import interrupts

LOG = logging.getLogger("minidalle")
HEARD = 5.0  # seconds
RESTARTS = 3  # of the workers; a machine whose memory is short would go on killing them
MEMORY = "; if memory ran out, fewer --dataloader-workers need less"


def leave_interrupts_to_the_parent(worker):
    """For worker processes: Ctrl-C reaches them too, and the parent, which saves, is the one to end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which it does


class MicroBatches:
    """A batch sampler: each of order's lists of keys, cut into micro-batches of `size`, without the first `done`."""

    def __init__(self, order, size, done=0):
        self.order, self.size, self.done = order, size, done

    def __iter__(self):
        cut = (keys[first : first + self.size] for keys in self.order for first in range(0, len(keys), self.size))
        return itertools.islice(cut, self.done, None)


def read(dataset, order, size, workers, pin_memory):
    """(text, image) of each micro-batch. A sample depends on its key alone, so where a worker is killed, new ones go on
    at the micro-batch that is missing; another picture takes the place of the one that it was reading.

    Raises SamplesLost where workers go on being killed, or no picture can be read any more.
    """
    done = killed = 0
    while True:
        loader = DataLoader(
            dataset,
            batch_sampler=MicroBatches(order, size, done),
            num_workers=workers,
            worker_init_fn=leave_interrupts_to_the_parent,
            pin_memory=pin_memory,
        )
        try:
            for micro_batch in loader:
                done += 1
                with interrupts.children_held():
                    yield micro_batch
            return
        except (RuntimeError, ConnectionError) as error:
            said, names = of_killed_worker(error, dataset)
        except (ValueError, OSError) as error:
            raise SamplesLost(without_traceback(error)) from None
        killed += 1
        if killed > RESTARTS:
            raise SamplesLost(said + MEMORY)
        LOG.warning("%s; %snew workers go on", said, "another picture takes its place, and " if names else "")


def of_killed_worker(error, dataset):
    """What torch's error says of a worker that was killed, with what it was reading; and the names of that, a list."""
    if isinstance(error, ConnectionError):  # the end of its pipe was seen before torch heard of its end
        try:
            time.sleep(HEARD)
        except RuntimeError as heard:
            error = heard
        else:
            return "DataLoader worker has ended", []
    said = str(error).splitlines()[0].rstrip(". ")
    if not said.startswith("DataLoader worker"):
        raise error
    names = dataset.blame(said)
    return f"{said}, reading {' and '.join(names)}" if names else said, names


def without_traceback(error):
    """What an exception says; for one out of a worker, which says its whole traceback, the last line."""
    said = str(error).strip()
    return said.splitlines()[-1].partition(": ")[2] if "in DataLoader worker process" in said else said
