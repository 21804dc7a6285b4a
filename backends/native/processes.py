"""The processes that torchrun started, of which this is one: who is who, means over all, and a word where one is gone.

How gradients are exchanged is DistributedDataParallel's business, used in trainer.py. PopRun's instances are
ipu.py's.
"""

import atexit
import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(days=7)  # for pictures that take hours to encode
SIGNS_OF_LOSS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore", "c10d")


class Processes:
    """rank of size processes; local_rank among those of this machine. Alone where torchrun did not start it."""

    def __init__(self):
        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )

    def connect(self, device):
        """Meet the others; ValueError where they cannot be reached."""
        if self.size == 1 or dist.is_initialized():
            return
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            atexit.register(leave)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"WORLD_SIZE is {self.size}, but the other processes cannot be reached: {reason}"
            ) from None

    def mean(self, tensor):
        """The mean of a tensor over all processes, on the CPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor = tensor / self.size
        return tensor.cpu()

    def gather(self, rows):
        """Tensors (n, …), n each process's own → (sum of all n, …), rank 0's first, in every process."""
        counts = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])

    @contextlib.contextmanager
    def together(self):
        """Within: a ConnectionError in one line where another process of the run has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(sign in str(error) for sign in SIGNS_OF_LOSS):
                raise
            raise ConnectionError("another process of this run has ended") from error


def leave():
    """The group's threads abort a process that ends before them: one that frees the tensors of the last exchange asks
    for Python, which is gone. Nothing tells when they are done; it is a matter of microseconds.
    """
    dist.destroy_process_group()
    time.sleep(0.2)


def share(batch_size, micro_batches, size):
    """(micro-batch, micro-batches) of each of `size` processes, which take as many samples a step together as one.

    ValueError where they cannot share evenly.
    """
    each, left = divmod(batch_size * micro_batches, size)
    if left:
        raise ValueError(
            f"one step takes {batch_size * micro_batches} samples (--batch-size × --gradient-accumulation × "
            f"--replication-factor), which {size} processes cannot share evenly; a multiple of {size} would do"
        )
    largest = max(rows for rows in range(1, batch_size + 1) if each % rows == 0)
    return largest, each // largest
