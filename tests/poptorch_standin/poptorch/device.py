"""The device: which tensors are on it, what may be done with them, and what torch functions a pass calls.

A tensor of the device is a CPU tensor with a Mark. A torch function mode sees every function that forward calls, passes
the mark on to the results and refuses what PopTorch could not compile: host tensors among the device's, values read
while there are none, functions without an equivalent. `x.device` says ipu:0.

int64 stays int64 between operators, though inputs and outputs are narrowed to 32 bits; float64 is refused.
"""

import contextlib
import functools
import re
import weakref
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import Error
from .trace import active_trace

IPU = torch.device("ipu:0")


def _names(text):
    return frozenset(text.split())


LOSSES = _names("""binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy ctc_loss
    hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss nll_loss poisson_nll_loss smooth_l1_loss
    soft_margin_loss triplet_margin_loss""")
# Functions that return a value to Python, which a compiled graph cannot.
VALUES = _names("""item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ equal
    allclose is_nonzero backward cpu cuda""")
DYNAMIC = _names("nonzero argwhere masked_select multinomial unique unique_consecutive kthvalue")
DYNAMIC_OPS = _names("nonzero nonzero_numpy masked_select multinomial _unique2 unique_dim unique_consecutive")
RANDOM = _names("""rand randn randint randperm rand_like randn_like randint_like normal normal_ uniform_ random_
    exponential_ bernoulli bernoulli_ dropout poisson gumbel_softmax""")
# torch.<name> makes its tensor on the device while a model is traced; the same function under another name does not.
FACTORIES = _names("arange empty full linspace logspace ones rand randint randn randperm range tensor zeros")
# Operators that cost an IPU nothing and so need no block.
BOOKKEEPING = _names("detach alias lift_fresh lift _to_copy empty empty_like empty_strided")
# What these do in themselves, though forward may not: check the classes and, in torch 2.0, average a smoothed loss.
INTERNAL = {"one_hot": {"_local_scalar_dense"}, "cross_entropy": {"masked_select"}}
UNSUPPORTED = {torch.bfloat16, torch.float64}
UNSUPPORTED |= {getattr(torch, name) for name in dir(torch) if name.startswith("float8")}
LINES = Path(__file__).with_name("operators.txt").read_text(encoding="utf-8").splitlines()
OPERATORS = _names(" ".join(line for line in LINES if not line.startswith("#")))
ASSIGNMENTS = _names("copy_ fill_ zero_ normal_ uniform_ random_ exponential_ index_put_ requires_grad_")


class Mark:
    """What is known of a tensor: whether it depends on constants only, its losses, and a parameter's name."""

    __slots__ = ("constant", "losses", "name")

    def __init__(self, constant=False, losses=frozenset(), name=None):
        self.constant, self.losses, self.name = constant, losses, name


def mark_of(tensor):
    return getattr(tensor, "_ipu", None)


def put(tensor, **mark):
    """Copy a host tensor as the device would have it: 64 bits narrowed to 32, values included."""
    check_dtype(tensor.dtype)
    if 0 in tensor.shape:
        raise RuntimeError(f"Zero-sized tensors are unsupported (Got shape {list(tensor.shape)}).")
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    if copied.dtype == torch.int64:
        copied = copied.to(torch.int32).to(torch.int64)
    copied._ipu = Mark(**mark)
    return copied


def fetch(tensor):
    """Copy a device tensor as the host gets it."""
    fetched = tensor.detach().clone()
    return fetched.to(torch.int32) if fetched.dtype == torch.int64 else fetched


def check_dtype(dtype):
    if dtype in UNSUPPORTED or dtype.is_complex:
        raise RuntimeError(f"Unsupported tensor type: {dtype}")


def tensors_in(values):
    """Yield all tensors in nested lists, tuples and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _scalars(values):
    if isinstance(values, (list, tuple)):
        return tuple(_scalars(value) for value in values)
    if isinstance(values, dict):
        return tuple((name, _scalars(value)) for name, value in values.items())
    if isinstance(values, slice):
        return _scalars((values.start, values.stop, values.step))
    if isinstance(values, float):
        return repr(values)  # so that a NaN equals itself
    return values if isinstance(values, (bool, int, str)) else None


def _names_ipu(value):
    return isinstance(value, (torch.device, str)) and re.fullmatch(r"ipu(:\d+)?", str(value)) is not None


def _names_host(value):
    return isinstance(value, torch.device) and value.type == "cpu" or value == "cpu"


class OperatorWatch(TorchDispatchMode):
    """Records the operators under one function; refuses those whose result's shape depends on values."""

    def __init__(self, skip=()):
        super().__init__()
        self.skip, self.names = skip, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.names.append(name)
        if name not in self.skip:
            if name == "_local_scalar_dense":
                refuse_value("aten::item")
            if name in DYNAMIC_OPS:
                refuse_dynamic(name)
            if name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
                refuse_dynamic("index with a boolean mask")
        return func(*args, **(kwargs or {}))


def refuse_value(name):
    raise RuntimeError(f"{name}: there is no value to read while the model is traced (.item(), int(t), `if t:`, …)")


def refuse_dynamic(name):
    raise RuntimeError(f"aten::{name} is unsupported: its output shape is determined by the tensor values")


class Run(TorchFunctionMode):
    """One pass of forward over one micro-batch, when the model is compiled or when it runs.

    path: the functions that met device tensors, with their plain arguments. A compiled graph is one path, so a later
    pass must call what the compiling one called.
    """

    def __init__(self, training):
        super().__init__()
        self.training = training
        self.path, self.repeats = [], 0  # repeats > 0: in a later round of a loop, which adds nothing to the path
        self.losses, self.surplus = [], set()
        self._seen = {}  # id -> weak reference of every device tensor so far, in a trace
        self._inside = 0  # > 0 while a function runs, whose own calls are not the model's

    def __enter__(self):
        # Indexing asks no function mode. Below Tensor is TensorBase, _TensorBase in torch 2.0.
        torch.Tensor.__getitem__ = self._indexing(torch.Tensor.__base__.__getitem__)
        torch.Tensor.__setitem__ = self._indexing(torch.Tensor.__base__.__setitem__)
        _runs.append(self)
        self._real = {name: getattr(torch, name) for name in FACTORIES}
        for name, real in self._real.items():
            setattr(torch, name, self._factory(real))
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        del torch.Tensor.__getitem__, torch.Tensor.__setitem__
        for name, real in self._real.items():
            setattr(torch, name, real)
        _runs.pop()
        return result

    def _factory(self, real):
        @functools.wraps(real)
        def make(*args, **kwargs):
            if not self._inside and kwargs.get("device") is None:
                kwargs["device"] = IPU
            return real(*args, **kwargs)

        return make

    def _indexing(self, real):
        @functools.wraps(real)
        def index(*args):
            if self._inside:
                return real(*args)
            with torch._C.DisableTorchFunction():
                return self.__torch_function__(real, (), args)

        return index

    def call(self, model, inputs):
        for tensor in (*inputs, *model.parameters(), *model.buffers()):
            self._see(tensor)
        return model(*inputs)

    def _see(self, tensor):
        if active_trace() is not None:
            self._seen[id(tensor)] = weakref.ref(tensor)

    def versions(self):
        """Return how often each tensor of the device was written to: [(tensor, number)]."""
        tensors = [reference() for reference in self._seen.values()]
        return [(tensor, tensor._version) for tensor in tensors if tensor is not None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            is_ours = func.__self__.__name__ == "device" and mark_of(args[0]) is not None
            return IPU if is_ours else func(*args)
        tensors = list(tensors_in((args, kwargs)))
        marks = [mark_of(tensor) for tensor in tensors if mark_of(tensor) is not None]
        to_ipu = _names_ipu(kwargs.get("device"))
        if not marks and not to_ipu:
            return func(*args, **kwargs)
        if name in ("__repr__", "__format__"):
            return f"tensor(device=ipu:0, shape={list(args[0].shape)})"
        self._check(name, args, kwargs, tensors, marks)
        if to_ipu:
            kwargs = {**kwargs, "device": "cpu"}
        watch = OperatorWatch(INTERNAL.get(name, ()))
        self._inside += 1
        try:
            with contextlib.nullcontext() if active_trace() is None else watch:
                result = func(*args, **kwargs)
        finally:
            self._inside -= 1
        self._note(name, args, kwargs, tensors, marks, watch.names)
        self._mark(name, result, kwargs, tensors, marks)
        return result

    def _check(self, name, args, kwargs, tensors, marks):
        if marks:
            if name in VALUES:
                refuse_value(name)
            if name in DYNAMIC or (name == "where" and len(tensors) == 1):
                refuse_dynamic(name)
            if name == "to" and any(map(_names_host, (*args[1:], kwargs.get("device")))):
                refuse_value('to("cpu")')
            foreign = [tensor for tensor in tensors if mark_of(tensor) is None]
            takes_host = name in ("copy_", "__setitem__") and mark_of(args[0]) is not None
            moves = name == "to" and mark_of(args[0]) is None  # host.to(device_tensor)
            if foreign and not takes_host and not moves:
                shape = list(foreign[0].shape)
                raise RuntimeError(f"Expected an IPU tensor but got tensor(device=cpu, shape={shape}) in {name}")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: the device has no torch.Generator")
        if name == "one_hot" and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1:
            raise RuntimeError("OneHot num classes must be specified and must be constant.")
        if name in ("cross_entropy", "nll_loss") and kwargs.get("weight") is not None:
            raise RuntimeError(f"{name}: weight is unsupported")
        if re.fullmatch(r"[^_].*[^_]_", name) and name not in ASSIGNMENTS and args[0]._is_view():
            raise RuntimeError(f"{name}: the write goes through a view and is lost; assign instead")

    def _note(self, name, args, kwargs, tensors, marks, operators):
        if self.repeats == 0:
            self.path.append((name, _scalars(args), _scalars(kwargs)))
        trace = active_trace()
        if trace is None:
            return
        runs = any(operator not in BOOKKEEPING for operator in operators)
        if runs and marks and not all(mark.constant for mark in marks):
            unknown = [operator for operator in operators if not OPERATORS & {operator, operator.rstrip("_")}]
            if unknown:
                raise Error(f"{name}: PopTorch 3.4 has no handler for aten::{unknown[0]}, or for constants only")
            trace.place(name, [mark.name for mark in marks if mark.name is not None])

    def _mark(self, name, result, kwargs, tensors, marks):
        constant = all(mark.constant for mark in marks) and name not in RANDOM
        losses = frozenset().union(*(mark.losses for mark in marks))
        for tensor in tensors_in(result):
            check_dtype(tensor.dtype)
            mine = mark_of(tensor)
            tensor._ipu = Mark(constant, losses, mine.name if mine is not None else None)
            self._see(tensor)
        if name in LOSSES:
            self.add_loss(f"smoothed {name}" if kwargs.get("label_smoothing") else name, result, tensors)

    # ---- losses

    def add_loss(self, kind, result, sources):
        """Note that `result` is a loss; the losses among its sources are not the final one."""
        for source in sources:
            mark = mark_of(source)
            self.surplus |= mark.losses if mark is not None else set()
        mark_of(result).losses |= {len(self.losses)}
        self.losses.append((kind, result))

    def final_loss(self):
        final = [number for number in range(len(self.losses)) if number not in self.surplus]
        if not final:
            raise Error("Couldn't find a loss in graph!")
        if len(final) > 1:
            kinds = ", ".join(self.losses[number][0] for number in final)
            raise Error(f"Multiple independent losses found in graph ({kinds}): combine them by identity_loss")
        kind, loss = self.losses[final[0]]
        if kind.startswith("smoothed"):
            raise Error("label_smoothing is arithmetic on a loss: it must go through identity_loss")
        if loss.dim() != 0:
            raise Error(f"the final loss ({kind}) has shape {list(loss.shape)}; it must be reduced to a scalar")
        return loss


class DeviceRandom:
    """Samples from the device's own generator, from `state` on; the host's generator is unchanged afterwards."""

    def __init__(self, state):
        self.state = self.after = state

    def __enter__(self):
        self._host = torch.get_rng_state()
        torch.set_rng_state(self.state)
        return self

    def __exit__(self, *error):
        self.after = torch.get_rng_state()
        torch.set_rng_state(self._host)


_runs = []


def current_run():
    return _runs[-1] if _runs else None
