"""Measure memory in bytes: the GPU's if this process computes on one, otherwise the machine's."""

import os
import sys
from typing import Optional

import torch


class Memory:
    """The memory of a torch device as this process sees it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def forget_peak(self) -> None:
        """Start a new measurement of `peak`; has no effect on systems other than Linux."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:  # not Linux, or not permitted
            pass

    def peak(self) -> int:
        """Return the most memory that this process has used since `forget_peak`."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        measured = _read_status("VmHWM")
        if measured is not None:
            return measured
        try:
            import resource  # POSIX only
        except ImportError:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def in_use(self) -> int:
        """Return the memory that this process uses now."""
        if self.on_gpu:
            return torch.cuda.memory_allocated(self.device)
        measured = _read_status("VmRSS")
        return self.peak() if measured is None else measured

    def total(self) -> int:
        """Return the most that this process can have: the GPU's memory, or the machine's within a container's limit."""
        if self.on_gpu:
            return torch.cuda.mem_get_info(self.device)[1]
        limits = [_of_machine("SC_PHYS_PAGES")]
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                with open(path) as file:
                    limits.append(int(file.read()))
            except (OSError, ValueError):  # no such file, or "max"
                pass
        return min(limits)

    def free(self) -> int:
        """Return the memory that this process can still allocate."""
        if self.on_gpu:
            return torch.cuda.mem_get_info(self.device)[0]
        measured = _read_status("MemAvailable", "/proc/meminfo")
        return min(self.total(), _of_machine("SC_AVPHYS_PAGES") if measured is None else measured)


def _of_machine(pages: str) -> int:
    """Return an amount that the system counts in pages, in bytes; 4 GiB on systems that do not say."""
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _read_status(name: str, path: str = "/proc/self/status") -> Optional[int]:
    """Return the bytes of a line `name: number kB`, or None without such a line."""
    try:
        with open(path) as file:
            found = [line.split()[1] for line in file if line.startswith(f"{name}:")]
    except OSError:
        return None
    return int(found[0]) * 1024 if found else None
