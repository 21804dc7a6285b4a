"""Attention on the stand-in: which kernel torch would take, and its result."""

import torch
from standin import GPU, CudaTensor, Refused, bytes_of
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
PLAIN = torch.nn.functional.scaled_dot_product_attention


def kernel_of(query, keys, values, mask, dropout):
    """Return the kernel that torch takes on a GPU, by sdp_utils.cpp of torch 2.11 to 2.14."""
    major, half = torch.cuda.get_device_capability()[0], query.dtype in (torch.float16, torch.bfloat16)
    adjacent = all(x.stride(-1) == 1 for x in (query, keys, values))
    width = query.shape[-1]
    fits = half and adjacent and width % 8 == 0 and width <= 128 and keys.shape[-2] != 1
    fits = fits and (dropout == 0 or query.shape[-2] == 1)
    if major in (9, 10) and torch.backends.cuda.cudnn_sdp_enabled() and fits:
        return "cudnn"
    if half and major >= 8 and mask is None and adjacent and width <= 256:
        return "flash"
    if query.dtype == torch.bfloat16 and major < 8:
        return "math"
    return "efficient" if width % (8 if half else 4) == 0 and adjacent else "math"


def sdpa(query, keys, values, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch.nn.functional.scaled_dot_product_attention of CudaTensors."""
    if not isinstance(query, CudaTensor):
        return PLAIN(query, keys, values, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if any(x is not None and not isinstance(x, CudaTensor) for x in (keys, values, attn_mask)):
        raise Refused("Expected all tensors to be on the same device (scaled_dot_product_attention)")
    if torch.is_autocast_enabled("cuda"):
        query, keys, values = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, keys, values))
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise Refused(f"Expected attn_mask dtype to be bool or to match query dtype, but got {attn_mask.dtype}")
    if not query.dtype == keys.dtype == values.dtype:
        raise Refused("Expected query, key, and value to have the same dtype")
    name = kernel_of(query, keys, values, attn_mask, dropout_p)
    kind = "" if attn_mask is None else " bool mask" if attn_mask.dtype == torch.bool else " bias"
    GPU.attention[f"{name}{kind} {str(query.dtype)[6:]}"] += 1
    if name == "cudnn":
        inputs = (query, keys, values) + (attn_mask,) * (attn_mask is not None)
        forms = tuple((tuple(x.shape), x.stride()) for x in inputs)
        GPU.plans.add((forms, query.dtype, dropout_p, is_causal, torch.is_grad_enabled()))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        minus = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype, device=query.device), minus)
    if name == "math":
        return math_sdpa(query, keys, values, attn_mask, scale, is_causal)
    return FusedAttention.apply(query, keys, values, attn_mask, scale, is_causal, name)


def math_sdpa(query, keys, values, bias, scale, is_causal):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ keys.transpose(-1, -2)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


class FusedAttention(torch.autograd.Function):
    """One launch for the forward pass and one for the backward pass, computed in fp32."""

    @staticmethod
    def forward(ctx, query, keys, values, bias, scale, is_causal, name):
        ctx.save_for_backward(query, keys, values, bias)
        ctx.rest, ctx.name = (scale, is_causal), name
        return one_launch(f"{name} attention", fused_forward, query, keys, values, bias, *ctx.rest)

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = one_launch(f"{ctx.name} attention backward", fused_backward, grad, *inputs, *ctx.rest)
        return (*grads, None, None, None, None)


def fused_forward(query, keys, values, bias, *rest):
    floats = (None if x is None else x.float() for x in (query, keys, values, bias))
    out = math_sdpa(*floats, *rest).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as the kernels lay it out


def fused_backward(grad, query, keys, values, bias, *rest):
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in (query, keys, values)]
        out = math_sdpa(*leaves, None if bias is None else bias.float(), *rest)
        grads = torch.autograd.grad(out, leaves, grad.float())
    return tuple(x.to(query.dtype) for x in grads)


def one_launch(name, function, *args):
    """Apply a function to the plain tensors of its arguments and return CudaTensors."""
    GPU.launches[name] += 1
    inner = tuple(x.inner if isinstance(x, CudaTensor) else x for x in args)
    with _disable_current_modes():
        found = function(*inner)
    GPU.moved += bytes_of(inner, found)
    if GPU.tape is not None:
        GPU.tape.append((function, inner, {}, found))
    return pytree.tree_map(GPU.wrapped, found)


def flash(query, keys, values, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention by the CPU's kernel."""
    floats = (x.float() for x in (query, keys, values))
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(*floats, dropout_p, is_causal, scale=scale)
    nothing = query.new_zeros((), dtype=torch.long)
    out = out.to(query.dtype)
    return out, sums, None, None, query.shape[2], keys.shape[2], nothing, nothing.clone(), query.new_zeros(0)


def flash_backward(
    grad, query, keys, values, out, sums, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    """aten::_scaled_dot_product_flash_attention_backward by the CPU's kernel."""
    floats = (x.float() for x in (grad, query, keys, values, out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*floats, sums, dropout_p, is_causal, scale=scale)
    return tuple(x.to(query.dtype) for x in grads)


AS_ON_CPU = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
}
