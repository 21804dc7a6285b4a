"""Which picture each worker process is reading, so that it can be named when the process is killed over it."""

import os
import re
from typing import List

import torch
from torch.utils.data import get_worker_info

_SLOTS = 256  # workers of one DataLoader; more share slots, and the latest to begin is remembered


class Reading:
    """One place a worker in memory that outlives it. Make it before the workers are started."""

    def __init__(self) -> None:
        self._slots = torch.full((_SLOTS, 2), -1, dtype=torch.int64).share_memory_()  # process, index or -1

    def now(self, index: int) -> None:
        """Note what this worker reads from now on; -1: nothing. Outside of workers nothing is noted."""
        worker = get_worker_info()
        if worker is not None:
            self._slots[worker.id % _SLOTS] = torch.tensor([os.getpid(), index])

    def of_ended(self, said: str) -> List[int]:
        """What the workers were reading that torch's error names: "DataLoader worker (pid 12) is killed by …"."""
        named = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", said)
        processes = {int(number) for number in named[1].split(",")} if named else set()
        return [index for process, index in self._slots.tolist() if process in processes and index >= 0]
