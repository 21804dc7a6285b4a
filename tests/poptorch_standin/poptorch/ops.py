"""PopTorch's functions that a model calls: blocks, losses, checkpoints, loops, updates and serialized products.

Outside of a pass of a wrapped model they compute the same with plain torch and record nothing.
"""

import torch
from torch import nn

from .device import current_run, mark_of
from .machine import Error
from .options import MatMulSerializationMode, check_int, check_type
from .trace import BlockHook, active_trace, hook_of

REDUCTIONS = {"none": lambda x: x.view_as(x), "mean": torch.mean, "sum": torch.sum}


def _check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} takes a tensor, not {value!r}")
    return value


def BeginBlock(layer_to_call, user_id, ipu_id):
    """Place everything from the call of the module on on that IPU; change the module and return it."""
    check_type("BeginBlock's layer_to_call", layer_to_call, nn.Module)
    if hook_of(layer_to_call) is not None:
        raise AssertionError(f"{type(layer_to_call).__name__} begins a block already: one BeginBlock for each module")
    check_int("ipu_id", ipu_id, 0)
    layer_to_call.register_forward_pre_hook(BlockHook(check_type("user_id", user_id, str), ipu_id))
    return layer_to_call


def identity_loss(x, reduction):
    """Return `x`, reduced, as the loss to differentiate."""
    result = REDUCTIONS[reduction](_check_tensor("identity_loss", x))
    if current_run() is not None:
        current_run().add_loss("identity_loss", result, [x])
    return result


def recomputationCheckpoint(*tensors):
    """Return the same tensors, stored for the backward pass; the rest is recomputed."""
    for tensor in tensors:
        _check_tensor("recomputationCheckpoint", tensor)
    if active_trace() is not None:
        active_trace().checkpoints.append(tuple(tuple(tensor.shape) for tensor in tensors))
    kept = tuple(tensor.view_as(tensor) for tensor in tensors)
    return kept if len(kept) > 1 else kept[0]


def serializedMatMul(lhs, rhs, mode, factor):
    """Return lhs @ rhs, computed in `factor` pieces of the columns."""
    check_type("serializedMatMul's mode", mode, MatMulSerializationMode)
    _check_tensor("serializedMatMul", lhs), _check_tensor("serializedMatMul", rhs)
    if rhs.shape[-1] % check_int("serializedMatMul's factor", factor):
        raise RuntimeError(f"serializedMatMul: {rhs.shape[-1]} output channels, which {factor} does not divide")
    if active_trace() is not None:
        active_trace().serialized.append((mode, factor, (tuple(lhs.shape), tuple(rhs.shape))))
    return torch.matmul(lhs, rhs)


def for_loop(count, body, inputs):
    """Apply `body` `count` times to a list of tensors, by value; return tensors of the same shapes and dtypes."""
    check_int("for_loop's count", count)
    if not isinstance(inputs, list) or not inputs:
        raise ValueError(f"for_loop takes its inputs as a list of tensors, not {type(inputs).__name__}")
    for tensor in inputs:
        _check_tensor("for_loop", tensor)
    run, trace = current_run(), active_trace()
    if run is not None and run.training:
        raise Error("for_loop has no backward pass: it works in inference models only")
    before = run.versions() if trace is not None else []
    values = [tensor.clone() for tensor in inputs]
    if trace is not None:
        values = _loop_round(body, values)
        written = [list(tensor.shape) for tensor, version in before if tensor._version != version]
        if written:
            raise RuntimeError(f"for_loop's body writes to a tensor from outside, {written[0]}: pass it as input")
        return values
    values = _loop_round(body, values)
    if run is not None:
        run.repeats += 1
    try:
        for _ in range(count - 1):
            values = _loop_round(body, values)
    finally:
        if run is not None:
            run.repeats -= 1
    return values


def _loop_round(body, values):
    """Run one round; the body may change what it gets, and what it returns is new."""
    for tensor in values:
        if mark_of(tensor) is not None:
            mark_of(tensor).constant = False  # inside a loop nothing is folded
    results = body(*values)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    given = [(tuple(value.shape), value.dtype) for value in values]
    returned = [(tuple(_check_tensor("for_loop's body", result).shape), result.dtype) for result in results]
    if given != returned:
        raise RuntimeError(f"for_loop's body must return tensors like its inputs: {given}, not {returned}")
    return [result.clone() for result in results]


def dynamic_update(input, src, dim, start, size):
    """Return a copy of `input` with `src` at start … start + size of `dim`; start is known at run time only."""
    _check_tensor("dynamic_update", input), _check_tensor("dynamic_update's start", start)
    check_int("dynamic_update's dim", dim, -input.dim())
    check_int("dynamic_update's size", size)
    if _check_tensor("dynamic_update", src).dtype != input.dtype:
        raise RuntimeError(f"dynamic_update of {input.dtype} with {src.dtype}")
    if src.shape[dim] != size:
        raise RuntimeError(f"dynamic_update: src has {src.shape[dim]} along dimension {dim}, size is {size}")
    shape = [1] * input.dim()
    shape[dim] = size
    return input.scatter(dim, (start.reshape(1) + torch.arange(size)).view(shape).expand(src.shape), src)
