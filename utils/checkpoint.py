"""Checkpoint files: one canonical layout for every backend, written beside their name and renamed, read without
pickled code.

The layout is the reference's: a dict of hparams, vae_params, epoch, weights (`model.…`), opt_state, scheduler_state.
What we add stands beside: step, tokenizer, sampling, settings and versions. Tensors and plain values only. How a model
is built from them is generate.py's business. Weights alone may also come as .safetensors (exported.py).

    python -m utils.checkpoint FILE [--export OUT.safetensors]     what a file is and what made it
"""

import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch

from utils.files import atomic_write

PREFIX = "model."
KINDS = {  # of what a file may hold; the rest is for the optimizer to judge
    **dict.fromkeys(("hparams", "weights", "vae_params", "ema_weights", "tokenizer", "sampling", "settings"), dict),
    **dict.fromkeys(("progress", "trainer", "versions"), dict),
    **dict.fromkeys(("step", "epoch"), int),
}


def write(path, checkpoint):
    """torch.save, complete or not at all: written beside `path`, read back, renamed. OSError where it cannot be."""
    try:
        with atomic_write(path, sync=True) as file:
            torch.save(checkpoint, file)
            file.flush()
            with zipfile.ZipFile(file.name) as archive:
                if archive.testzip() is not None:
                    raise OSError(f"{path}: what was written cannot be read back")
    except zipfile.BadZipFile as error:
        raise OSError(f"{path}: what was written cannot be read back ({_first_line(error)})") from error
    except RuntimeError as error:  # what torch's writer makes of a full disk
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: could not be written ({_first_line(reason)})") from error


def read(path):
    """The checkpoint's dict, on the CPU. ValueError in one line where it is none, is cut short or holds code.

    What KINDS names is there in its kind, or not at all. Of a .safetensors file: without optimizer and schedule, and
    with `exported`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a file that train.py wrote (dalle_<epoch>.pt)")
    if path.suffix == ".safetensors":
        from utils import exported

        checkpoint = exported.read(path)
    else:
        checkpoint = _unpickled(path)
    missing = {"hparams", "weights"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise ValueError(f"{path}: not a DALL-E checkpoint: it has no {' and no '.join(sorted(missing))}")
    for key, kind in KINDS.items():
        value = checkpoint.get(key)
        if not isinstance(value, kind) and (value is not None or key in ("hparams", "weights")):
            raise ValueError(f"{path}: not a DALL-E checkpoint: its {key} is no {kind.__name__}")
    for key in ("weights", "ema_weights"):
        weights = checkpoint.get(key) or {}
        if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in weights.items()):
            raise ValueError(f"{path}: not a DALL-E checkpoint: its {key} are not tensors under names")
    return {key: value for key, value in checkpoint.items() if value is not None}


def _unpickled(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's thoughts on a file that is then refused
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
                    if archive.testzip() is not None:
                        raise ValueError("checksum differs")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|Unsupported class) ([a-zA-Z_]\w*(?:\.\w+)*)", str(error))
        if name:
            raise ValueError(
                f"{path}: holds {name.group(1)}, neither tensor nor plain value, and was not opened"
            ) from None
        raise ValueError(f"{path}: damaged, cut short or not a checkpoint") from None
    except Exception as error:  # damage shows as whatever the layer that meets it raises
        raise ValueError(f"{path}: damaged, cut short or not a checkpoint ({_first_line(error)})") from None


def step_of(path):
    """The number of updates that a file of ours says it had, without reading its tensors; None where that fails."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            expected = False
            for opcode, value, _ in pickletools.genops(archive.read(name)):  # read, not run
                if expected and isinstance(value, int) and opcode.name.startswith("BININT"):
                    return value
                expected = value == "step" or (expected and opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"))
    except (OSError, ValueError, zipfile.BadZipFile):
        pass
    return None


def canonical_weights(state):
    """A DALLE's state dict under the file's names."""
    return {PREFIX + name: tensor.detach().cpu() for name, tensor in state.items()}


def model_weights(weights):
    """The file's weights under a DALLE's own names: prefix off, split embeddings joined in order, half widened to fp32.

    Keys of the VQGAN's training loss (`vae.model.loss.…`) are left out; they take no part in a DALL-E.
    """
    joined, pieces = {}, {}
    for name, tensor in weights.items():
        name = name[len(PREFIX) :] if name.startswith(PREFIX) else name
        if name.startswith("vae.model.loss."):
            continue
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            tensor = tensor.float()
        split = re.fullmatch(r"(.+)\.split_embeddings\.(\d+)\.weight", name)
        if split:
            pieces.setdefault(split.group(1), {})[int(split.group(2))] = tensor
        else:
            joined[name] = tensor
    for name, rows in pieces.items():
        try:
            joined[f"{name}.weight"] = torch.cat([rows[index] for index in sorted(rows)])
        except RuntimeError as error:
            raise ValueError(
                f"{name}.split_embeddings: the pieces do not fit together ({_first_line(error)})"
            ) from None
    return joined


def first_misfit(model, weights):
    """The first way in which weights (own names) do not fit a module, as a phrase; None where they fit."""
    expected = model.state_dict()
    for name in sorted(expected.keys() - weights.keys()):
        return f"{name} is missing"
    for name in sorted(weights.keys() - expected.keys()):
        return f"{name} is not part of this model"
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return None


def short(fingerprint):
    """A fingerprint as messages show it."""
    return str(fingerprint)[:12]


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


if __name__ == "__main__":
    from utils.checkpoint_info import main

    main()
