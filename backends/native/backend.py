"""Run on a CPU or a CUDA GPU through PyTorch: one process, or several that torchrun started.

Replicas are further micro-batches here. Features newer than torch 2.0 are used in this folder only, behind a check.
"""

import atexit
import contextlib
import datetime
import gc
import itertools
import logging
import os
import warnings
from argparse import Namespace
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from backends.base import Backend, LossValues, StageEstimate, Trainer, TrainingBackend
from backends.native.gpu_attention import use_cudnn_attention, use_fused_attention
from backends.native.inference import NativeSampler, decoder, encoder, free_memory, images_at_once
from backends.native.trainer import NativeTrainer, mean_losses
from data.loader import SetOnDevice, read_in_workers
from models.dalle import DALLE
from models.vae import ImageTokenizer
from utils.errors import ran_out_of_memory
from utils.files import raise_if_pending

logger = logging.getLogger("minidalle")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT = datetime.timedelta(days=7)  # rank 0 may encode images for hours while the others wait
SIGNS_OF_LOST_CONNECTION = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore", "c10d")


class NativeBackend(Backend):
    """A CPU or a GPU that samples and evaluates."""

    can_gather = True

    def __init__(
        self, device: str = "auto", precision: str = "auto", fp16: Optional[bool] = None, loss_scaling: bool = True
    ):
        """Choose device and precision; see pick_precision for `fp16` and `loss_scaling`."""
        self.processes = Processes()
        self.rank, self.world_size = self.processes.rank, self.processes.size
        self.device = pick_device(device)
        self.kind = self.device.type
        if self.kind == "cuda":
            if self.world_size > 1:
                self.device = claim_gpu(self.processes.local_rank)
            # cuDNN takes about 30 ms to plan attention for a new shape. Generation meets many, so it is off until the
            # training backend, whose shapes stay the same, turns it on.
            if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
                torch.backends.cuda.enable_cudnn_sdp(False)
        self.precision = pick_precision(precision, self.device, fp16, loss_scaling)
        self.dtype = DTYPES[self.precision]
        if not self.rank:
            logger.info("running on %s in %s%s", self.kind, self.precision, self.describe_processes())

    def describe_processes(self) -> str:
        """Return how many processes there are, for the log; nothing for one."""
        return f", in {self.world_size} processes" if self.world_size > 1 else ""

    def autocast(self) -> ContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.kind, self.dtype)

    def gather(self, rows: Tensor) -> Tensor:
        self.processes.connect(torch.device("cpu"))
        with self.processes.explain_lost_connection():
            return self.processes.gather(rows)

    def encode(self, vae: ImageTokenizer) -> Callable[[Tensor], Tensor]:
        return encoder(vae, self.device)

    def decode(self, vae: ImageTokenizer) -> Callable[..., Tensor]:
        return decoder(vae, self.device, self.precision)

    def images_at_once(self, model: DALLE) -> int:
        return images_at_once(model, self.device)

    def sampler(self, model: DALLE, batch_size: int, window: Optional[int] = None) -> Callable[..., Tensor]:
        return NativeSampler(self.place(model), self, window)

    def evaluator(self, model: DALLE) -> Callable[[Iterable[Tuple[Tensor, Tensor]]], LossValues]:
        model = self.place(model).eval()
        return lambda batches: mean_losses(model, batches, self)

    def place(self, model: DALLE) -> DALLE:
        """Move a model to the device and set how it attends there."""
        model = model.to(self.device)
        if self.kind == "cuda":
            use_fused_attention(model, self.dtype)
        return model


class NativeTrainingBackend(NativeBackend, TrainingBackend):
    """A CPU or a GPU that trains."""

    compile_only = False

    def __init__(self, settings: Namespace):
        self.sets: Dict[Any, SetOnDevice] = {}
        self.settings, self.shard = settings, settings.shard
        super().__init__(settings.device, settings.precision, settings.fp16, loss_scaling=not self.shard)
        if self.kind == "cuda":
            use_cudnn_attention(self.device, self.dtype)
        if self.shard:
            from backends.native import sharding

            sharding.check(self.world_size, self.precision)
        together = settings.gradient_accumulation * settings.replication_factor
        self.batch_size, self.micro_batches = split_step(settings.batch_size, together, self.world_size)
        self.samples_per_step = self.batch_size * self.micro_batches
        self.processes.connect(self.device)

    def describe_processes(self) -> str:
        """Return how many processes there are and whether they share the model, for the log."""
        return super().describe_processes() + (" that shard the model" if self.shard else "")

    def any_process(self, wish: bool) -> bool:
        if self.world_size == 1:
            return wish
        return bool(self.processes.mean(torch.tensor(float(wish), device=self.device)) > 0)

    def evaluation_samples(self, count: int) -> int:
        return self.samples_per_step  # evaluation takes the same time per sample

    def loader(self, dataset: Any, order: Sequence[List[Any]], samples: Optional[int] = None) -> Iterator[Iterable]:
        """Yield for each step an iterator over its (text, image) micro-batches, which are read on demand.

        Of a set that is on the GPU, a step's samples are one micro-batch.
        """
        if self.kind == "cuda":
            if dataset not in self.sets:
                self.sets[dataset] = SetOnDevice(dataset, self.device, free_memory(self.device))
            if self.sets[dataset].fits:
                some = filter(None, order)  # the last batch of validation may have none for this process
                yield from ([step] for step in self._interruptible(map(self.sets[dataset].gather, some)))
                return
        workers = min(self.settings.dataloader_workers, os.cpu_count() or 1)  # more would compete for cores
        stream = self._interruptible(read_in_workers(dataset, order, self.batch_size, workers, self.kind == "cuda"))
        for first in stream:
            yield itertools.chain([first], itertools.islice(stream, self.micro_batches - 1))

    def _interruptible(self, micro_batches: Iterable) -> Iterator:
        """Yield micro-batches; a single process abandons its step on a signal, several finish it and then agree."""
        for micro_batch in micro_batches:
            if self.world_size == 1:
                raise_if_pending()
            yield micro_batch

    def trainer(self, model: DALLE) -> Trainer:
        if self.shard:
            from backends.native.sharding import ShardedTrainer

            return ShardedTrainer(model, self)
        return NativeTrainer(model, self)

    def stage_estimates(self) -> List[StageEstimate]:
        return []  # there is no pipeline


def for_training(settings: Namespace) -> TrainingBackend:
    """Return the backend that trains with train.py's settings.

    Raises:
        ValueError: this machine lacks the device, or the device cannot run these settings; one line.
    """
    if not may_use_ipu(settings.device):
        return NativeTrainingBackend(settings)
    from backends.ipu import backend as ipu

    if settings.device == "auto" and not (settings.optimizer in ipu.OPTIMIZERS and ipu.is_enabled()):
        return NativeTrainingBackend(settings)
    if settings.shard:
        raise ValueError("--shard: for CPUs and GPUs only; on IPUs, --enable-rts shards the optimizer's state")
    return ipu.IpuTrainingBackend(settings)


def for_inference(device: str = "auto", precision: str = "auto", executable_cache_dir: Optional[str] = None) -> Backend:
    """Return the backend that samples and evaluates; ValueError if this machine lacks the device or its precision.

    Args:
        executable_cache_dir: folder for programs compiled for IPUs.
    """
    if may_use_ipu(device):
        from backends.ipu import backend as ipu

        if device == "ipu" or ipu.is_enabled():
            return ipu.IpuBackend(precision, executable_cache_dir)
    return NativeBackend(device, precision)


def may_use_ipu(device: str) -> bool:
    """Return whether to ask for an IPU: if the user does, or if the Poplar SDK is enabled and there is no GPU."""
    return device == "ipu" or (device == "auto" and bool(os.environ.get("POPLAR_SDK_ENABLED")) and not has_cuda())


def has_cuda() -> bool:
    """Return whether PyTorch sees a CUDA GPU; if its driver is too old or does not answer, log that in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    for warning in caught:  # torch gives it once, with several lines of advice
        reason = " ".join(str(warning.message).split()).partition(". ")[0]
        logger.warning("the GPU cannot be used: %s", reason)
    return found


def pick_device(name: str) -> torch.device:
    """Return the device for auto, cpu or cuda.

    Raises:
        ValueError: CUDA is asked for but missing.
    """
    if name == "cuda" and not has_cuda():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and has_cuda() else "cpu")


def claim_gpu(local_rank: int) -> torch.device:
    """Return the GPU of this process among several on this machine, and make it torch's default GPU.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if local_rank >= count:
        processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 0)), local_rank + 1)
        raise ValueError(f"{processes} processes but only {count} GPUs: use --nproc-per-node {count}, or --device cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def fast_in_bf16(device: torch.device) -> bool:
    """Return whether bf16 matrix products beat fp32 ones: on GPUs from Ampere on, on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() counts older GPUs, which emulate it
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # missing in torch 2.0, which then uses fp32
    return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))


def fast_in_fp16(device: torch.device) -> bool:
    """Return whether fp16 matrix products beat fp32 ones: on GPUs from Volta on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def pick_precision(wanted: str, device: torch.device, fp16: Optional[bool] = None, loss_scaling: bool = True) -> str:
    """Return fp32, bf16 or fp16: as wanted; for auto, bf16 or else fp16 if it is fast here, unless --fp16 is off.

    Args:
        fp16: train.py's flag of this name.
        loss_scaling: whether the loss can be scaled, without which nothing trains in fp16.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16: CPUs have no fast fp16; use bf16 or fp32")
    if wanted != "auto":
        return wanted
    # IPU configurations set --fp16, which asks for half precision only if it pays: a CPU without bf16 arithmetic is
    # thirty times slower in bf16 than in fp32.
    if fp16 is False:
        return "fp32"
    return "bf16" if fast_in_bf16(device) else "fp16" if loss_scaling and fast_in_fp16(device) else "fp32"


class Processes:
    """The processes that torchrun started, of which this is number `rank`; a single one without torchrun."""

    def __init__(self) -> None:
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        self.rank, self.size, self.local_rank = (int(os.environ.get(name, default)) for name, default in names)

    def connect(self, device: torch.device) -> None:
        """Join the process group, once.

        Raises:
            ValueError: the other processes cannot be reached.
        """
        if self.size == 1 or dist.is_initialized():
            return
        # Ten functions of this module have the process group as a default argument. If DistributedDataParallel
        # imported it later, they would keep the group alive, and with it threads that leave_group() has to end.
        import torch.distributed.nn  # noqa: F401

        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"WORLD_SIZE is {self.size}, but the other processes cannot be reached: {reason}"
            ) from None
        atexit.register(leave_group)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes, on the CPU; `tensor` itself becomes their sum."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor = tensor / self.size
        return tensor.cpu()

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows (n, …) of all processes, rank 0's first; n may differ between processes."""
        counts = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])

    @contextlib.contextmanager
    def explain_lost_connection(self) -> Iterator[None]:
        """Raise a ConnectionError of one line if another process of the run has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(sign in str(error) for sign in SIGNS_OF_LOST_CONNECTION):
                raise
            raise ConnectionError("another process of this run has ended") from error


def leave_group() -> None:
    """Destroy the process group and join its threads, which end when nothing refers to the group any more.

    A thread that outlived the interpreter would abort the process when it releases the tensors of the last exchange.
    There is no barrier: the other processes must notice when one ends early.
    """
    gc.collect()  # trainers and their DistributedDataParallel, which lie in cycles
    if dist.is_initialized():
        dist.destroy_process_group()


def split_step(batch_size: int, micro_batches: int, size: int) -> Tuple[int, int]:
    """Return (micro-batch, micro-batches) of each of `size` processes, which together take one process's samples.

    Raises:
        ValueError: the samples cannot be divided evenly.
    """
    each, left = divmod(batch_size * micro_batches, size)
    if left:
        raise ValueError(
            f"one step takes {batch_size * micro_batches} samples (--batch-size × --gradient-accumulation × "
            f"--replication-factor), not a multiple of the {size} processes"
        )
    largest = max(rows for rows in range(1, batch_size + 1) if each % rows == 0)
    return largest, each // largest


class OutOfMemory(ValueError):
    """Memory ran out; the message is one line that says what needs less."""


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raise OutOfMemory in place of the errors of torch and Python for memory that ran out.

    Args:
        advice: what needs less memory, the rest of a sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory: {advice}") from None
