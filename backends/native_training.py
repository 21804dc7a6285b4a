"""A training step on CPUs and CUDA GPUs: micro-batches loop inside it, gradients are exchanged once, optimizers update.

Which device and precision, and where batches come from, is native.py's. Features newer than torch 2.0 stand behind a
check.
"""

import contextlib
import logging

import torch
from torch.nn.parallel import DistributedDataParallel

from backends.native_layers import compile_layers, keep_freed_memory, rows_at_once, use_fast_layers
from utils.muon import Muon
from utils.optimization import load_keeping_flags, parameter_groups

LOG = logging.getLogger("minidalle")
ADAM_EPS = 1e-6


class NativeTrainer:
    def __init__(self, model, backend):
        self.model = model.to(backend.device).train()
        self.backend = backend
        self.network = self.model
        use_fast_layers(self.model, backend.device, backend.dtype, backend.settings.recompute)
        if backend.device.type == "cpu":
            keep_freed_memory()
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
        """On GPUs, that of the layers; elsewhere kernels are chosen as they are called."""
        if self.backend.device.type == "cuda":
            settings = self.backend.settings
            compile_layers(self.model, self.backend.batch_size, self.backend.autocast, settings.recompute)

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
            rows = rows_at_once(self.model, len(text), self.backend.device)
            parts = list(zip(text.split(rows), image.split(rows)))
            for part, (some_text, some_image) in enumerate(parts, start=1):
                share = len(some_text) / len(text)
                last = (number == self.backend.micro_batches and part == len(parts)) or network is self.model
                with contextlib.nullcontext() if last else network.no_sync():  # gradients are exchanged once an update
                    with self.backend.autocast():
                        losses = network(some_text, some_image, return_loss=True)
                    then(losses.total * share)
                sums += torch.stack(losses).detach().float() * share
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
        return [fused(getattr(torch.optim, settings.optimizer), groups, **adam)]
    in_layers = {id(parameter) for parameter in model.transformer.layers.parameters() if parameter.dim() == 2}
    matrices = [parameter for parameter in groups[0]["params"] if id(parameter) in in_layers]
    groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in in_layers]
    muon = Muon(matrices, settings.learning_rate, settings.weight_decay)
    return [muon, fused(torch.optim.AdamW, groups, **adam)]


def fused(optimizer, groups, **flags):
    """One of torch's optimizers, one pass over memory an update where it has that: on GPUs, on CPUs from torch 2.4."""
    try:
        return optimizer([dict(group) for group in groups], fused=True, **flags)  # which fills in what it is given
    except RuntimeError:
        return optimizer(groups, **flags)
