"""Memory that this process takes and that there is: the GPU's where it trains on one, else the machine's. In bytes."""

import os
import resource
import sys

import torch


def forget_peak(device):
    """peak() counts from here. Where the system cannot do that, it stays the peak since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # not Linux, or not allowed
        pass


def peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    told = of_status("VmHWM")
    if told is None:
        told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return told


def in_use(device):
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    told = of_status("VmRSS")
    return peak(device) if told is None else told


def there_is(device):
    """What this process can have at most: the GPU's memory, or the machine's within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return min(limits)


def free(device):
    """What others leave, beside what this process has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = of_status("MemAvailable", "/proc/meminfo")
    return min(there_is(device), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if told is None else told)


def of_status(name, path="/proc/self/status"):
    """A line `name: number kB`, in bytes; None where there is none."""
    try:
        with open(path) as file:
            found = [line.split()[1] for line in file if line.startswith(f"{name}:")]
    except OSError:
        return None
    return int(found[0]) * 1024 if found else None
