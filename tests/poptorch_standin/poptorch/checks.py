"""Refusals of arguments, shared by options, optimizers, operators and loader. Each returns what it accepts."""

import torch

HALF_OR_SINGLE = (torch.float16, torch.float32)


def whole(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} wants an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} wants an int of at least {least}, not {value}")
    return value


def of_type(name, value, kind):
    """kind: a type; a bool does not pass for an int, nor an int for a float."""
    if type(value) is not kind:
        raise TypeError(f"{name} wants {kind.__name__}, not {value!r}")
    return value


def member(name, value, kind):
    if not isinstance(value, kind):
        raise TypeError(f"{name} wants a {kind.__name__}, not {value!r}")
    return value


def precision(name, value):
    if value not in HALF_OR_SINGLE:
        raise TypeError(f"{name} wants torch.float16 or torch.float32, not {value!r}")
    return value


def number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} wants a Python number, not {value!r}")
    return value
