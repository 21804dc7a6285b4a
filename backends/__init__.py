"""Choose where a model runs: base.py is the contract; native/ serves CPUs and GPUs, ipu/ Graphcore IPUs."""

import os
from argparse import Namespace

from backends.base import Backend, TrainingBackend
from backends.ipu import backend as ipu_backend
from backends.native import backend as native_backend


def for_training(settings: Namespace) -> TrainingBackend:
    """Return the backend that trains with train.py's settings.

    Raises:
        ValueError: this machine lacks the device, or the device cannot run these settings; one line.
    """
    trainable = settings.optimizer in ipu_backend.OPTIMIZERS
    if not _runs_on_ipu(settings.device, trainable):
        return native_backend.NativeTrainingBackend(settings)
    if settings.shard:
        raise ValueError("--shard: for CPUs and GPUs only; on IPUs, --enable-rts shards the optimizer's state")
    return ipu_backend.IpuTrainingBackend(settings)


def for_inference(device: str = "auto", precision: str = "auto") -> Backend:
    """Return the backend that samples and evaluates.

    Args:
        device: auto, cpu, cuda or ipu.
        precision: auto, fp32, bf16 or fp16.

    Raises:
        ValueError: this machine lacks the device, or the device lacks the precision; one line.
    """
    backend = ipu_backend.IpuBackend if _runs_on_ipu(device) else native_backend.NativeBackend
    return backend(device, precision)


def _runs_on_ipu(device: str, trainable: bool = True) -> bool:
    """Return whether to use an IPU: if asked for, or if the Poplar SDK is enabled and there is no GPU."""
    if device == "auto" and trainable and os.environ.get("POPLAR_SDK_ENABLED") and not native_backend.has_cuda():
        return ipu_backend.is_enabled()
    return device == "ipu"
