"""What goes to the device and comes back: inputs cut into micro-batches, outputs, parameters and buffers."""

import contextlib

import torch

from .device import check_dtype, fetch, put
from .machine import Error
from .options import OutputMode

KINDS = ("_parameters", "_buffers")


def check_inputs(inputs, options):
    for number, tensor in enumerate(inputs):
        if tensor.requires_grad:
            raise Error(f"input {number}: an input to an IPU model can not have requires_grad set to True")
        check_dtype(tensor.dtype)
        parts = options._micro_batches
        if parts > 1 and (tensor.dim() == 0 or len(tensor) % parts):
            raise Error(f"input {number}: the first of {list(tensor.shape)} is not a multiple of {parts}")


def specification(inputs):
    return [(tuple(tensor.shape), tensor.dtype) for tensor in inputs]


def micro_batches(inputs, options):
    """Return lists of device tensors in the order device iteration, accumulation step, replica."""
    parts = options._micro_batches
    if parts == 1:
        return [[put(tensor) for tensor in inputs]]
    rows = [(tensor, len(tensor) // parts) for tensor in inputs]
    return [[put(tensor[part * size : (part + 1) * size]) for tensor, size in rows] for part in range(parts)]


def flatten(outputs):
    """Return the tensors of what forward returned: a tensor, or a tuple or list of them, but no named tuple."""
    tensors = list(outputs) if type(outputs) in (list, tuple) else [outputs]
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"forward returned {type(tensor).__name__}; outputs are tensors, tuples and lists of them")
        if getattr(tensor, "_ipu", None) is None:
            raise Error("forward returned a tensor of the host: outputs must be computed on the IPU")
    return tensors


class Collector:
    """Gathers the outputs of all micro-batches and makes of them what the call returns."""

    def __init__(self, options, training):
        self.mode = options.output_mode
        if self.mode is OutputMode.Default:
            self.mode = OutputMode.Final if training else OutputMode.All
        self.rounds = []  # [round][replica]: a list of host tensors

    def add(self, replicas):
        new = [[fetch(tensor) for tensor in outputs] for outputs in replicas]
        if self.mode is OutputMode.Sum and self.rounds:
            new = [[a + b for a, b in zip(*pair)] for pair in zip(self.rounds[0], new)]
        self.rounds = [*self.rounds, new] if self.mode is OutputMode.All else [new]

    def results(self):
        listed = [outputs for replicas in self.rounds for outputs in replicas]
        if len(listed) == 1 and self.mode is not OutputMode.All:
            return listed[0]
        return [torch.stack(same) if same[0].dim() == 0 else torch.cat(same) for same in zip(*listed)]


class Weights:
    """A model's tensors on the host and on the device, by the names of named_parameters() and named_buffers()."""

    def __init__(self, model):
        # __dict__, because reading the attributes of a training model copies its weights to the host.
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.host = {**self.parameters, **self.buffers}
        self.device, self._slots = {}, []  # slots: (dict, key, device tensor)
        self._modes = [(module.__dict__, module.training) for module in model.modules()]  # train or eval, compiled in
        first_names = {id(tensor): name for name, tensor in self.host.items()}
        names = []
        for prefix, module in model.named_modules():
            for kind in KINDS:
                own = module.__dict__[kind]
                for key, tensor in own.items():
                    if tensor is not None:
                        name = f"{prefix}.{key}" if prefix else key
                        names.append((name, first_names[id(tensor)]))
                        self._slots.append((own, key, self._copy(name, tensor)))
        with self.on_device():
            listed = set(model.state_dict(keep_vars=True))
        # Every module gets its own copy; the aliases that state_dict() lists become one tensor again.
        for number, (name, origin) in enumerate(names):
            own, key, moved = self._slots[number]
            if name == origin:
                self.device[name] = moved
            elif name in listed:
                self._slots[number] = (own, key, self.device[origin])
            else:
                raise KeyError(f"{name}: the same tensor as {origin}, not in state_dict(): the IPU has two of them")

    def _copy(self, name, tensor):
        if isinstance(tensor, torch.nn.Parameter):
            return put(tensor, name=name).requires_grad_(tensor.requires_grad)
        return put(tensor, constant=not tensor.is_floating_point())

    @contextlib.contextmanager
    def on_device(self):
        """Put the device's tensors and the modes of compile time into the modules; refuse their replacement."""
        hosts = [own[key] for own, key, _ in self._slots]
        modes = [attributes["training"] for attributes, _ in self._modes]
        places = [moved.data_ptr() for _, _, moved in self._slots]
        for own, key, moved in self._slots:
            own[key] = moved
        for attributes, compiled in self._modes:
            attributes["training"] = compiled
        try:
            yield
            for (own, key, moved), place in zip(self._slots, places):
                if own.get(key) is not moved or moved.data_ptr() != place:
                    raise Error(f"{key!r} was reassigned in forward; only in-place changes reach the device")
        finally:
            for (own, key, _), host in zip(self._slots, hosts):
                own[key] = host
            for (attributes, _), mode in zip(self._modes, modes):
                attributes["training"] = mode

    def upload(self):
        with torch.no_grad():
            for name, tensor in self.host.items():
                self.device[name].copy_(put(tensor))

    def download(self):
        with torch.no_grad():
            for name, tensor in self.host.items():
                tensor.copy_(self.device[name])

    def trained(self):
        return {name: self.device[name] for name, tensor in self.parameters.items() if tensor.requires_grad}


def watch_reads(model, executor):
    """Give the model a class that fetches trained weights when parameters or state_dict are read."""
    original = type(model)

    class Trained(original):
        _poptorch_executor = executor

        def __getattribute__(self, name):
            if name in ("_parameters", "_buffers"):
                executor._fetch_weights()
            return super().__getattribute__(name)

        def __reduce_ex__(self, protocol):  # copies and pickles are of the class that the user wrote
            executor._fetch_weights()
            make, (_, *arguments), *rest = super().__reduce_ex__(protocol)
            return (make, (original, *arguments), *rest)

    Trained.__name__, Trained.__qualname__ = original.__name__, original.__qualname__
    model.__class__ = Trained
    return original


def leaks(model):
    """Yield the names of plain attributes that forward left pointing at tensors of the device."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in KINDS and isinstance(value, (torch.Tensor, list, tuple, dict)) and _on_device(value):
                yield f"{prefix}.{name}" if prefix else name


def _on_device(value):
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, torch.Tensor) and hasattr(one, "_ipu") for one in values)
