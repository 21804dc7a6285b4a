"""What a model calls of PopTorch: blocks, losses, checkpoints, loops, slices and serialised products.

Outside of a pass of a wrapped model they compute the same as plain torch and record nothing.
"""

import torch
from torch import nn

from . import checks
from .device import current_run, mark_of
from .enums import MatMulSerializationMode
from .trace import BlockHook, active_trace, hook_of

REDUCTIONS = {"none": lambda x: x.view_as(x), "mean": torch.mean, "sum": torch.sum}


def _check_ids(user_id, ipu_id):
    if (
        user_id is not None
        and not isinstance(user_id, str)
        and (isinstance(user_id, bool) or not isinstance(user_id, int))
    ):
        raise TypeError(f"user_id wants a str or an int, not {user_id!r}")
    if ipu_id is not None:
        checks.whole("ipu_id", ipu_id, least=0)
    return None if user_id is None else str(user_id), ipu_id


def _check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} wants a tensor, not {value!r}")
    if current_run() is not None and mark_of(value) is None:
        raise RuntimeError(f"Expected an IPU tensor but got tensor(device=cpu, shape={list(value.shape)}) in {name}")
    return value


def BeginBlock(layer_to_call, user_id=None, ipu_id=None):
    """Everything from the call of the module on stands on that IPU; changes the module and returns it."""
    if not isinstance(layer_to_call, nn.Module):
        raise TypeError(f"BeginBlock wants an nn.Module, not {layer_to_call!r}")
    if hook_of(layer_to_call) is not None:
        raise AssertionError(f"{type(layer_to_call).__name__} begins a block already: one BeginBlock a module")
    layer_to_call.register_forward_pre_hook(BlockHook(*_check_ids(user_id, ipu_id)))
    return layer_to_call


class Block:
    """`with Block(user_id, ipu_id):` a block for the operators inside; after it, one must begin for any further."""

    _open = False

    def __init__(self, user_id=None, ipu_id=None):
        self._ids = _check_ids(user_id, ipu_id)

    def __enter__(self):
        if Block._open:
            raise RuntimeError("a Block inside a Block: scopes do not nest")
        Block._open = True
        if active_trace() is not None:
            active_trace().begin(*self._ids)
        return self

    def __exit__(self, *error):
        Block._open = False
        if active_trace() is not None:
            active_trace().end()


def identity_loss(x, reduction):
    """`x`, reduced, as the loss to differentiate."""
    if reduction not in REDUCTIONS:
        raise ValueError(f'identity_loss wants reduction "none", "mean" or "sum", not {reduction!r}')
    result = REDUCTIONS[reduction](_check_tensor("identity_loss", x))
    if current_run() is not None:
        current_run().add_loss("identity_loss", result, [x])
    return result


def recomputationCheckpoint(*tensors):
    """The same tensors, kept for the backward pass; what lies between two checkpoints is computed again."""
    for tensor in tensors:
        _check_tensor("recomputationCheckpoint", tensor)
    if not tensors:
        raise TypeError("recomputationCheckpoint wants tensors")
    if active_trace() is not None:
        active_trace().checkpoints.append(tuple(tuple(tensor.shape) for tensor in tensors))
    kept = tuple(tensor.view_as(tensor) for tensor in tensors)
    return kept if len(kept) > 1 else kept[0]


def serializedMatMul(lhs, rhs, mode, factor, keep_precision=False):
    """lhs @ rhs, computed in `factor` pieces: of A, B or C of (…, A, B) @ (B, C), as `mode` says."""
    checks.member("serializedMatMul's mode", mode, MatMulSerializationMode)
    checks.of_type("keep_precision", keep_precision, bool)
    _check_tensor("serializedMatMul", lhs), _check_tensor("serializedMatMul", rhs)
    if mode is not MatMulSerializationMode.Disabled:
        checks.whole("serializedMatMul's factor", factor)
        size = {
            MatMulSerializationMode.InputChannels: lhs.shape[-2] if lhs.dim() > 1 else 1,
            MatMulSerializationMode.ReducingDim: lhs.shape[-1],
            MatMulSerializationMode.OutputChannels: rhs.shape[-1],
        }[mode]
        if size % factor:
            raise RuntimeError(f"serializedMatMul: {mode.name} has {size} channels, which {factor} does not divide")
    if active_trace() is not None:
        active_trace().serialized.append((mode, factor, (tuple(lhs.shape), tuple(rhs.shape))))
    return torch.matmul(lhs, rhs)


def for_loop(count, body, inputs):
    """`body` applied `count` times to a list of tensors, by value → list of tensors of the same shapes and dtypes."""
    checks.whole("for_loop's count", count)
    if not isinstance(inputs, list) or not inputs:
        raise ValueError(f"for_loop wants its inputs as a list of tensors, not {type(inputs).__name__}")
    for tensor in inputs:
        _check_tensor("for_loop", tensor)
    run, trace = current_run(), active_trace()
    if run is not None and run.training:
        raise RuntimeError("for_loop has no backward pass: it works in inference models only")
    before = run.versions() if trace is not None else []
    values = [tensor.clone() for tensor in inputs]
    if trace is not None:
        with trace.loop(count):
            values = _loop_round(body, values)
        written = [list(tensor.shape) for tensor, version in before if tensor._version != version]
        if written:
            raise RuntimeError(
                f"for_loop's body writes to a tensor from outside, of shape {written[0]}: pass it as input"
            )
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
    """One round; what it is given it may change, what it returns is new."""
    for tensor in values:
        if mark_of(tensor) is not None:
            mark_of(tensor).constant = False  # inside a loop nothing is folded
    results = body(*values)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    given = [(tuple(value.shape), value.dtype) for value in values]
    taken = [(tuple(_check_tensor("for_loop's body", result).shape), result.dtype) for result in results]
    if given != taken:
        raise RuntimeError(f"for_loop's body must return what it is given: {given}, not {taken}")
    return [result.clone() for result in results]


def _positions(name, tensor, dim, start, size, step=1):
    """Where along `dim` a dynamic slice lies."""
    _check_tensor(name, tensor)
    _check_tensor(f"{name}'s start", start)
    if start.numel() != 1 or start.is_floating_point():
        raise TypeError(f"{name}'s start wants one integer in a tensor, not {start.dtype} {list(start.shape)}")
    checks.whole(f"{name}'s dim", dim, least=-tensor.dim())
    checks.whole(f"{name}'s size", size)
    checks.whole(f"{name}'s step", step)
    return start.reshape(1) + torch.arange(0, size, step)


def dynamic_slice(tensor, dim, start, size, step):
    """tensor[start : start + size : step] along `dim`, start a tensor that is known at run time only."""
    return tensor.index_select(dim, _positions("dynamic_slice", tensor, dim, start, size, step))


def dynamic_update(input, src, dim, start, size):
    """A copy of `input` with `src` at start … start + size of `dim`."""
    positions = _positions("dynamic_update", input, dim, start, size)
    if _check_tensor("dynamic_update", src).dtype != input.dtype:
        raise RuntimeError(f"dynamic_update of {input.dtype} with {src.dtype}")
    if src.shape[dim] != size:
        raise RuntimeError(f"dynamic_update: src has {src.shape[dim]} along dimension {dim}, size is {size}")
    return input.index_copy(dim, positions, src)


def set_available_memory(tensor, available_memory_proportion):
    proportion = checks.of_type("available_memory_proportion", available_memory_proportion, float)
    if not 0 <= proportion <= 1:
        raise ValueError(f"available_memory_proportion is {proportion}; it goes from 0.0 to 1.0")
    return _check_tensor("set_available_memory", tensor)


def ipu_print_tensor(tensor, title=""):
    checks.of_type("title", title, str)
    return _check_tensor("ipu_print_tensor", tensor)


def cond(*args, **kwargs):
    raise NotImplementedError("cond is not in the stand-in")


def custom_op(*args, **kwargs):
    raise NotImplementedError("custom_op is not in the stand-in: it names a function compiled for the IPU")
