"""Compute the losses of a DALLE as models/dalle.py does, without ever holding all logits."""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from models.dalle import DALLE, Losses

ROWS = 1024  # positions whose logits are in memory at once, on a CPU
GPU_ROWS = 8192  # on a GPU


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


def row_losses(x: Tensor, labels: Tensor, matrix: Tensor, offset: Tensor, with_gradient: bool) -> Tuple[Tensor, ...]:
    """Sum the cross-entropies of rows x (R, dim), whose logits are F.linear(x, matrix, offset); compute in fp32.

    Args:
        labels: int64 (R,).

    Returns:
        The sum, and with_gradient its gradients for x, matrix and offset.
    """
    logits = F.linear(x, matrix, offset).float().log_softmax(-1)  # of probabilities
    at = labels[:, None]
    loss = -logits.gather(1, at).sum()
    if not with_gradient:
        return (loss,)
    d_logits = logits.exp_()
    d_logits.scatter_add_(1, at, d_logits.new_full((), -1).expand(at.shape))
    rounded = d_logits.to(x.dtype)
    return loss, rounded @ matrix, rounded.t() @ x, d_logits.sum(0)


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
                loss = loss + of_these
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
    def backward(ctx, *grads):
        *d_xs, d_weight, d_bias = ctx.saved_tensors
        scales = [grad / len(d_x) for grad, d_x in zip(grads, d_xs)]  # only now: in fp16 it could underflow
        counts = ctx.first_code, len(d_bias) - ctx.first_code
        scale = torch.cat([each.expand(count) for each, count in zip(scales, counts)])
        d_xs = [(d_x * each).to(d_x.dtype) for d_x, each in zip(d_xs, scales)]
        return (*d_xs, d_weight * scale[:, None], d_bias * scale, None, None, None, None, None)
