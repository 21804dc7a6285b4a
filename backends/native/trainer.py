"""A training step on CPUs and CUDA GPUs: micro-batches loop inside it, gradients are exchanged once, optimizers update.

Which device and precision, and where batches come from, is native.py's. Features newer than torch 2.0 stand behind a
check.
"""

import contextlib
import copy
import logging
import math

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from backends.native.fast_layers import compile_layers, keep_freed_memory, rows_at_once, use_fast_layers
from backends.native.sampler import sampler
from utils.muon import Muon
from utils.optimization import load_keeping_flags, parameter_groups

LOG = logging.getLogger("minidalle")
ADAM_EPS = 1e-6


class SharedMuon(Muon):
    """Muon in every one of several processes: each makes its share of the matrices orthogonal, for all."""

    def orthogonal(self, momenta):
        share = -(-len(momenta) // dist.get_world_size())
        first = share * dist.get_rank()
        mine = [momenta[place % len(momenta)] for place in range(first, first + share)]  # as many in each
        made = super().orthogonal(mine).contiguous()
        whole = [torch.empty_like(made) for _ in range(dist.get_world_size())]
        dist.all_gather(whole, made)
        return torch.cat(whole)[: len(momenta)]


class NativeTrainer:
    muon = SharedMuon

    def __init__(self, model, backend):
        self.backend = backend
        self.decay = backend.settings.ema_decay
        self.average = self.placed(averaged(model)) if self.decay else None
        self.updates = 0
        self.model = self.placed(model).train()
        self.network = self.model if backend.world_size == 1 else self.exchanging()
        muon = Muon if backend.world_size == 1 else self.muon
        self.optimizers = build_optimizers(self.model, backend.settings, muon)
        if backend.device.type == "cpu":
            keep_freed_memory()
        scaler = torch.amp.GradScaler if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler
        self.scaler = scaler(enabled=backend.precision == "fp16")

    def placed(self, model):
        model = model.to(self.backend.device)
        use_fast_layers(model, self.backend.device, self.backend.dtype, self.backend.settings.recompute)
        return model

    def exchanging(self):
        """The model as step() calls it: gradients are exchanged with other processes, but within no_sync()."""
        on = [self.backend.device] if self.backend.device.type == "cuda" else None
        # Masks are constants, and gloo of torch 2.0 sends no bool.
        buffers = [name for name, _ in self.model.named_buffers(remove_duplicate=False)]
        self.model._ddp_params_and_buffers_to_ignore = buffers
        return DistributedDataParallel(self.model, device_ids=on)

    def compile(self, batch):
        """On GPUs, that of the layers; elsewhere kernels are chosen as they are called."""
        if self.backend.device.type == "cuda":
            settings = self.backend.settings
            compile_layers(self.model, self.backend.batch_size, self.backend.autocast, settings.recompute)

    def step(self, batch):
        """The losses, and `grad_norm`: before clipping; where it is not finite, the update was left out."""
        with self.backend.processes.together():
            losses = self.losses(batch)
            return {**losses, "grad_norm": self.update()}

    def losses(self, batch):
        """Forward and backward of every micro-batch; means over those of all processes."""
        sums = torch.zeros(3, device=self.backend.device)
        for number, (text, image) in enumerate(batch, start=1):
            parts = self.parts(text, image)
            for place, part in enumerate(parts, start=1):
                share = len(part[0]) / len(text) / self.backend.micro_batches
                last = number == self.backend.micro_batches and place == len(parts)
                # Gradients are exchanged once an update.
                with contextlib.nullcontext() if last or self.network is self.model else self.network.no_sync():
                    losses = forward(self.network, *part, self.backend)
                    self.scaler.scale(losses.total * share).backward()
                sums += torch.stack(losses).detach().float() * share
        return named(self.backend.processes.mean(sums))

    def parts(self, text, image):
        """A micro-batch in pairs of as many rows as the machine does well to compute at once."""
        rows = rows_at_once(self.model, len(text), self.backend.device)
        return list(zip(text.split(rows), image.split(rows)))

    def update(self):
        """→ the norm of the gradient; nothing is changed where it is not finite."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = gradient_norm(self.model.parameters(), self.backend.settings.max_grad_norm)
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.updates += 1
            if self.average is not None:
                self.follow()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    @torch.no_grad()
    def follow(self):
        """The average takes its step towards the weights, larger ones at first so that it forgets where it began."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for ours, theirs in zip(self.average.parameters(), self.model.parameters()):
            if theirs.requires_grad:
                ours.lerp_(theirs, 1 - decay)

    def evaluate(self, batches):
        network = self.model.eval() if self.average is None else self.average
        with self.backend.processes.together():
            samples = (part for batch in batches for micro_batch in batch for part in self.parts(*micro_batch))
            losses = mean_losses(network, samples, self.backend)
        self.model.train()
        return losses

    def sampler(self):
        drawing = sampler(self.model if self.average is None else self.average, self.backend)
        self.model.train()  # which it took out of training; while codes are drawn, dropout is off all the same
        return drawing

    def set_lr(self, lr):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def state_dict(self):
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

    def load_state_dict(self, state):
        self.model.load_state_dict(state["weights"])
        if self.average is not None:  # which begins at the weights where the state has none
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
                if saved.keys() != optimizer.state_dict().keys():  # PopTorch's optimizers keep more
                    raise ValueError
                load_keeping_flags(optimizer, self.own_state(optimizer, saved))
        except (ValueError, LookupError, TypeError, AttributeError):
            LOG.warning("the checkpoint's optimizer state belongs to another optimizer; it starts afresh")

    def own_state(self, optimizer, saved):
        """What this process holds of an optimizer's saved state: all of it."""
        return saved


def forward(network, text, image, backend):
    text = text.to(backend.device, non_blocking=True)
    image = image.to(backend.device, non_blocking=True)
    with backend.autocast():
        return network(text, image, return_loss=True)


@torch.no_grad()
def mean_losses(network, batches, backend):
    """Losses of (text, image) batches of any sizes: means over all samples, of all processes."""
    sums = torch.zeros(4, device=backend.device)
    for text, image in batches:
        losses = torch.stack(forward(network, text, image, backend)).float()
        sums += len(text) * torch.cat((losses, losses.new_ones(1)))
    sums = backend.processes.mean(sums)
    return named(sums[:3] / sums[3])


def named(losses):
    return dict(zip(("total", "text", "image"), losses.tolist()))


def averaged(model):
    """A copy of a DALLE for the average of its weights; the frozen VQGAN is shared."""
    return copy.deepcopy(model, {id(model.vae): model.vae}).requires_grad_(False).eval()


def gradient_norm(parameters, limit):
    """The norm of all gradients together, as a float; above `limit` (None: no limit) they are scaled down to it."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if limit is not None:
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
    else:
        norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of shards: the norm of them all


def build_optimizers(model, settings, muon=Muon):
    """Adam or AdamW over all parameters; or Muon over the layers' matrices and AdamW over the rest."""
    adam = {"betas": tuple(settings.adam_betas), "eps": ADAM_EPS, "lr": settings.learning_rate}
    groups = parameter_groups(model, settings.weight_decay)
    if settings.optimizer != "Muon":
        return [fused(getattr(torch.optim, settings.optimizer), groups, **adam)]
    in_layers = {id(parameter) for parameter in model.transformer.layers.parameters() if parameter.dim() == 2}
    matrices = [parameter for parameter in groups[0]["params"] if id(parameter) in in_layers]
    groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in in_layers]
    muon = muon(matrices, settings.learning_rate, settings.weight_decay)
    return [muon, fused(torch.optim.AdamW, groups, **adam)]


def fused(optimizer, groups, **flags):
    """One of torch's optimizers, one pass over memory an update where it has that: on GPUs, on CPUs from torch 2.4."""
    try:
        return optimizer([dict(group) for group in groups], fused=True, **flags)  # which fills in what it is given
    except RuntimeError:
        return optimizer(groups, **flags)
