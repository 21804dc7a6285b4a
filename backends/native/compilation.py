"""Compile the layers and losses of a large model, and a VQGAN that computes many images, with torch, for GPUs."""

import functools
import logging
from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backends.native.fast_layers import recomputed
from models.dalle import DALLE
from models.transformer import compute_layer

logger = logging.getLogger("minidalle")
WORTH_COMPILING = 20e6  # parameters of all layers; a smaller run may end before its compilation
COMPILED_FROM = 10_000  # images of 256 × 256; an H200 compiled the decoder in 20 s, and decoded 12,000 in that time


def compile_model(models: Sequence[DALLE], try_out: Callable[[], Any], recompute: bool = False) -> None:
    """Compile layers and losses of a large model with torch; if that fails, log it and change nothing.

    A compilation serves all layers that attend alike. A GPU takes about a quarter of a minute for all.

    Args:
        models: the one that trains, and the average of its weights, if there is one.
        try_out: makes a forward and a backward pass.
    """
    layers = [layer for model in models for layer in model.transformer.layers]
    weights = sum(parameter.numel() for parameter in models[0].transformer.layers.parameters())
    if weights < WORTH_COMPILING or models[0].transformer.reversible:
        return
    if not hasattr(getattr(torch, "compiler", None), "set_stance"):  # before torch 2.6: one for each
        return
    before: Any = [layer.compute for layer in layers], [model.compute_losses for model in models]
    compute, of_rows = torch.compile(compute_layer), torch.compile(fusible_row_losses)
    for layer in layers:
        layer.compute = functools.partial(recomputed, compute) if recompute else compute
    for model, losses in zip(models, before[1]):
        model.compute_losses = functools.partial(losses, of_rows=of_rows)
    try:
        try_out()
    except Exception as error:  # a compiler, a driver or a header file is missing
        log_failure("the model", error)
        for layer, compute in zip(layers, before[0]):
            layer.compute = compute
        for model, losses in zip(models, before[1]):
            model.compute_losses = losses


def fusible_row_losses(
    x: Tensor, labels: Tensor, matrix: Tensor, offset: Tensor, with_gradient: bool
) -> Tuple[Tensor, ...]:
    """Compute what row_losses does in operations of which torch.compile makes one kernel, since none scatters."""
    logits = F.linear(x, matrix, offset).float().log_softmax(-1)
    loss = -logits.gather(1, labels[:, None]).sum()
    if not with_gradient:
        return (loss,)
    is_label = labels[:, None] == torch.arange(len(matrix), device=x.device)
    d_logits = logits.exp() - is_label.float()
    rounded = d_logits.to(x.dtype)
    return loss, rounded @ matrix, rounded.t() @ x, d_logits.sum(0)


class CompiledLater(nn.Module):
    """Half of a VQGAN, compiled by torch once it has computed COMPILED_FROM images; if that fails, it stays as it is.

    It is compiled for one shape; batches of other shapes are computed without.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.images = network, 0
        self.compiled: Any = None
        self.shape: Optional[torch.Size] = None  # that `compiled` is for

    def forward(self, x: Tensor) -> Tensor:
        """Compute the network's output for x (B, C, H, W)."""
        self.images += len(x)
        if self.compiled is None and self.images >= COMPILED_FROM and hasattr(torch, "compiler"):
            self.compiled, self.shape = torch.compile(self.network), x.shape
        if x.shape != self.shape:
            return self.network(x)
        try:
            return self.compiled(x)
        except Exception as error:  # a compiler, a driver or a header file is missing
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            log_failure("the VQGAN", error)
            self.compiled = self.network
            return self.network(x)


def log_failure(what: str, error: Exception) -> None:
    """Log why torch could not compile; the first of its lines often names the compiler only."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    logger.info("%s is not compiled, which only costs speed: %s", what, " ".join(lines[:2]))
