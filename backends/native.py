"""CPUs and CUDA GPUs, through PyTorch: one, or one a process of torchrun's. Micro-batches loop inside the step, and
replicas are further micro-batches.

Features newer than torch 2.0 live here only, each behind a check.
"""

import contextlib
import itertools
import logging
import os
import signal

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from backends.processes import Processes, rank_zero_first, share
from models.decoder import Decoder
from models.sampling import draw_codes
from utils.muon import Muon
from utils.optimization import load_keeping_flags, parameter_groups

LOG = logging.getLogger("minidalle")
ADAM_EPS = 1e-6
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


def leave_interrupts_to_the_parent(worker):
    """For worker processes: Ctrl-C reaches them too, and the parent, which saves, is the one to end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class MicroBatches:
    """A batch sampler: each of order's lists of keys, cut into micro-batches of `size`."""

    def __init__(self, order, size):
        self.order, self.size = order, size

    def __iter__(self):
        for keys in self.order:
            for first in range(0, len(keys), self.size):
                yield keys[first : first + self.size]


class NativeBackend:
    compile_only = False

    def __init__(self, settings):
        """settings: train.py's or generate.py's namespace."""
        self.settings = settings
        self.processes = Processes()
        self.rank, self.world_size = self.processes.rank, self.processes.size
        self.device = pick_device(settings.device)
        if self.device.type == "cuda" and self.world_size > 1:
            self.device = torch.device("cuda", self.processes.local_rank)
        self.precision = pick_precision(settings, self.device)
        self.batch_size, self.micro_batches = settings.batch_size, 1
        if hasattr(settings, "gradient_accumulation"):
            together = settings.gradient_accumulation * settings.replication_factor
            self.batch_size, self.micro_batches = share(settings.batch_size, together, self.world_size)
            self.processes.connect(self.device)
        self.samples_per_step = self.batch_size * self.micro_batches
        if self.rank:
            return
        among = f", in {self.world_size} processes" if self.world_size > 1 else ""
        LOG.info("running on %s in %s%s", self.device, self.precision, among)
        unused = [name for name, default in IPU_ONLY if getattr(settings, name, default) != default]
        if unused:
            flags = ", ".join("--" + name.replace("_", "-") for name in unused)
            LOG.info("for IPUs only, without effect here: %s", flags)

    def autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def loader(self, dataset, order):
        """Batches for step(): iterators over (text, image) micro-batches, read when the step wants them."""
        workers = min(self.settings.dataloader_workers, os.cpu_count() or 1)  # more would be in their own way
        micro_batches = DataLoader(
            dataset,
            batch_sampler=MicroBatches(order, self.batch_size),
            num_workers=workers,
            worker_init_fn=leave_interrupts_to_the_parent,
            pin_memory=self.device.type == "cuda",
        )
        stream = iter(micro_batches)
        for first in stream:
            yield itertools.chain([first], itertools.islice(stream, self.micro_batches - 1))

    def trainer(self, model):
        return NativeTrainer(model, self)

    def encode(self, vae):
        vae = vae.to(self.device)
        return lambda pixels: vae.get_codebook_indices(pixels.to(self.device)).cpu()

    def decode(self, vae):
        vae = vae.to(self.device)
        return lambda codes: vae.decode(codes.to(self.device)).cpu()

    def rank_zero_first(self):
        return rank_zero_first(self.rank, self.processes.wait)

    def sampler(self, model):
        model = model.to(self.device).eval()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        cache_dtype = torch.float32 if self.device.type == "cpu" else dtype  # CPUs attend from bf16 five times slower
        decoder = Decoder(
            model, packer(self.device, dtype, self.settings.batch_size), dtype, cache_dtype, self.autocast
        )

        @torch.no_grad()
        def sample(text, *, generator=None, image_codes=None, **shaping):
            shaping = {"top_k": 0.99, "top_p": None, "temperature": 1.0, "cond_scale": 1.0, **shaping}
            given = {"generator": generator, "image_codes": image_codes}
            return draw_codes(model, text.to(self.device), decoder.logits, **shaping, **given).cpu()

        return sample


def packer(device, dtype, rows):
    """Decoder's pack for this machine: (weight (out, in), bias (out,) or None) → a function (B, in) → (B, out).

    oneDNN multiplies a few rows with weights in a layout of its own two to three times as fast as with plain ones.
    """

    def plain(weight, bias):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return lambda x: F.linear(x, weight, bias)

    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):  # what torch.compile uses, from torch 2.1 on
        reorder, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise

        def packed(weight, bias):
            weight, bias = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
            weight = reorder(weight, rows)
            return lambda x: multiply(x, weight, bias, "none", [], "")

        with contextlib.suppress(RuntimeError, TypeError):  # not every build has it for every dtype
            packed(torch.ones(8, 8), torch.ones(8))(torch.ones(2, 8, dtype=dtype))
            return packed
    return plain


class NativeTrainer:
    def __init__(self, model, backend):
        self.model = model.to(backend.device).train()
        self.backend = backend
        self.network = self.model
        if backend.world_size > 1:
            on = [backend.device] if backend.device.type == "cuda" else None
            # Masks are constants, and gloo of torch 2.0 sends no bool.
            self.model._ddp_params_and_buffers_to_ignore = [
                name for name, _ in model.named_buffers(remove_duplicate=False)
            ]
            self.network = DistributedDataParallel(self.model, device_ids=on, broadcast_buffers=False)
        self.optimizers = build_optimizers(model, backend.settings)
        scaler = torch.amp.GradScaler if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler
        self.scaler = scaler(enabled=backend.precision == "fp16")

    def compile(self, batch):
        """Nothing to do: kernels are chosen as they are called."""

    def step(self, batch):
        with self.backend.processes.together():
            losses = self.losses(batch, self.network, self.backward)
            self.update()
        return losses

    def backward(self, total):
        self.scaler.scale(total / self.backend.micro_batches).backward()

    @torch.no_grad()
    def evaluate(self, batch):
        self.model.eval()
        with self.backend.processes.together():
            losses = self.losses(batch, self.model, lambda total: None)
        self.model.train()
        return losses

    def losses(self, batch, network, then):
        """Means over the micro-batches of all processes; then(total loss) is called on each of this one."""
        sums = torch.zeros(3, device=self.backend.device)
        for number, (text, image) in enumerate(batch, start=1):
            text = text.to(self.backend.device, non_blocking=True)
            image = image.to(self.backend.device, non_blocking=True)
            last = number == self.backend.micro_batches or network is self.model
            with contextlib.nullcontext() if last else network.no_sync():  # gradients are exchanged once an update
                with self.backend.autocast():
                    losses = network(text, image, return_loss=True)
                then(losses.total)
            sums += torch.stack(losses).detach().float()
        sums = self.backend.processes.mean(sums)
        return dict(zip(("total", "text", "image"), (sums / self.backend.micro_batches).tolist()))

    def update(self):
        limit = self.backend.settings.max_grad_norm
        if limit is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def set_lr(self, lr):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def state_dict(self):
        opt_state = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"weights": self.model.state_dict(), "opt_state": opt_state}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["weights"])
        opt_state = state.get("opt_state")
        if opt_state is None:
            return
        try:
            if len(opt_state) != len(self.optimizers):
                raise ValueError
            for optimizer, saved in zip(self.optimizers, opt_state):
                if saved.keys() != optimizer.state_dict().keys():  # PopTorch's optimizers keep more
                    raise ValueError
                load_keeping_flags(optimizer, saved)
        except (ValueError, KeyError, TypeError, AttributeError):
            LOG.warning("the checkpoint's optimizer state belongs to another optimizer; it starts afresh")


def build_optimizers(model, settings):
    """Adam or AdamW over all parameters; or Muon over the layers' matrices and AdamW over the rest."""
    adam = {"betas": tuple(settings.adam_betas), "eps": ADAM_EPS, "lr": settings.learning_rate}
    groups = parameter_groups(model, settings.weight_decay)
    if settings.optimizer != "Muon":
        return [getattr(torch.optim, settings.optimizer)(groups, **adam)]
    in_layers = {id(parameter) for parameter in model.transformer.layers.parameters() if parameter.dim() == 2}
    matrices = [parameter for parameter in groups[0]["params"] if id(parameter) in in_layers]
    groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in in_layers]
    muon = Muon(matrices, settings.learning_rate, settings.weight_decay)
    return [muon, torch.optim.AdamW(groups, **adam)]
