"""Compute layers and losses faster than models/ does, with the same results to rounding.

The native trainer sets Layer.compute and DALLE.compute_losses to functions of this module. On CPUs their gradients are
written by hand: attention skips what a pattern may not see, and GEGLU and LayerScale are fused with their neighbors.
The losses never hold all logits. On GPUs torch compiles the plain layers of models/, see compilation.py; they are the
oracle of the tests.
"""

import functools
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.dalle import DALLE, Losses
from models.transformer import Attention, Layer, LayerScale, Rotation, compute_layer, pattern_mask, rotate

ROWS = 1024  # positions whose logits are in memory at once, on a CPU
GPU_ROWS = 8192  # on a GPU
QUERIES = 128  # that a dense pattern computes together, with the keys up to the last of them


def use_fast_layers(model: DALLE, device: torch.device, dtype: torch.dtype, recompute: bool = False) -> None:
    """Set how a DALLE computes its losses and, on CPUs, its layers.

    Args:
        dtype: of the losses' matrix products.
        recompute: keep only the layers' outputs, and compute everything between them again for the gradient.
    """
    model.compute_losses = functools.partial(compute_losses, dtype=dtype)
    attentions: Dict[bytes, Callable[[Tensor], Tensor]] = {}  # by mask: layers of one pattern share its bias
    for layer in model.transformer.layers:
        compute: Callable[..., Tensor] = compute_layer
        if device.type == "cpu" and not layer.reversible:
            mask = layer.attention.mask
            pattern = mask.numpy().tobytes()
            if pattern not in attentions:
                attentions[pattern] = choose_attention(mask, model.text_seq_len + 1, model.fmap_size)
            compute = functools.partial(fast_layer, attend=attentions[pattern])
        layer.compute = functools.partial(recomputed, compute) if recompute else compute


def recomputed(compute: Callable, layer: Layer, x: Tensor, rotation: Optional[Rotation] = None) -> Tensor:
    """Call compute(layer, x, rotation); if a gradient is needed, keep only its input and compute the rest again."""
    if torch.is_grad_enabled():
        return checkpoint(compute, layer, x, rotation, use_reentrant=False)
    return compute(layer, x, rotation)


def fast_layer(
    layer: Layer, x: Tensor, rotation: Optional[Rotation] = None, *, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute a layer that is not reversible as compute_layer does: (B, n, dim) in and out."""
    blocks = cast(List[LayerScale], layer)
    attention, feed_forward = (block.fn for block in blocks)
    out = fast_attention(attention.fn, attend, attention.prepare(x), rotation)
    x = ScaledResidual.apply(x, attention.norm_out(out), blocks[0].scale)
    wide, _, dropout, narrow = feed_forward.fn.net
    out = narrow(dropout(GatedGelu.apply(wide(feed_forward.prepare(x)))))
    return ScaledResidual.apply(x, feed_forward.norm_out(out), blocks[1].scale)


def fast_attention(
    attention: Attention, attend: Callable[[Tensor], Tensor], x: Tensor, rotation: Optional[Rotation] = None
) -> Tensor:
    """Compute Attention.forward; dropout, and sequences that are not whole, take the plain path."""
    batch, length, _ = x.shape
    if length != len(attention.mask) or (attention.dropout and attention.training):
        return attention(x, rotation=rotation)
    qkv = attention.to_qkv(x).view(batch, length, 3, attention.heads, attention.dim_head)
    if rotation is not None:
        qkv = rotate(qkv.transpose(1, 3), rotation).transpose(1, 3)
    return attention.to_out(attend(qkv))


def choose_attention(mask: Tensor, text_len: int, side: int) -> Callable[[Tensor], Tensor]:
    """Return the fastest attention for a mask, from qkv (B, N, 3, H, D) to (B, N, H·D)."""
    for pattern in ("axial_row", "axial_col"):
        if torch.equal(mask, pattern_mask(pattern, text_len, side)):
            bias = axial_bias(text_len, side)
            rest = text_len, side, pattern == "axial_col"
            return lambda qkv: AxialAttention.apply(qkv, bias.to(qkv.dtype), *rest)
    bias = bias_of(mask)
    return lambda qkv: DenseAttention.apply(qkv, bias.to(qkv.dtype))


def bias_of(mask: Tensor) -> Tensor:
    """Return what to add to scores: 0 if the mask is True, −inf if not."""
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


class DenseAttention(Function):
    """Attention with any causal pattern: qkv (B, n, 3, H, D), bias (n, n) from bias_of(mask); result (B, n, H·D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        batch, length, _, heads, dim_head = qkv.shape
        heads_first = qkv.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)  # (3, B·H, n, D)
        query, keys, values = heads_first
        query.mul_(dim_head**-0.5)
        out = torch.empty_like(query)
        pieces = max(1, round(length / QUERIES))
        stops = [length * (piece + 1) // pieces for piece in range(pieces)]
        weights = []
        for start, stop in zip([0, *stops], stops):
            part = bias[start:stop, :stop].expand(len(query), stop - start, stop)
            scores = torch.baddbmm(part, query[:, start:stop], keys[:, :stop].transpose(1, 2))
            weights.append(scores.softmax(-1))
            out[:, start:stop] = weights[-1] @ values[:, :stop]
        ctx.save_for_backward(heads_first, *weights)
        ctx.shape, ctx.stops = qkv.shape, stops
        return out.view(batch, heads, length, dim_head).transpose(1, 2).reshape(batch, length, heads * dim_head)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads_first, *weights = ctx.saved_tensors
        batch, length, _, heads, dim_head = ctx.shape
        query, keys, values = heads_first
        grad = grad.view(batch, length, heads, dim_head).transpose(1, 2).reshape(query.shape)
        grads = torch.empty_like(heads_first)
        d_query, d_keys, d_values = grads
        # From the last queries, which see all keys, to the first: each adds to the gradients so far.
        for start, stop, weight in reversed(list(zip([0, *ctx.stops], ctx.stops, weights))):
            d_out, beta = grad[:, start:stop], float(stop < length)
            into = slice(0, stop)
            d_scores = softmax_backward(d_out @ values[:, into].transpose(1, 2), weight)
            d_query[:, start:stop] = d_scores @ keys[:, into]
            for target, left, right in ((d_keys, d_scores, query[:, start:stop]), (d_values, weight, d_out)):
                product = left.transpose(1, 2) @ right
                target[:, into] = target[:, into] + product if beta else product
        d_query.mul_(dim_head**-0.5)
        return grads.view(3, batch, heads, length, dim_head).permute(1, 3, 0, 2, 4).contiguous(), None


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of scores, given that of their softmax and the softmax itself."""
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype)


def axial_bias(text_len: int, side: int) -> Tensor:
    """Return bias_of() the scores that AxialAttention computes: (text_len + side², text_len + side)."""
    seen = torch.ones(text_len + side**2, text_len + side, dtype=torch.bool)
    seen[:text_len] = seen[:text_len].tril()
    seen[text_len:, text_len:] = torch.ones(side, side, dtype=torch.bool).tril().repeat(side, 1)
    return bias_of(seen)


class AxialAttention(Function):
    """Attention with axial_row, or axial_col if `columns`: qkv (B, n, 3, H, D), result (B, n, H·D).

    n is text_len + side² − 1. A code sees the text and its own row, so scores are computed for text_len + side of the
    n keys only. Columns are rows of the transposed image.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, text_len: int, side: int, columns: bool) -> Tensor:
        batch, length, _, heads, dim_head = qkv.shape
        ctx.text_len, ctx.side, ctx.columns = text_len, side, columns
        parts = heads_in_rows(qkv, text_len, side, columns)  # (3, B·H, text_len + side², D)
        query, keys, values = parts
        query.mul_(dim_head**-0.5)
        scores = text_and_row_products(query, keys, text_len, side)
        weights = scores.add_(bias).softmax(-1)
        ctx.save_for_backward(parts, weights)
        out = weigh_values(weights, values, text_len, side)
        return heads_last(out[None], batch, length, text_len, side, columns).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts, weights = ctx.saved_tensors
        text_len, side, columns = ctx.text_len, ctx.side, ctx.columns
        query, keys, values = parts
        batch, length, dim_head = len(grad), grad.shape[1], query.shape[-1]
        grad = grad.view(batch, length, 1, -1, dim_head)
        (grad,) = heads_in_rows(grad, text_len, side, columns)
        d_weights = text_and_row_products(grad, values, text_len, side)
        d_scores = softmax_backward(d_weights, weights)
        grads = torch.empty_like(parts)
        grads[0] = weigh_values(d_scores, keys, text_len, side)
        grads[0].mul_(dim_head**-0.5)
        for number, left, right in ((1, d_scores, query), (2, weights, grad)):
            grads[number, :, :text_len] = left[..., :text_len].transpose(1, 2) @ right
            own = rows_of(left[:, text_len:, text_len:], side).transpose(1, 2) @ rows_of(right[:, text_len:], side)
            grads[number, :, text_len:] = own.view(-1, side**2, dim_head)
        return heads_last(grads, batch, length, text_len, side, columns), None, None, None, None


def heads_in_rows(x: Tensor, text_len: int, side: int, columns: bool) -> Tensor:
    """Arrange (B, n, k, H, D) as (k, B·H, text_len + side², D), the image by rows or columns, 0 for the last code."""
    batch, length, count, heads, dim_head = x.shape
    parts = x.new_empty(count, batch, heads, text_len + side**2, dim_head)
    source = x.permute(2, 0, 3, 1, 4)
    if columns:
        parts[..., :text_len, :] = source[..., :text_len, :]
        parts[..., -1, :] = 0
        for target, part in column_views(parts, source, text_len, side):
            target.copy_(part)
    else:
        parts[..., :length, :] = source
        parts[..., length:, :] = 0
    return parts.flatten(1, 2)


def heads_last(parts: Tensor, batch: int, length: int, text_len: int, side: int, columns: bool) -> Tensor:
    """Undo heads_in_rows: arrange (k, B·H, text_len + side², D) as (B, n, k, H, D)."""
    count, _, rows, dim_head = parts.shape
    parts = parts.view(count, batch, -1, rows, dim_head)
    x = parts.new_empty(batch, length, count, parts.shape[2], dim_head)
    target = x.permute(2, 0, 3, 1, 4)
    if columns:
        target[..., :text_len, :] = parts[..., :text_len, :]
        for part, into in column_views(parts, target, text_len, side):
            into.copy_(part)
    else:
        target.copy_(parts[..., :length, :])
    return x


def column_views(parts: Tensor, x: Tensor, text_len: int, side: int) -> Iterator[Tuple[Tensor, Tensor]]:
    """Yield views of the same codes in columns of `parts` and rows of x (…, n, D): the whole rows, then the last."""
    grid = parts[..., text_len:, :].unflatten(-2, (side, side)).transpose(-3, -2)
    whole = text_len + side * (side - 1)
    yield grid[..., :-1, :, :], x[..., text_len:whole, :].unflatten(-2, (side - 1, side))
    yield grid[..., -1, :-1, :], x[..., whole:, :]


def rows_of(x: Tensor, side: int) -> Tensor:
    """Split (B·H, side², m) into rows of codes (B·H·side, side, m)."""
    return x.unflatten(1, (side, side)).flatten(0, 1)


def text_and_row_products(query: Tensor, keys: Tensor, text_len: int, side: int) -> Tensor:
    """Multiply positions with the keys of the text and, for codes, of their row: (B·H, rows, text_len + side).

    Text positions have 0 for rows.
    """
    count, rows, _ = query.shape
    products = query.new_empty(count, rows, text_len + side)
    products[..., :text_len] = query @ keys[:, :text_len].transpose(1, 2)
    own = rows_of(query[:, text_len:], side) @ rows_of(keys[:, text_len:], side).transpose(1, 2)
    products[:, text_len:, text_len:] = own.view(count, side**2, side)
    products[:, :text_len, text_len:] = 0
    return products


def weigh_values(weights: Tensor, values: Tensor, text_len: int, side: int) -> Tensor:
    """Sum the values with weights as text_and_row_products arranges them: (B·H, rows, D)."""
    out = weights[..., :text_len] @ values[:, :text_len]
    own = rows_of(weights[:, text_len:, text_len:], side) @ rows_of(values[:, text_len:], side)
    out[:, text_len:] += own.view(len(out), side**2, -1)
    return out


class GatedGelu(Function):
    """GEGLU from (…, 2·d) to (…, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        opened = F.gelu(gate)
        ctx.save_for_backward(x, opened)
        return opened * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, opened = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        grads = torch.empty_like(x)
        d_value, d_gate = grads.chunk(2, dim=-1)
        torch.mul(opened, grad, out=d_value)
        d_gate.copy_(torch.ops.aten.gelu_backward(value * grad, gate))
        return grads


class ScaledResidual(Function):
    """LayerScale and its residual, x + out·scale: x fp32 (B, n, dim), out of any dtype, scale fp32 (1, 1, dim)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(out, scale)
        return torch.addcmul(x, out.to(x.dtype), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        out, scale = ctx.saved_tensors
        return grad, (grad * scale).to(out.dtype), (grad * out).sum((0, 1), keepdim=True)


def compute_losses(
    dalle: DALLE, x: Tensor, text: Tensor, codes: Tensor, dtype: torch.dtype, of_rows: Optional[Callable] = None
) -> Losses:
    """Compute what models.dalle.compute_losses does, without ever holding all logits.

    Args:
        of_rows: row_losses by default, or another function that computes the same.
    """
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
        of_rows or row_losses,
    )
    weight = dalle.loss_img_weight
    return Losses((text_loss + weight * image_loss) / (1 + weight), text_loss, image_loss)


def row_losses(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, with_gradient: bool) -> Tuple[Tensor, ...]:
    """Sum the cross-entropies of rows x (R, dim), whose logits are F.linear(x, weight, bias); compute in fp32.

    Args:
        labels: int64 (R,).

    Returns:
        The sum, and with_gradient its gradients for x, weight and bias.
    """
    log_probabilities = F.linear(x, weight, bias).float().log_softmax(-1)
    at = labels[:, None]
    loss = -log_probabilities.gather(1, at).sum()
    if not with_gradient:
        return (loss,)
    d_logits = log_probabilities.exp_()  # in place, because it is large
    d_logits.scatter_add_(1, at, d_logits.new_full((), -1).expand(at.shape))
    rounded = d_logits.to(x.dtype)
    return loss, rounded @ weight, rounded.t() @ x, d_logits.sum(0)


class HeadLosses(Function):
    """Mean cross-entropies of text and codes, which share a projection; two fp32 scalars.

    Inputs: text_x (B·T, dim) with text (B·T,), codes_x (B·L, dim) with codes (B·L,), all in the dtype of the logits;
    weight (V, dim), bias (V,), and first_code, the codes' first index in them. The forward pass computes the gradients
    by of_rows, see row_losses, for at most ROWS positions at a time, so that only their logits are in memory.
    """

    @staticmethod
    def forward(ctx, text_x, codes_x, weight, bias, text, codes, first_code, with_gradient, of_rows):
        d_weight, d_bias = (torch.empty_like(each) if with_gradient else None for each in (weight, bias))
        losses, d_xs = [], []
        for x, labels, part in ((text_x, text, slice(0, first_code)), (codes_x, codes, slice(first_code, None))):
            matrix, offset = weight[part].to(x.dtype), bias[part].to(x.dtype)
            loss, d_x = 0, torch.empty_like(x)
            pieces = -(-len(x) // (GPU_ROWS if x.is_cuda else ROWS))
            for number, (rows, at, d_rows) in enumerate(zip(*(each.chunk(pieces) for each in (x, labels, d_x)))):
                of_these, *gradients = of_rows(rows, at, matrix, offset, with_gradient)
                loss = loss + of_these if number else of_these
                if with_gradient:
                    d_rows.copy_(gradients[0])
                    for whole, new in zip((d_weight[part], d_bias[part]), gradients[1:]):
                        whole.copy_(new) if number == 0 else whole.add_(new)
            losses.append(loss / len(x))
            d_xs.append(d_x)
        if with_gradient:
            ctx.save_for_backward(*d_xs, d_weight, d_bias)
            ctx.first_code = first_code
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *d_xs, d_weight, d_bias = ctx.saved_tensors
        scales = [grad / len(d_x) for grad, d_x in zip(grads, d_xs)]  # only now: in fp16 it could underflow
        counts = ctx.first_code, len(d_bias) - ctx.first_code
        scale = torch.cat([each.expand(count) for each, count in zip(scales, counts)])
        d_xs = [(d_x * each).to(d_x.dtype) for d_x, each in zip(d_xs, scales)]
        return (*d_xs, d_weight * scale[:, None], d_bias * scale, None, None, None, None, None)
