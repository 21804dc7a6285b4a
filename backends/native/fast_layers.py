"""Puts autograd_ops.py's faster forms in the place of a DALLE's own, for training and for its losses.

The model stays what it was: parameters, their names, and what it computes to rounding. A cache, or dropout within
attention, goes the plain way. Nothing here knows of optimizers or processes.
"""

import ctypes
import functools
import logging
import sys

import torch
from torch.utils.checkpoint import checkpoint

from backends.native.autograd_ops import (
    AxialAttention,
    DenseAttention,
    GatedGelu,
    HeadLosses,
    ScaledResidual,
    axial_bias,
    bias_of,
)
from models.dalle import Losses
from models.transformer import compute_layer, pattern_mask

logger = logging.getLogger("minidalle")
WORTH_COMPILING = 20e6  # parameters of all layers, below which a run may well be over before its compiler
WORKING_SET = 2800 * 512  # positions times width that a CPU takes at once


def rows_at_once(model, rows, device):
    """How many rows of a micro-batch of `rows` to compute at once. On a CPU products are as fast with a few thousand
    positions as with more, which only take memory.
    """
    if device.type != "cpu":
        return rows
    fitting = WORKING_SET // ((model.text_seq_len + model.image_seq_len) * model.text_emb.weight.shape[1])
    pieces = -(-rows // max(1, fitting))
    return -(-rows // pieces)


def keep_freed_memory():
    """Let the C library use freed memory again instead of giving it back. The system clears every page that it hands
    out, and for the large tensors of a step that takes longer than to compute them. glibc's; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # as glibc numbers its settings
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def use_fast_layers(model, device, dtype, recompute=False):
    """Change how a DALLE computes its losses and, on CPUs, its layers.

    dtype: in which products are computed. recompute: keep layers' outputs only, and compute what lies between again.
    """
    model.compute_losses = functools.partial(losses, dtype=dtype)
    compute, patterns = compute_layer, {}
    for layer in model.transformer.layers:
        if device.type == "cpu":
            mask = layer[0].fn.fn.mask
            name = mask.numpy().tobytes()
            if name not in patterns:  # layers share what a pattern needs
                patterns[name] = attention_of(mask, model.text_seq_len + 1, model.fmap_size)
            compute = functools.partial(fast_layer, attend=patterns[name])
        layer.compute = functools.partial(recomputed, compute) if recompute else compute


def recomputed(compute, layer, x):
    """Call compute(layer, x); if a gradient is needed, keep its input only and compute the rest again for it."""
    if torch.is_grad_enabled():
        return checkpoint(compute, layer, x, use_reentrant=False)
    return compute(layer, x)


def compile_layers(model, rows, autocast, recompute=False):
    """Have torch compile the layers of a large model; where that fails, say so and change nothing.

    One compilation serves all layers and costs a minute. autocast() → the context in which they run.
    """
    layers = model.transformer.layers
    if sum(parameter.numel() for parameter in layers.parameters()) < WORTH_COMPILING:
        return
    if not hasattr(getattr(torch, "compiler", None), "set_stance"):  # before torch 2.6: one for each
        return
    compute = torch.compile(compute_layer)
    weight = model.text_emb.weight
    shape = rows, model.text_seq_len + model.image_seq_len, weight.shape[1]
    try:
        with torch.random.fork_rng(), torch.enable_grad(), autocast():
            x = torch.zeros(shape, device=weight.device, requires_grad=True)
            torch.autograd.grad(compute(layers[0], x).sum(), x)
    except Exception as error:  # whatever is missing: a compiler, a driver, a header file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.info("layers are not compiled, which costs speed alone: %s", lines[0])
        return
    for layer in layers:
        layer.compute = functools.partial(recomputed, compute) if recompute else compute


def fast_layer(layer, x, attend):
    """(B, n, dim) in and out."""
    attention, feed_forward = (block.fn for block in layer)
    x = ScaledResidual.apply(x, attention.norm_out(attended(attention.fn, attend, attention.norm(x))), layer[0].scale)
    wide, _, dropout, narrow = feed_forward.fn.net
    out = narrow(dropout(GatedGelu.apply(wide(feed_forward.norm(x)))))
    return ScaledResidual.apply(x, feed_forward.norm_out(out), layer[1].scale)


def attended(attention, attend, x):
    """Attention.forward."""
    batch, length, _ = x.shape
    if length != len(attention.mask) or (attention.dropout and attention.training):
        return attention(x)
    return attention.to_out(attend(attention.to_qkv(x).view(batch, length, 3, attention.heads, attention.dim_head)))


def attention_of(mask, text_len, side):
    """The function of a pattern's qkv (B, N, 3, H, D) → (B, N, H·D)."""
    for pattern in ("axial_row", "axial_col"):
        if torch.equal(mask, pattern_mask(pattern, text_len, side)):
            bias = axial_bias(text_len, side)
            rest = text_len, side, pattern == "axial_col"
            return lambda qkv: AxialAttention.apply(qkv, bias.to(qkv.dtype), *rest)
    bias = bias_of(mask)
    return lambda qkv: DenseAttention.apply(qkv, bias.to(qkv.dtype))


def losses(dalle, x, text, codes, dtype):
    """DALLE.compute_losses, whose logits are never all alive."""
    norm, projection = dalle.to_logits
    x = norm(x).to(dtype)
    text_x, codes_x = (part.flatten(0, 1) for part in (x[:, : dalle.text_seq_len], x[:, dalle.text_seq_len :]))
    text_loss, image_loss = HeadLosses.apply(
        text_x,
        codes_x,
        projection.weight,
        projection.bias,
        text.flatten(),
        codes.flatten(),
        dalle.num_text_tokens,
        torch.is_grad_enabled(),
    )
    weight = dalle.loss_img_weight
    return Losses((text_loss + weight * image_loss) / (1 + weight), text_loss, image_loss)
