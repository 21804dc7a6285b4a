"""Train on CPUs and CUDA GPUs: a step loops over micro-batches, exchanges gradients once and updates the weights."""

import contextlib
import copy
import ctypes
import itertools
import logging
import math
import sys
from argparse import Namespace
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
)

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from backends.base import LossValues, Trainer
from backends.native.compilation import compile_model
from backends.native.fast_layers import use_fast_layers
from backends.native.inference import NativeSampler
from models.dalle import DALLE, Losses, parameter_groups
from utils.muon import Muon, orthogonal
from utils.optimization import convert_ipu_state, load_keeping_flags

if TYPE_CHECKING:
    from backends.native.backend import NativeBackend, NativeTrainingBackend

logger = logging.getLogger("minidalle")
LOSSES = ("total", "text", "image")
ADAM_EPS = 1e-6
WORKING_SET = 2800 * 512  # positions times width that a CPU computes at once
GPU_POSITIONS = 2**16  # that a GPU computes at once; more would not be faster
OPTIMIZER_BYTES = 16  # per weight: gradient, two moments, and what an update needs for a moment


class SharedMuon(Muon):
    """Muon for several processes: each orthogonalizes a share of the matrices, for all of them."""

    def orthogonal(self, momenta: List[Tensor]) -> Iterable[Tensor]:
        """Return the orthogonalized momenta, the same in every process."""
        share = -(-len(momenta) // dist.get_world_size())
        first = share * dist.get_rank()
        mine = [momenta[index % len(momenta)] for index in range(first, first + share)]  # equally many per process
        own = orthogonal(torch.stack(mine)).contiguous()
        whole = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(whole, own)
        return torch.cat(whole)[: len(momenta)]


class NativeTrainer(Trainer):
    """A model with its optimizers, and the average of its weights with --ema-decay."""

    muon: Type[Muon] = SharedMuon

    def __init__(self, model: DALLE, backend: "NativeTrainingBackend"):
        self.backend = backend
        self.decay = backend.settings.ema_decay
        self.average = self.place(copy_for_average(model)) if self.decay else None
        self.updates = 0
        self.max_samples = backend.batch_size  # that fit a GPU's memory in one pass; compile() measures it
        self.model = self.place(model).train()
        self.network: Any = self.model if backend.world_size == 1 else self.exchange_gradients()
        muon = Muon if backend.world_size == 1 else self.muon
        self.optimizers = build_optimizers(self.model, backend.settings, muon)
        if backend.kind == "cpu":
            keep_freed_memory()
        scaler = torch.amp.GradScaler if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler
        self.scaler = scaler(enabled=backend.precision == "fp16")

    def place(self, model: DALLE) -> DALLE:
        """Move a model to the device and give it fast layers."""
        model = self.backend.place(model)
        use_fast_layers(model, self.backend.device, self.backend.dtype, self.backend.settings.recompute)
        return model

    def exchange_gradients(self) -> Any:
        """Return the model as `step` calls it: backward exchanges gradients, except within its no_sync()."""
        on = [self.backend.device] if self.backend.kind == "cuda" else None
        # Masks are constants, and gloo of torch 2.0 sends no bool.
        buffers = [name for name, _ in self.model.named_buffers(remove_duplicate=False)]
        self.model._ddp_params_and_buffers_to_ignore = buffers  # type: ignore[assignment]
        return DistributedDataParallel(self.model, device_ids=on, gradient_as_bucket_view=True)

    def compile(self, batch: Any) -> None:
        """Compile layers and losses on GPUs; elsewhere kernels are chosen when they are called."""
        if self.backend.kind == "cuda":
            settings = self.backend.settings
            if not settings.no_codes_cache:  # the VQGAN would need memory, too
                self.max_samples = max(self.max_samples, self.measure_max_samples())
            models = [self.model] if self.average is None else [self.model, self.average]
            compile_model(models, lambda: self.try_out(self.samples_at_once()), settings.recompute)
            self.model.zero_grad(set_to_none=True)

    def try_out(self, samples: int, exchange: bool = False) -> None:
        """Make a forward and a backward pass over empty samples, with or without exchange of gradients."""
        sizes, device = (self.model.text_seq_len, self.model.image_seq_len), self.backend.device
        text, codes = (torch.zeros(samples, size, dtype=torch.long, device=device) for size in sizes)
        own = [device] if device.type == "cuda" else []  # by default, fork_rng starts a context on every GPU
        with torch.random.fork_rng(own), contextlib.nullcontext() if exchange else self.without_exchange():
            forward_batch(self.network, text, codes, self.backend).total.backward()

    def measure_max_samples(self) -> int:
        """Return how many samples fit the GPU's free memory in one pass, by the memory that one or two take."""
        device, most = self.backend.device, self.backend.samples_per_step
        weights = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        taken = 0
        try:
            for samples in (1, min(2, most)):  # the first also allocates gradients and workspaces
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                self.try_out(samples)
                taken = (torch.cuda.max_memory_allocated(device) - before) // samples
        except torch.cuda.OutOfMemoryError:
            return 0
        finally:
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] - OPTIMIZER_BYTES * weights
        positions = self.model.text_seq_len + self.model.image_seq_len
        return min(int(0.8 * free / max(taken, 1)), GPU_POSITIONS // positions)

    def samples_at_once(self) -> int:
        """Return how many samples of a step to compute in one pass: as many as fit, in equal parts."""
        whole = self.backend.samples_per_step
        if self.backend.kind == "cpu":
            return samples_at_once_on_cpu(self.model, whole)
        least = -(-whole // -(-whole // max(1, self.max_samples)))  # in as few parts as possible
        even = max(samples for samples in range(1, least + 1) if whole % samples == 0)
        return even if 2 * even > least else least

    def step(self, batch: Iterable) -> LossValues:
        """Make one update and return the losses and `grad_norm`; if that is not finite, the update was skipped."""
        read: List[Tuple[Tensor, Tensor]] = []
        stream = iter(batch)
        with self.backend.processes.explain_lost_connection():
            try:
                sums = self.backpropagate(remember(stream, read))
            except torch.cuda.OutOfMemoryError:
                if self.max_samples <= self.backend.batch_size or self.backend.world_size > 1:
                    raise
                self.max_samples = self.backend.batch_size
                sums = None
            if sums is None:  # outside of the handler, which keeps the failed pass in memory
                logger.warning("out of memory; continuing with %d samples at once", self.max_samples)
                self.model.zero_grad(set_to_none=True)
                sums = self.backpropagate(itertools.chain(read, stream))
            return self.update(sums)

    def backpropagate(self, batch: Iterable) -> Tensor:
        """Accumulate the gradients of all micro-batches and return their mean losses (3,), on the device."""
        sums = torch.zeros(3, device=self.backend.device)
        whole, left = self.backend.samples_per_step, self.backend.samples_per_step
        for text, image in self.regroup(batch):
            share, left = len(text) / whole, left - len(text)
            # Gradients are exchanged once per update.
            with contextlib.nullcontext() if left == 0 else self.without_exchange():
                losses = forward_batch(self.network, text, image, self.backend)
                self.scaler.scale(losses.total * share).backward()
            sums += torch.stack(losses).detach().float() * share
        return sums

    def without_exchange(self) -> ContextManager[Any]:
        """Return a context whose backward passes leave gradients in this process."""
        return contextlib.nullcontext() if self.network is self.model else self.network.no_sync()

    def regroup(self, batches: Iterable) -> Iterable[Tuple[Tensor, Tensor]]:
        """Cut and join micro-batches into parts of as many samples as are best computed at once, on the device."""
        size, device = self.samples_at_once(), self.backend.device
        waiting: List[Any] = []
        for pair in batches:
            waiting.append([part.to(device, non_blocking=True) for part in pair])
            while sum(len(text) for text, _ in waiting) >= size:
                text, image = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*waiting))
                yield text[:size], image[:size]
                waiting = [(text[size:], image[size:])] if len(text) > size else []
        if waiting:
            text, image = (torch.cat(parts) for parts in zip(*waiting))
            yield text, image

    def update(self, losses: Tensor) -> LossValues:
        """Update the weights, unless the gradient is not finite; return the losses by name, and the gradient's norm."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = clip_gradient(self.model.parameters(), self.backend.settings.max_grad_norm)
        # The host waits here, and nowhere else: all that it has to know is read at once. Processes agree on the norm.
        found = self.backend.processes.mean(torch.cat((losses, norm.to(losses)[None]))).tolist()
        if math.isfinite(found[-1]):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.updates += 1
            if self.average is not None:
                self.update_average(self.average)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return dict(zip((*LOSSES, "grad_norm"), found))

    @torch.no_grad()
    def update_average(self, average: DALLE) -> None:
        """Move the average towards the weights, faster at first, to forget its start."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(average.parameters(), self.model.parameters())
        averaged, current = zip(*(pair for pair in pairs if pair[1].requires_grad))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def evaluate(self, batches: Iterable) -> LossValues:
        """Return the mean losses of the average, or of the weights without --ema-decay."""
        network = self.model.eval() if self.average is None else self.average
        with self.backend.processes.explain_lost_connection():
            samples = self.regroup(micro_batch for batch in batches for micro_batch in batch)
            losses = mean_losses(network, samples, self.backend)
        self.model.train()
        return losses

    def sampler(self) -> Optional[Callable[..., Tensor]]:
        """Return a sampler of the average, or of the weights without --ema-decay."""
        model = self.model if self.average is None else self.average
        sample = NativeSampler(model, self.backend)
        self.model.train()  # NativeSampler set it to eval mode; sampling itself never applies dropout
        return sample

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def state_dict(self) -> Dict[str, Any]:
        """Return weights, optimizers' states, the number of updates, and the scaler and the average if any."""
        state = {
            "weights": self.model.state_dict(),
            "opt_state": [optimizer.state_dict() for optimizer in self.optimizers],
            "updates": self.updates,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            state["ema_weights"] = {
                name: tensor for name, tensor in self.average.state_dict().items() if not name.startswith("vae.")
            }
        return state

    def close(self) -> None:
        """Do nothing: the device is free when the process ends."""

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a state; without averaged weights in it, the average starts at the weights."""
        self.model.load_state_dict(state["weights"])
        if self.average is not None:
            self.average.load_state_dict({**state["weights"], **(state.get("ema_weights") or {})})
        self.updates = state.get("updates") or 0
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        opt_state = state.get("opt_state")
        if opt_state is None:
            return
        try:
            if len(opt_state) != len(self.optimizers):
                raise ValueError
            for optimizer, saved in zip(self.optimizers, opt_state):
                if saved.get("ipu_state"):
                    saved = convert_ipu_state(optimizer, self.model, saved["ipu_state"])
                if saved.keys() != optimizer.state_dict().keys() or not saved["state"]:
                    raise ValueError
                load_keeping_flags(optimizer, self.take_share(optimizer, saved))
        except (ValueError, LookupError, TypeError, AttributeError):
            logger.warning("the checkpoint's optimizer state belongs to another optimizer; it starts afresh")

    def take_share(self, optimizer: torch.optim.Optimizer, saved: Dict[str, Any]) -> Dict[str, Any]:
        """Return this process's share of an optimizer's saved state: all of it."""
        return saved


def forward_batch(network: Callable, text: Tensor, image: Tensor, backend: "NativeBackend") -> Losses:
    """Return the network's losses for text (B, T) and codes (B, L) or pixels, in the backend's precision."""
    text = text.to(backend.device, non_blocking=True)
    image = image.to(backend.device, non_blocking=True)
    with backend.autocast():
        return network(text, image, return_loss=True)


@torch.no_grad()
def mean_losses(network: nn.Module, batches: Iterable, backend: "NativeBackend") -> LossValues:
    """Return the mean losses over the samples of (text, image) batches of any size, of all processes."""
    sums = torch.zeros(4, device=backend.device)
    for text, image in batches:
        losses = torch.stack(forward_batch(network, text, image, backend)).float()
        sums += len(text) * torch.cat((losses, losses.new_ones(1)))
    sums = backend.processes.mean(sums)
    return dict(zip(LOSSES, (sums[:3] / sums[3]).tolist()))


def remember(stream: Iterable, read: List[Any]) -> Iterator[Any]:
    """Yield the items of a stream and add each to `read`."""
    for item in stream:
        read.append(item)
        yield item


def samples_at_once_on_cpu(model: DALLE, samples: int) -> int:
    """Return how many of `samples` to compute in one pass on a CPU.

    A few thousand positions are multiplied as fast as more, and take less memory.
    """
    fitting = WORKING_SET // ((model.text_seq_len + model.image_seq_len) * model.text_emb.weight.shape[1])
    pieces = -(-samples // max(1, fitting))
    return -(-samples // pieces)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system.

    The system clears every page that it hands out, which takes longer than computing a step's large tensors.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # glibc's numbers of these settings
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def copy_for_average(model: DALLE) -> DALLE:
    """Return a copy of a DALLE that shares its frozen VQGAN and needs no gradients."""
    return copy.deepcopy(model, {id(model.vae): model.vae}).requires_grad_(False).eval()


def clip_gradient(parameters: Iterable[nn.Parameter], limit: Optional[float]) -> Tensor:
    """Scale all gradients together down to a norm of at most `limit`, if any, and return the norm before that."""
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards together


def build_optimizers(model: DALLE, settings: Namespace, muon: Type[Muon] = Muon) -> List[torch.optim.Optimizer]:
    """Return Adam or AdamW for all parameters; or Muon for the layers' matrices and AdamW for the rest."""
    adam = {"betas": tuple(settings.adam_betas), "eps": ADAM_EPS, "lr": settings.learning_rate}
    groups = parameter_groups(model, settings.weight_decay)
    if settings.optimizer != "Muon":
        return [fused(getattr(torch.optim, settings.optimizer), groups, **adam)]
    in_layers = {id(parameter) for parameter in model.transformer.layers.parameters() if parameter.dim() == 2}
    matrices = [parameter for parameter in groups[0]["params"] if id(parameter) in in_layers]
    groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in in_layers]
    return [
        muon(matrices, settings.learning_rate, settings.weight_decay),
        fused(torch.optim.AdamW, groups, **adam),
    ]


def fused(optimizer: Callable, groups: Sequence[Dict[str, Any]], **flags: Any) -> torch.optim.Optimizer:
    """Return one of torch's optimizers, fused if possible: on GPUs, and on CPUs from torch 2.4 on."""
    try:
        return optimizer([dict(group) for group in groups], fused=True, **flags)  # it changes the groups it is given
    except RuntimeError:
        return optimizer(groups, **flags)
