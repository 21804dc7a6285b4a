"""What a model asks of poptorch while it runs, for check(): the same signatures, for shapes and names only.

Under check() they are operators of the graph; without it identity_loss and the like are plain torch and for_loop is a
loop. Placement (BeginBlock) is accepted and forgotten.
"""

import types

import torch

from tests.ipu_operators.check import ACTIVE

REDUCTIONS = {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}


def standins():
    """A namespace to use as the module poptorch, in sys.modules for one."""
    modes = ("Disabled", "InputChannels", "ReducingDim", "OutputChannels")
    return types.SimpleNamespace(
        BeginBlock=begin_block,
        MatMulSerializationMode=types.SimpleNamespace(**{mode: mode for mode in modes}),
        dynamic_slice=dynamic_slice,
        dynamic_update=dynamic_update,
        for_loop=for_loop,
        identity_loss=identity_loss,
        recomputationCheckpoint=recomputation_checkpoint,
        serializedMatMul=serialized_matmul,
    )


def node(operator, like, *sources):
    """The operator's result in the running trace; `like` itself without one."""
    return ACTIVE[-1].made(operator, like, sources) if ACTIVE else like


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


def dynamic_slice(tensor, dim, start, size, step=1):
    check_start(start, size)
    kept = tensor.narrow(dim, 0, size)[(slice(None),) * dim + (slice(None, None, step),)]
    if ACTIVE:
        return node("poptorch::dynamic_slice", kept, tensor, start)
    places = torch.arange(0, size, step) + start.long()
    return tensor.index_select(dim, places)


def dynamic_update(input, src, dim, start, size):
    check_start(start, size)
    wanted = [size if number == dim % input.dim() else side for number, side in enumerate(input.shape)]
    if list(src.shape) != wanted or src.dtype != input.dtype:
        raise ValueError(f"dynamic_update: {src.dtype} {list(src.shape)} into {input.dtype}, which takes {wanted}")
    if ACTIVE:
        return node("poptorch::dynamic_update", input, input, src, start)
    return input.index_copy(dim, start.long() + torch.arange(size), src)


def check_start(start, size):
    if not isinstance(start, torch.Tensor) or not isinstance(size, int):
        raise TypeError("dynamic_slice and dynamic_update: start is a tensor, size an int")


def for_loop(count, body, inputs):
    """The body runs once in a trace, on values that are no constants."""
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
    outputs = as_list(body(*[trace.made("poptorch::start_for_loop", tensor, [tensor]) for tensor in inputs]))
    trace.loops -= 1
    if [(t.shape, t.dtype) for t in inputs] != [(t.shape, t.dtype) for t in outputs]:
        raise ValueError("for_loop: the body returns other shapes or dtypes than it was given")
    return [trace.made("poptorch::end_for_loop", tensor, [tensor]) for tensor in outputs]


def as_list(outputs):
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
