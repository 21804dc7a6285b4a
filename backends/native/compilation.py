"""Compile the layers and losses of a large model with torch, for GPUs."""

import functools
import logging
from typing import Any, Callable, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.native.fast_layers import recomputed
from models.dalle import DALLE
from models.transformer import compute_layer

logger = logging.getLogger("minidalle")
WORTH_COMPILING = 20e6  # parameters of all layers; a smaller run may end before its compilation


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
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.info("the model is not compiled, which only costs speed: %s", " ".join(lines[:2]))
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
