"""PopTorch's errors, and the machine's IPUs. The errors derive from Exception: `except RuntimeError` misses them.

An executor holds its own from compile() or attachToDevice() on, until it gives them up: by
detachFromDevice() or destroy(), or when it is deleted.
"""

import os
import weakref


class Error(Exception):
    """An error of PopTorch or of a library below it."""

    def __init__(self, message):
        super().__init__(f"'poptorch_py_error': {message}")


class RecoverableError(Error):
    """A failure of the device after which resetting it helps."""


class Machine:
    def __init__(self, ipus):
        self.ipus = ipus
        self.holders = weakref.WeakKeyDictionary()  # {executor: number of its IPUs}
        self.compiled, self.calls = [], []  # the classes of the models that were compiled and called, in order
        self.fails_after = None  # number of calls after which whatever needs a device fails; None is never

    def exchange(self):
        if self.fails_after is not None and len(self.calls) >= self.fails_after:
            raise RecoverableError("Application exception: all tiles stopped\nmore lines")

    def acquire(self, executor, count):
        free = self.ipus - sum(self.holders.values())
        if count > free:
            raise Error(f"Failed to acquire {count} IPU(s): {free} of {self.ipus} are free")
        self.holders[executor] = count

    def give_up(self, executor):
        self.holders.pop(executor, None)


MACHINE = Machine(4)


def count_ipus(used, options):
    """Return the number of IPUs that an executor acquires for blocks on `used` of them.

    PopRun gives each instance IPUs of its own, which popdist's options name: an executor acquires all of them.
    """
    if "POPDIST_NUM_TOTAL_REPLICAS" in os.environ:
        if options._partition is None:
            raise Error("Failed to acquire IPU(s): they belong to another instance; use popdist.poptorch.Options")
        if used > options._partition:
            raise Error(f"{used} IPUs for a replica that has {options._partition}")
        return options._partition * options.replication_factor
    rounded = 1 << (used - 1).bit_length()
    if rounded != used and not options._values.get("autoRoundNumIPUs"):
        raise Error(f"{used} IPUs: the number of IPUs must be a power of two; see autoRoundNumIPUs")
    return rounded * options.replication_factor
