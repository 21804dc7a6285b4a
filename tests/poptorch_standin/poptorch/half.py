"""Arithmetic in fp16 on the CPU: torch 2.0 has no fp16 matmul, convolution, layer_norm and others there.

Such an operator is computed in fp32 and its results are rounded to fp16. Later versions of torch need none of this.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

LACKS_HALF = torch.__version__.startswith("2.0.")

_lacking = set()  # operators that were refused once: another refusal takes torch 10 ms


def half_arithmetic():
    """Return a context in which fp16 operators work."""
    return ThroughSingle() if LACKS_HALF else contextlib.nullcontext()


class ThroughSingle(TorchDispatchMode):
    """Computes in fp32 what torch refuses because it has no fp16 kernel; mixing fp16 and fp32 is still refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtypes = {value.dtype for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)}
        through_single = torch.float16 in dtypes and torch.float32 not in dtypes
        if not through_single or func not in _lacking:
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if not through_single or "not implemented for 'Half'" not in str(error):
                    raise
            _lacking.add(func)
        copies = {}  # id of an fp16 tensor -> its fp32 copy

        def widen(value):
            if value is torch.float16:
                return torch.float32
            if _is(value, torch.float16):
                return copies.setdefault(id(value), value.float())
            return value

        results = func(*tree_map(widen, args), **tree_map(widen, kwargs))
        # An operator that writes to an argument returns that tensor.
        written = {}
        for argument, value in _arguments(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write and _is(value, torch.float16):
                value.copy_(copies[id(value)])
                written[id(copies[id(value)])] = value

        def narrow(value):
            return written.get(id(value), value.half()) if _is(value, torch.float32) else value

        return tree_map(narrow, results)


def _arguments(func, args, kwargs):
    """Yield (argument as the schema declares it, value) for every argument of a call."""
    declared = func._schema.arguments
    yield from zip(declared, args)
    yield from ((argument, kwargs[argument.name]) for argument in declared if argument.name in kwargs)


def _is(value, dtype):
    return isinstance(value, torch.Tensor) and value.dtype == dtype
