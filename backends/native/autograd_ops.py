"""Faster forms of what a layer and the losses compute, put in place of models/'s own by the native trainer.

Same results to rounding, each with its gradient written out: attention that leaves out what a pattern may not see,
GEGLU, LayerScale with its residual, and cross-entropy that never holds all logits. The plain path in models/ is the
oracle of their tests. Where they are used is fast_layers.py's.
"""

import torch
from torch.autograd import Function
from torch.nn import functional as F

QUERIES = 128  # of a dense pattern that are computed together, against the keys up to the last of them
ROWS = 1024  # positions whose logits are alive at once


def bias_of(mask):
    """A bool mask as what is added to scores: 0 where True, −inf elsewhere."""
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


class DenseAttention(Function):
    """Any causal pattern. qkv (B, n, 3, H, D), bias_of() its mask (n, n) → (B, n, H·D)."""

    @staticmethod
    def forward(ctx, qkv, bias):
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
    def backward(ctx, grad):
        heads_first, *weights = ctx.saved_tensors
        batch, length, _, heads, dim_head = ctx.shape
        query, keys, values = heads_first
        grad = grad.view(batch, length, heads, dim_head).transpose(1, 2).reshape(query.shape)
        grads = torch.empty_like(heads_first)
        d_query, d_keys, d_values = grads
        # From the last queries, which see all keys, to the first: each adds to what is there.
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


def softmax_backward(grad, weights):
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype)


def axial_bias(text_len, side):
    """bias_of() what AxialAttention computes: (text_len + side², text_len + side)."""
    seen = torch.ones(text_len + side**2, text_len + side, dtype=torch.bool)
    seen[:text_len] = seen[:text_len].tril()
    seen[text_len:, text_len:] = torch.ones(side, side, dtype=torch.bool).tril().repeat(side, 1)
    return bias_of(seen)


class AxialAttention(Function):
    """axial_row, or axial_col with columns. qkv (B, n, 3, H, D) at n = text_len + side² − 1 positions → (B, n, H·D).

    A code sees the text and its own row, so that text_len + side of the n keys are computed, and a score is kept for
    those only. Columns are rows of the transposed picture.
    """

    @staticmethod
    def forward(ctx, qkv, bias, text_len, side, columns):
        """bias: axial_bias()'s."""
        batch, length, _, heads, dim_head = qkv.shape
        ctx.text_len, ctx.side, ctx.columns = text_len, side, columns
        parts = heads_in_rows(qkv, text_len, side, columns)  # (3, B·H, text_len + side², D)
        query, keys, values = parts
        query.mul_(dim_head**-0.5)
        scores = rows_beside_text(query, keys, text_len, side)
        weights = scores.add_(bias).softmax(-1)
        ctx.save_for_backward(parts, weights)
        out = seen_values(weights, values, text_len, side)
        return heads_last(out[None], batch, length, text_len, side, columns).flatten(2)

    @staticmethod
    def backward(ctx, grad):
        parts, weights = ctx.saved_tensors
        text_len, side, columns = ctx.text_len, ctx.side, ctx.columns
        query, keys, values = parts
        batch, length, dim_head = len(grad), grad.shape[1], query.shape[-1]
        grad = grad.view(batch, length, 1, -1, dim_head)
        (grad,) = heads_in_rows(grad, text_len, side, columns)
        d_weights = rows_beside_text(grad, values, text_len, side)
        d_scores = softmax_backward(d_weights, weights)
        grads = torch.empty_like(parts)
        grads[0] = seen_values(d_scores, keys, text_len, side)
        grads[0].mul_(dim_head**-0.5)
        for number, left, right in ((1, d_scores, query), (2, weights, grad)):
            grads[number, :, :text_len] = left[..., :text_len].transpose(1, 2) @ right
            own = rows_of(left[:, text_len:, text_len:], side).transpose(1, 2) @ rows_of(right[:, text_len:], side)
            grads[number, :, text_len:] = own.view(-1, side**2, dim_head)
        return heads_last(grads, batch, length, text_len, side, columns), None, None, None, None


def heads_in_rows(x, text_len, side, columns):
    """(B, n, k, H, D) → (k, B·H, text_len + side², D), the picture row by row or column by column, 0 where the last
    code would be.
    """
    batch, length, count, heads, dim_head = x.shape
    parts = x.new_empty(count, batch, heads, text_len + side**2, dim_head)
    source = x.permute(2, 0, 3, 1, 4)
    if columns:
        parts[..., :text_len, :] = source[..., :text_len, :]
        parts[..., -1, :] = 0
        for target, part in picture_parts(parts, source, text_len, side):
            target.copy_(part)
    else:
        parts[..., :length, :] = source
        parts[..., length:, :] = 0
    return parts.flatten(1, 2)


def heads_last(parts, batch, length, text_len, side, columns):
    """heads_in_rows() back again: (k, B·H, text_len + side², D) → (B, n, k, H, D)."""
    count, _, rows, dim_head = parts.shape
    parts = parts.view(count, batch, -1, rows, dim_head)
    x = parts.new_empty(batch, length, count, parts.shape[2], dim_head)
    target = x.permute(2, 0, 3, 1, 4)
    if columns:
        target[..., :text_len, :] = parts[..., :text_len, :]
        for part, into in picture_parts(parts, target, text_len, side):
            into.copy_(part)
    else:
        target.copy_(parts[..., :length, :])
    return x


def picture_parts(parts, x, text_len, side):
    """Pairs of views of the same codes: in columns of `parts` and in rows of x (…, n, D); whole rows, then the last."""
    grid = parts[..., text_len:, :].unflatten(-2, (side, side)).transpose(-3, -2)
    whole = text_len + side * (side - 1)
    yield grid[..., :-1, :, :], x[..., text_len:whole, :].unflatten(-2, (side - 1, side))
    yield grid[..., -1, :-1, :], x[..., whole:, :]


def rows_of(x, side):
    """(B·H, side², m) → (B·H·side, side, m)."""
    return x.unflatten(1, (side, side)).flatten(0, 1)


def rows_beside_text(query, keys, text_len, side):
    """Products of each position with the keys of the text and, for codes, with those of their row: (B·H, rows, text_len
    + side), 0 for text and rows.
    """
    count, rows, _ = query.shape
    products = query.new_empty(count, rows, text_len + side)
    products[..., :text_len] = query @ keys[:, :text_len].transpose(1, 2)
    own = rows_of(query[:, text_len:], side) @ rows_of(keys[:, text_len:], side).transpose(1, 2)
    products[:, text_len:, text_len:] = own.view(count, side**2, side)
    products[:, :text_len, text_len:] = 0
    return products


def seen_values(weights, values, text_len, side):
    """rows_beside_text's products as weights of the values: (B·H, rows, D)."""
    out = weights[..., :text_len] @ values[:, :text_len]
    own = rows_of(weights[:, text_len:, text_len:], side) @ rows_of(values[:, text_len:], side)
    out[:, text_len:] += own.view(len(out), side**2, -1)
    return out


class GatedGelu(Function):
    """GEGLU: (…, 2·d) → (…, d)."""

    @staticmethod
    def forward(ctx, x):
        value, gate = x.chunk(2, dim=-1)
        opened = F.gelu(gate)
        ctx.save_for_backward(x, opened)
        return opened * value

    @staticmethod
    def backward(ctx, grad):
        x, opened = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        grads = torch.empty_like(x)
        d_value, d_gate = grads.chunk(2, dim=-1)
        torch.mul(opened, grad, out=d_value)
        d_gate.copy_(torch.ops.aten.gelu_backward(value * grad, gate))
        return grads


class ScaledResidual(Function):
    """x + out·scale: x fp32 (B, n, dim), out of any dtype, scale fp32 (1, 1, dim)."""

    @staticmethod
    def forward(ctx, x, out, scale):
        ctx.save_for_backward(out, scale)
        return torch.addcmul(x, out.to(x.dtype), scale)

    @staticmethod
    def backward(ctx, grad):
        out, scale = ctx.saved_tensors
        return grad, (grad * scale).to(out.dtype), (grad * out).sum((0, 1), keepdim=True)


class HeadLosses(Function):
    """Mean cross-entropies of text and codes, which share a projection.

    text_x (B·T, dim) with text (B·T,), codes_x (B·L, dim) with codes (B·L,), all x of the dtype that logits are
    computed in; weight (V, dim), bias (V,), first_code: where codes begin in them. → two fp32 scalars. The gradients
    are computed on the way forward, ROWS positions at a time, so that no more than their logits are ever alive.
    """

    @staticmethod
    def forward(ctx, text_x, codes_x, weight, bias, text, codes, first_code, with_gradient):
        d_weight, d_bias = (torch.empty_like(each) if with_gradient else None for each in (weight, bias))
        losses, d_xs = [], []
        for x, labels, part in ((text_x, text, slice(0, first_code)), (codes_x, codes, slice(first_code, None))):
            matrix, offset = weight[part].to(x.dtype), bias[part].to(x.dtype)
            loss, d_x = 0, torch.empty_like(x)
            for start in range(0, len(x), ROWS):
                rows = slice(start, start + ROWS)
                logits = F.linear(x[rows], matrix, offset).float().log_softmax(-1)  # of probabilities
                at = labels[rows, None]
                loss = loss - logits.gather(1, at).sum()
                if not with_gradient:
                    continue
                d_logits = logits.exp_()
                d_logits.scatter_add_(1, at, d_logits.new_full((), -1).expand(at.shape))
                target = d_bias[part]
                target.copy_(d_logits.sum(0)) if start == 0 else target.add_(d_logits.sum(0))
                d_logits = d_logits.to(x.dtype)
                d_x[rows] = d_logits @ matrix
                target, product = d_weight[part], d_logits.t() @ x[rows]
                target.copy_(product) if start == 0 else target.add_(product)
            losses.append(loss / len(x))
            d_xs.append(d_x)
        if with_gradient:
            ctx.save_for_backward(*d_xs, d_weight, d_bias)
            ctx.first_code = first_code
        return tuple(losses)

    @staticmethod
    def backward(ctx, *grads):
        *d_xs, d_weight, d_bias = ctx.saved_tensors
        scales = [grad / len(d_x) for grad, d_x in zip(grads, d_xs)]  # only now: in fp16 it could underflow
        counts = ctx.first_code, len(d_bias) - ctx.first_code
        scale = torch.cat([each.expand(count) for each, count in zip(scales, counts)])
        d_xs = [(d_x * each).to(d_x.dtype) for d_x, each in zip(d_xs, scales)]
        return (*d_xs, d_weight * scale[:, None], d_bias * scale, None, None, None, None)
