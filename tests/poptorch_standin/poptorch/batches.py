"""What goes into a call and what comes out: checks, the cut into micro-batches, output modes, structures."""

import torch

from .device import check_dtype, fetch, put
from .enums import OutputMode


def check_inputs(inputs, options):
    for number, tensor in enumerate(inputs):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"input {number} is {tensor!r}; every input must be a tensor")
        if tensor.requires_grad:
            raise RuntimeError(f"input {number}: an input to an IPU model can not have requires_grad set to True")
        if 0 in tensor.shape:
            raise RuntimeError(f"input {number}: zero-sized tensors are unsupported (Got shape {list(tensor.shape)}).")
        check_dtype(tensor.dtype)
        parts = options._micro_batches
        if parts > 1 and (tensor.dim() == 0 or len(tensor) % parts):
            size = len(tensor) if tensor.dim() else "none"
            raise RuntimeError(
                f"input {number}: batch dimension {size} is not a multiple of {parts} = deviceIterations "
                f"{options.device_iterations} * gradientAccumulation {options.Training.gradient_accumulation} * "
                f"replicationFactor {options.replication_factor}"
            )


def specification(inputs):
    return [(tuple(tensor.shape), tensor.dtype) for tensor in inputs]


def micro_batches(inputs, options):
    """Lists of device tensors in the order device iteration, accumulation step, replica."""
    parts = options._micro_batches
    if parts == 1:
        return [[put(tensor) for tensor in inputs]]
    rows = [len(tensor) // parts for tensor in inputs]
    return [
        [put(tensor[part * size : (part + 1) * size]) for tensor, size in zip(inputs, rows)] for part in range(parts)
    ]


def flatten(outputs):
    """Tensors of nested tuples and lists, in order; everything else is refused."""
    if isinstance(outputs, torch.Tensor):
        if getattr(outputs, "_ipu", None) is None:
            raise RuntimeError("forward returned a tensor of the host: outputs must be computed on the IPU")
        return [outputs]
    if type(outputs) in (list, tuple):
        return [tensor for output in outputs for tensor in flatten(output)]
    if isinstance(outputs, tuple):
        raise TypeError(
            f"forward returned the named tuple {type(outputs).__name__}: outputs are put together again by "
            f"{type(outputs).__name__}(iterable), which a named tuple's constructor refuses; return a plain tuple"
        )
    raise TypeError(f"forward returned {type(outputs).__name__}; outputs are tensors, tuples and lists of them")


def structure(outputs):
    """The nesting without the tensors."""
    return type(outputs)(map(structure, outputs)) if isinstance(outputs, (list, tuple)) else None


def rebuild(shape, tensors):
    """structure()'s nesting filled from an iterator."""
    return next(tensors) if shape is None else type(shape)(rebuild(inner, tensors) for inner in shape)


class Collector:
    """Outputs of all micro-batches of a call → what the call returns. rounds[i][replica]: host tensors."""

    def __init__(self, options, training):
        self.mode = options.output_mode
        if self.mode is OutputMode.Default:
            self.mode = OutputMode.Final if training else OutputMode.All
        self.period = options._values["output_return_period"]
        rounds = options.device_iterations * options.Training.gradient_accumulation
        if self.mode is OutputMode.EveryN and rounds % self.period:
            raise RuntimeError(f"output_return_period {self.period} does not divide the {rounds} rounds of a call")
        self.rounds = []

    def add(self, replicas):
        """replicas: a list of output lists, of one round."""
        keep = [[fetch(tensor) for tensor in outputs] for outputs in replicas]
        if self.mode is OutputMode.Sum and self.rounds:
            earlier = self.rounds[0]
            keep = [[a + b for a, b in zip(*pair)] for pair in zip(earlier, keep)]
        if self.mode in (OutputMode.Final, OutputMode.Sum):
            self.rounds = [keep]
        else:
            self.rounds.append(keep)

    def results(self):
        rounds = self.rounds[self.period - 1 :: self.period] if self.mode is OutputMode.EveryN else self.rounds
        listed = [outputs for replicas in rounds for outputs in replicas]
        one = len(listed) == 1 and self.mode in (OutputMode.Final, OutputMode.Sum)
        return [same[0] if one else _joined(same) for same in zip(*listed)]


def _joined(tensors):
    return torch.stack(tensors) if tensors[0].dim() == 0 else torch.cat(tensors)
