"""A model's parameters and buffers on the device: copied there when it is compiled, put in the modules' place while
forward runs, brought back when asked for.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .device import put

KINDS = ("_parameters", "_buffers")


class NoOperators(TorchDispatchMode):
    """Parameters are on the device and nothing is traced: they have no values to compute with."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in ("detach", "alias"):
            raise RuntimeError(
                f"{func} called on an IPU tensor outside of forward: state_dict(keep_vars=True) must return the "
                "tensors as they are"
            )
        return func(*args, **(kwargs or {}))


class Weights:
    """host and device: {name: tensor}, names as named_parameters() and named_buffers() give them."""

    def __init__(self, model):
        # A class that brings weights home when they are read must not do so here, hence __dict__.
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.host = {**self.parameters, **self.buffers}
        self.device, self._slots = {}, []  # slots: (what holds it, key, device tensor)
        self._modes = [(module.__dict__, module.training) for module in model.modules()]  # train or eval, compiled in
        first = {id(tensor): name for name, tensor in self.host.items()}
        names = []
        for prefix, module in model.named_modules():
            for kind in KINDS:
                held = module.__dict__[kind]
                for key, tensor in held.items():
                    if tensor is not None:
                        name = f"{prefix}.{key}" if prefix else key
                        names.append((name, first[id(tensor)]))
                        self._slots.append((held, key, self._copy(name, tensor)))
        listed = self._listed(model)
        # Every module got a copy of its own; the aliases that state_dict() lists are made one tensor again.
        for number, (name, origin) in enumerate(names):
            held, key, moved = self._slots[number]
            if name == origin:
                self.device[name] = moved
            elif name in listed:
                self._slots[number] = (held, key, self.device[origin])
            else:
                raise KeyError(
                    f"{name}: the same tensor as {origin}, in two modules and not in state_dict(): after the move to "
                    "the IPU they are two, and the second is looked up in vain (register a clone, or a persistent one)"
                )

    def _copy(self, name, tensor):
        if isinstance(tensor, torch.nn.Parameter):
            return put(tensor, name=name).requires_grad_(tensor.requires_grad)
        return put(tensor, constant=not tensor.is_floating_point())

    def _listed(self, model):
        with self.on_device(), NoOperators():
            return set(model.state_dict(keep_vars=True))

    @contextlib.contextmanager
    def on_device(self):
        """The modules hold the device's tensors and are in the modes of compile time; refuses forward to exchange."""
        hosts = [held[key] for held, key, _ in self._slots]
        modes = [attributes["training"] for attributes, _ in self._modes]
        places = [moved.data_ptr() for _, _, moved in self._slots]
        for held, key, moved in self._slots:
            held[key] = moved
        for attributes, compiled in self._modes:
            attributes["training"] = compiled
        try:
            yield
            for (held, key, moved), place in zip(self._slots, places):
                if held.get(key) is not moved or moved.data_ptr() != place:
                    raise RuntimeError(
                        f"parameter or buffer {key!r} was reassigned in forward; only in-place changes reach the device"
                    )
        finally:
            for (held, key, _), host in zip(self._slots, hosts):
                held[key] = host
            for (attributes, _), mode in zip(self._modes, modes):
                attributes["training"] = mode

    def upload(self, names=None):
        """Host → device, into the tensors that are there."""
        with torch.no_grad():
            for name in self.host if names is None else names:
                self.device[name].copy_(put(self.host[name]))

    def download(self):
        with torch.no_grad():
            for name, tensor in self.host.items():
                tensor.copy_(self.device[name])

    def trained(self):
        """{name: device tensor} of what has a gradient."""
        return {name: self.device[name] for name, tensor in self.parameters.items() if tensor.requires_grad}


def watch_reads(model, executor):
    """Change the model's class to one that fetches trained weights when parameters or state_dict are read."""
    original = type(model)

    class Trained(original):
        _poptorch_executor = executor

        def __getattribute__(self, name):
            if name in ("_parameters", "_buffers"):
                executor._bring_home()
            return super().__getattribute__(name)

        def __reduce_ex__(self, protocol):  # copies and pickles are of the class that the user wrote
            executor._bring_home()
            make, (_, *arguments), *rest = super().__reduce_ex__(protocol)
            return (make, (original, *arguments), *rest)

    Trained.__name__, Trained.__qualname__ = original.__name__, original.__qualname__
    model.__class__ = Trained
    return original


def leaks(model):
    """Names of plain attributes that forward left pointing at tensors of the device."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in KINDS and isinstance(value, (torch.Tensor, list, tuple, dict)) and _on_device(value):
                yield f"{prefix}.{name}" if prefix else name


def _on_device(value):
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, torch.Tensor) and hasattr(one, "_ipu") for one in values)
