"""Files that an executor writes: executables, in a cache folder or by name, and profiles.

An executable here holds what it was compiled for and a hash that says of what; there is no code in it.
"""

import hashlib
import os

import torch

PLACES = ("cache", "profile", "log_dir")  # where files go is no part of an executable


def key(executor):
    """What makes an executable: structure of the model, options, shapes, path of forward, the optimizer's constants."""
    options = executor._options.clone()
    options._set(**dict.fromkeys(PLACES))
    parts = [executor.model, options, executor._specification, executor._path, executor._constants]
    text = [repr(part) for part in parts]
    text += [f"{name} {tuple(host.shape)} {host.dtype}" for name, host in executor._weights.host.items()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def write(executor, path):
    inputs = [[list(shape), dtype] for shape, dtype in executor._specification]
    torch.save({"key": key(executor), "inputs": inputs}, path)


def read(path):
    """The key, and inputs of the right shapes and dtypes."""
    saved = torch.load(path, weights_only=True)
    return saved["key"], [torch.zeros(shape, dtype=dtype) for shape, dtype in saved["inputs"]]


def after_compiling(executor):
    """What the options ask for; returns whether the cache had the executable."""
    cache, profile = executor._options._values["cache"], executor._options._values["profile"]
    if profile is not None:
        os.makedirs(profile, exist_ok=True)
        with open(os.path.join(profile, "profile.pop"), "w", encoding="ascii") as file:
            file.write(f"{len(executor._path)} operators\n")
    if cache is None:
        return False
    os.makedirs(cache, exist_ok=True)
    path = os.path.join(cache, f"{key(executor)[:16]}.popef")
    hit = os.path.exists(path)
    write(executor, path)
    return hit
