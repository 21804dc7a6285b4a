"""Attention on GPUs in fused kernels, without a mask in memory if a pattern allows that.

A pass over the first n positions is causal for text and for `full`. In axial_row and axial_col a code sees the text and
its own row or column: two blocks, each of which a flash kernel computes. Their results are combined by the logarithms
of their softmaxes' denominators, as in ring attention (arXiv 2310.01889), which is exact for the gradient, too. Other
patterns add a bias, which is made once.
"""

import functools
import logging
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from models.dalle import DALLE
from models.transformer import attend, pattern_mask

logger = logging.getLogger("minidalle")
ALIGNMENT = 16  # values between the rows of a bias, which kernels otherwise copy
HALF = (torch.float16, torch.bfloat16)


def use_fused_attention(model: DALLE, dtype: torch.dtype) -> None:
    """Set how the layers of a DALLE on a GPU attend to earlier positions of the same pass.

    Args:
        dtype: of queries, keys and values; another one takes the plain path.
    """
    patterns: Dict[bytes, FusedAttention] = {}
    for layer in model.transformer.layers:
        attention = layer[0].fn.fn
        name = attention.mask.cpu().numpy().tobytes()
        if name not in patterns:  # layers of one pattern share its bias
            patterns[name] = FusedAttention(attention.mask, model.text_seq_len + 1, model.fmap_size, dtype)
        attention.attend = patterns[name]


class FusedAttention:
    """models.transformer.attend for one pattern.

    Args:
        mask: bool (N, N), on the GPU.
        text_len: length of the text, `<bos>` included.
    """

    def __init__(self, mask: Tensor, text_len: int, side: int, dtype: torch.dtype):
        self.text_len, self.side, self.dtype = text_len, side, dtype
        on_cpu = mask.cpu()
        names = ("full", "axial_row", "axial_col")
        self.pattern = next((name for name in names if torch.equal(on_cpu, pattern_mask(name, text_len, side))), "")
        self.in_blocks = self.pattern.startswith("axial") and flash_works(mask.device, dtype)
        self.bias = aligned_bias(mask, dtype)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
        """See models.transformer.attend."""
        length = query.shape[2]
        if not query.is_cuda or length != keys.shape[2]:
            return attend(query, keys, values, mask, dropout)
        if self.pattern == "full" or length <= self.text_len:
            return F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout, is_causal=True)
        if self.in_blocks and not dropout and query.dtype == self.dtype and query.shape[3] % 8 == 0:
            return AxialBlocks.apply(query, keys, values, self.text_len, self.side, self.pattern == "axial_col")
        bias = self.bias if query.dtype == self.dtype else self.bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias[:length, :length], dropout_p=dropout)


def aligned_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to scores (N, N): 0 if the mask is True, −inf if not. Kernels need not copy its rows."""
    count = len(mask)
    bias = torch.full((count, -(-count // ALIGNMENT) * ALIGNMENT), float("-inf"), dtype=dtype, device=mask.device)
    return bias[:, :count].masked_fill_(mask, 0)


class AxialBlocks(Function):
    """Attention with axial_row, or axial_col if `columns`, of the first n positions: (B, H, n, D), n > text_len."""

    @staticmethod
    def forward(ctx, query, keys, values, text_len, side, columns):
        of_text = [x[:, :, :text_len] for x in (query, keys, values)]
        of_codes = [x[:, :, text_len:] for x in (query, keys, values)]
        in_lines = [to_lines(x, side, columns) for x in of_codes]
        text_out, text_sums, random = flash(*of_text, causal=True)
        far_out, far_sums, _ = flash(of_codes[0], *of_text[1:], causal=False)
        near_out, near_sums, _ = flash(*in_lines, causal=True)
        batch, count = len(query), of_codes[0].shape[2]
        near_sums = from_lines(near_sums[..., None], batch, count, side, columns)[..., 0]
        sums = torch.logaddexp(far_sums, near_sums)
        far_share, near_share = ((each - sums).exp()[..., None] for each in (far_sums, near_sums))
        out = far_share * far_out + near_share * from_lines(near_out, batch, count, side, columns)
        out = torch.cat((text_out, out.to(query.dtype)), dim=2)
        ctx.save_for_backward(query, keys, values, out, text_sums, sums, *random)
        ctx.sizes = text_len, side, columns
        return out

    @staticmethod
    def backward(ctx, grad):
        query, keys, values, out, text_sums, sums, *random = ctx.saved_tensors
        text_len, side, columns = ctx.sizes
        given = grad, query, keys, values, out
        of_text, of_codes = [x[:, :, :text_len] for x in given], [x[:, :, text_len:] for x in given]
        d_text = flash_backward(*of_text, text_sums, random, causal=True)
        # With the whole result and its sums, each block gives its own part of the gradient.
        far = of_codes[0], of_codes[1], *of_text[2:4], of_codes[4]
        d_far = flash_backward(*far, sums, random, causal=False)
        in_lines = [to_lines(x, side, columns) for x in of_codes]
        d_near = flash_backward(*in_lines, to_lines(sums[..., None], side, columns)[..., 0], random, causal=True)
        size = len(query), of_codes[1].shape[2], side, columns
        d_query, d_keys, d_values = (from_lines(each, *size) for each in d_near)
        d_query = torch.cat((d_text[0], d_far[0] + d_query), dim=2)
        d_keys = torch.cat((d_text[1] + d_far[1], d_keys), dim=2)
        d_values = torch.cat((d_text[2] + d_far[2], d_values), dim=2)
        return d_query, d_keys, d_values, None, None, None


def to_lines(x: Tensor, side: int, columns: bool) -> Tensor:
    """Arrange codes (B, H, m, D) as rows or columns of the image (B·lines, H, length, D), with 0 for missing codes."""
    batch, heads, count, dim = x.shape
    rows = -(-count // side)
    grid = F.pad(x, (0, 0, 0, rows * side - count)).view(batch, heads, rows, side, dim)
    return grid.permute(0, 3, 1, 2, 4).flatten(0, 1) if columns else grid.transpose(1, 2).flatten(0, 1)


def from_lines(lines: Tensor, batch: int, count: int, side: int, columns: bool) -> Tensor:
    """Undo to_lines: (B, H, m, D)."""
    grid = lines.unflatten(0, (batch, -1))  # (B, lines, H, length, D)
    grid = grid.permute(0, 2, 3, 1, 4) if columns else grid.transpose(1, 2)
    return grid.flatten(2, 3)[:, :, :count]


def flash(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tuple[Tensor, Tensor, List[Tensor]]:
    """Attend (B, H, n, D).

    Returns:
        The result, the logarithms of the softmaxes' denominators (B, H, n), and random states for the backward pass.
    """
    if query.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal)
        return found[0], found[1], [found[6], found[7]]
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, causal)
    return out, sums, []


def flash_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    sums: Tensor,
    random: List[Tensor],
    causal: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys and values."""
    given = grad, query, keys, values, out, sums.contiguous()
    if not query.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal)
    lengths: Tuple[Any, ...] = None, None, query.shape[2], keys.shape[2]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(*given, *lengths, 0.0, causal, *random)


@functools.lru_cache(maxsize=None)
def flash_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether AxialBlocks gives what masked attention gives here, which depends on torch and on the GPU."""
    if dtype not in HALF or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    text_len, side = 5, 4
    random = torch.Generator().manual_seed(0)
    results = []
    try:
        inputs = torch.randn(3, 2, 2, text_len + side**2 - 1, 16, generator=random).to(device, dtype)
        mask = pattern_mask("axial_col", text_len, side).to(device)
        masked: Callable[..., Tensor] = functools.partial(attend, mask=mask)
        for compute in (masked, lambda *qkv: AxialBlocks.apply(*qkv, text_len, side, True)):
            qkv = [x.clone().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = compute(*qkv)
                results.append(
                    torch.stack((out, *torch.autograd.grad(out.float().square().sum(), qkv))).detach().float()
                )
        error = float((results[0] - results[1]).abs().max() / results[0].abs().max())
    except (RuntimeError, TypeError, AttributeError) as reason:
        logger.info("attention takes the masked path, which only costs speed: %s", str(reason).splitlines()[0])
        return False
    if not error < 0.05:
        logger.warning("flash attention differs from masked attention by %.3f here; it is not used", error)
    return error < 0.05
