"""Choose the machine that runs a model: base.py is the contract; native/ serves CPUs and GPUs, ipu/ Graphcore IPUs."""

import contextlib
import os
from argparse import Namespace
from typing import Iterator, Optional

import torch

from backends.base import Backend, TrainingBackend
from backends.native import backend as native_backend


def for_training(settings: Namespace) -> TrainingBackend:
    """Return the backend that trains with train.py's settings.

    Raises:
        ValueError: this machine lacks the device, or the device cannot run these settings; one line.
    """
    if not _may_use_ipu(settings.device):
        return native_backend.NativeTrainingBackend(settings)
    from backends.ipu import backend as ipu_backend

    if settings.device == "auto" and not (settings.optimizer in ipu_backend.OPTIMIZERS and ipu_backend.is_enabled()):
        return native_backend.NativeTrainingBackend(settings)
    if settings.shard:
        raise ValueError("--shard: for CPUs and GPUs only; on IPUs, --enable-rts shards the optimizer's state")
    return ipu_backend.IpuTrainingBackend(settings)


def for_inference(device: str = "auto", precision: str = "auto", executable_cache_dir: Optional[str] = None) -> Backend:
    """Return the backend that samples and evaluates.

    Args:
        device: auto, cpu, cuda or ipu.
        precision: auto, fp32, bf16 or fp16.
        executable_cache_dir: folder for programs compiled for IPUs.

    Raises:
        ValueError: this machine lacks the device, or the device lacks the precision; one line.
    """
    if _may_use_ipu(device):
        from backends.ipu import backend as ipu_backend

        if device == "ipu" or ipu_backend.is_enabled():
            return ipu_backend.IpuBackend(precision, executable_cache_dir)
    return native_backend.NativeBackend(device, precision)


def _may_use_ipu(device: str) -> bool:
    """Return whether to ask for an IPU: if the user does, or if the Poplar SDK is enabled and there is no GPU."""
    wanted = device == "auto" and bool(os.environ.get("POPLAR_SDK_ENABLED"))
    return device == "ipu" or (wanted and not native_backend.has_cuda())


class OutOfMemory(ValueError):
    """Memory ran out; the message is one line that says what needs less."""


@contextlib.contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Raise OutOfMemory in place of the errors of torch and Python for memory that ran out.

    Args:
        advice: what needs less memory, the rest of a sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        # torch 2.0 has no type for the CPU's.
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and "can't allocate memory" not in reason:
            raise
        raise OutOfMemory(f"out of memory: {advice}") from None
