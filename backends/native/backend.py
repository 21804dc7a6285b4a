"""CPUs and CUDA GPUs, through PyTorch: one, or one a process of torchrun's; replicas are further micro-batches.

The step is trainer.py's, drawing sampler.py's, pixels and codes vqgan.py's, reading samples
resilient_loader.py's. Features newer than torch 2.0 live in these only, each behind a check.
"""

import contextlib
import itertools
import logging
import os

import torch

from backends.native.processes import Processes, share
from backends.native.resilient_loader import read
from backends.native.sampler import sampler
from backends.native.trainer import NativeTrainer, mean_losses
from backends.native.vqgan import decoder, encoder
from utils import interrupts

LOG = logging.getLogger("minidalle")
IPU_ONLY = (
    ("device_iterations", 1),
    ("stochastic_rounding", False),
    ("enable_half_partials", False),
    ("enable_rts", False),
    ("optimizer_state_offchip", False),
    ("embedding_serialization_factor", 1),
    ("ipus_per_replica", 1),
    ("layers_per_ipu", None),
    ("cls_ipu_id", None),
    ("embedding_ipu_id", 0),
    ("matmul_proportion", [0.6]),
    ("async_dataloader", True),
    ("compile_only", False),
    ("executable_cache_dir", None),
    ("profile_dir", None),
    ("loss_scaling", 1),
    ("enable_als", False),
    ("enable_half_first_order_momentum", False),
)


def has_cuda():
    return torch.cuda.is_available()


def pick_device(name):
    """auto | cpu | cuda → torch.device. ValueError where CUDA is asked for and absent."""
    if name == "cuda" and not has_cuda():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and has_cuda() else "cpu")


def own_gpu(local_rank):
    """The GPU of one process among several on this machine, which then is the default one of all that torch does."""
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank + 1} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
            "start as many with --nproc-per-node, or give --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def fast_in_bf16(device):
    """Whether bf16 matrix products beat fp32 ones: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch 2.0 has neither: fp32 then
    return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))


def pick_precision(settings, device):
    """--precision, else what --fp16 means here (bf16, or fp32 when off), else the best → fp32 | bf16 | fp16."""
    wanted = settings.precision
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16: CPUs have no fast fp16; use bf16 or fp32")
    if wanted != "auto":
        return wanted
    # --fp16, as the IPU configurations have it, asks for half precision where that is worth it: a CPU without bf16
    # arithmetic takes thirty times as long in bf16 as in fp32.
    half = getattr(settings, "fp16", None) is not False and fast_in_bf16(device)
    return "bf16" if half else "fp32"


class NativeBackend:
    compile_only = False

    def __init__(self, settings):
        """settings: train.py's or generate.py's namespace."""
        self.settings = settings
        self.processes = Processes()
        self.rank, self.world_size = self.processes.rank, self.processes.size
        self.device = pick_device(settings.device)
        if self.device.type == "cuda" and self.world_size > 1:
            self.device = own_gpu(self.processes.local_rank)
        self.precision = pick_precision(settings, self.device)
        self.shard = getattr(settings, "shard", False)
        if self.shard:
            from backends.native import sharding

            sharding.check(self.world_size, self.precision)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self.batch_size, self.micro_batches = settings.batch_size, 1
        if hasattr(settings, "gradient_accumulation"):
            together = settings.gradient_accumulation * settings.replication_factor
            self.batch_size, self.micro_batches = share(settings.batch_size, together, self.world_size)
            self.processes.connect(self.device)
        self.samples_per_step = self.batch_size * self.micro_batches
        if self.rank:
            return
        among = f", in {self.world_size} processes" if self.world_size > 1 else ""
        among += " that share the model out" if self.shard else ""
        LOG.info("running on %s in %s%s", self.device, self.precision, among)
        unused = [name for name, default in IPU_ONLY if getattr(settings, name, default) != default]
        if unused:
            flags = ", ".join("--" + name.replace("_", "-") for name in unused)
            LOG.info("for IPUs only, without effect here: %s", flags)

    def autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def loader(self, dataset, order):
        """Batches for step(): iterators over (text, image) micro-batches, read when the step wants them."""
        workers = min(self.settings.dataloader_workers, os.cpu_count() or 1)  # more would be in their own way
        micro_batches = read(dataset, order, self.batch_size, workers, self.device.type == "cuda")
        stream = self.interruptible(micro_batches)
        for first in stream:
            yield itertools.chain([first], itertools.islice(stream, self.micro_batches - 1))

    def interruptible(self, micro_batches):
        """A process alone gives a step up where a signal waits; several finish it, then agree."""
        for micro_batch in micro_batches:
            if self.world_size == 1:
                interrupts.check()
            yield micro_batch

    def agreed(self, wish):
        return wish if self.world_size == 1 else self.processes.mean(torch.tensor(float(wish), device=self.device)) > 0

    def gather(self, rows):
        self.processes.connect(torch.device("cpu"))
        with self.processes.together():
            return self.processes.gather(rows)

    def trainer(self, model):
        if self.shard:
            from backends.native.sharding import ShardedTrainer

            return ShardedTrainer(model, self)
        return NativeTrainer(model, self)

    def evaluator(self, model):
        model = model.to(self.device).eval()
        return lambda batches: mean_losses(model, batches, self)

    def encode(self, vae):
        return encoder(vae, self)

    def decode(self, vae):
        return decoder(vae, self)

    def making_codes(self):
        return contextlib.nullcontext()

    def sampler(self, model):
        return sampler(model, self)
