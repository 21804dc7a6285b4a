"""PopTorch's functions that a model calls while it runs, for check(): the same signatures, for shapes and names only.

Under check() they are operators of the graph; otherwise identity_loss and the like are plain torch and for_loop is a
loop. Placement (BeginBlock) is accepted and forgotten.
"""

import types

import torch

from tests.ipu_operators.check import ACTIVE

REDUCTIONS = {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}


def standins():
    """Return a namespace to use as the module poptorch, for example in sys.modules."""
    modes = ("Disabled", "InputChannels", "ReducingDim", "OutputChannels")
    return types.SimpleNamespace(
        BeginBlock=begin_block,
        MatMulSerializationMode=types.SimpleNamespace(**{mode: mode for mode in modes}),
        dynamic_update=dynamic_update,
        for_loop=for_loop,
        identity_loss=identity_loss,
        recomputationCheckpoint=recomputation_checkpoint,
        serializedMatMul=serialized_matmul,
    )


def node(operator, like, *sources):
    """Return the operator's result in the running trace, or `like` itself if there is none."""
    return ACTIVE[-1].make_result(operator, like, sources) if ACTIVE else like


def begin_block(module, user_id=None, ipu_id=None):
    return module


def identity_loss(x, reduction="none"):
    reduced = REDUCTIONS[reduction](x)
    loss = node("poptorch::identity_loss", reduced, x)
    if ACTIVE:
        ACTIVE[-1].mark_loss("poptorch::identity_loss", loss, [x])
    return loss


def recomputation_checkpoint(*tensors):
    kept = [node("poptorch::recomputation_checkpoint", tensor, tensor) for tensor in tensors]
    return kept[0] if len(kept) == 1 else kept


def serialized_matmul(lhs, rhs, mode, factor=0, keep_precision=False):
    sides = {"InputChannels": lhs.shape[-2], "ReducingDim": lhs.shape[-1], "OutputChannels": rhs.shape[-1]}
    if mode in sides and sides[mode] % factor:
        raise ValueError(f"serializedMatMul: {mode} is {sides[mode]}, no multiple of {factor}")
    return node("poptorch::set_matmul_serialization", lhs @ rhs, lhs, rhs)


def dynamic_update(input, src, dim, start, size):
    if not isinstance(start, torch.Tensor) or not isinstance(size, int):
        raise TypeError("dynamic_update: start is a tensor, size an int")
    wanted = [size if number == dim % input.dim() else side for number, side in enumerate(input.shape)]
    if list(src.shape) != wanted or src.dtype != input.dtype:
        raise ValueError(f"dynamic_update: {src.dtype} {list(src.shape)} into {input.dtype} for {wanted}")
    if ACTIVE:
        return node("poptorch::dynamic_update", input, input, src, start)
    return input.index_copy(dim, start.long() + torch.arange(size), src)


def for_loop(count, body, inputs):
    """Run the body once in a trace, on values that are not constants."""
    if not isinstance(inputs, list) or not all(isinstance(tensor, torch.Tensor) for tensor in inputs):
        raise TypeError("for_loop: the inputs are a list of tensors")
    if not ACTIVE:
        for _ in range(count):
            inputs = as_list(body(*[tensor.clone() for tensor in inputs]))
        return inputs
    trace = ACTIVE[-1]
    if trace.training:
        trace.refuse("poptorch::for_loop", "for inference only")
    trace.loops += 1
    outputs = as_list(body(*[trace.make_result("poptorch::start_for_loop", tensor, [tensor]) for tensor in inputs]))
    trace.loops -= 1
    if [(t.shape, t.dtype) for t in inputs] != [(t.shape, t.dtype) for t in outputs]:
        raise ValueError("for_loop: the body returns other shapes or dtypes than it was given")
    return [trace.make_result("poptorch::end_for_loop", tensor, [tensor]) for tensor in outputs]


def as_list(outputs):
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
