"""Weights alone in a .safetensors file: what drawing and evaluating need of a checkpoint, nothing of its training.

The tensors are the checkpoint's weights under their own names, averaged ones where an average is kept, and the
vocabulary's bytes. The header holds the checkpoint's plain values, one JSON text a key, and a checksum. When such a
file is written is checkpoint_info.py's business; checkpoint.py reads both kinds.
"""

import json
import zlib

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.checkpoint import PREFIX
from utils.files import atomic_write

SUFFIX = ".safetensors"
VOCABULARY = "tokenizer.vocabulary"
VQGAN = f"{PREFIX}vae."
# Of a checkpoint; `exported` says which weights these are.
KEYS = ("hparams", "vae_params", "epoch", "step", "progress", "tokenizer", "vqgan", "data", "sampling", "settings")
KEYS += ("versions", "exported")


def write(path, saved, half=False):
    """A checkpoint's dict → a .safetensors file, complete or not at all. OSError where it cannot be written.

    half: floating-point weights in fp16, but for the VQGAN's, whose codes would not be those of training any more.
    """
    averaged = saved.get("ema_weights", {})
    tensors = {**saved["weights"], **averaged}
    if half:
        tensors = {
            name: tensor.half() if tensor.is_floating_point() and not name.startswith(VQGAN) else tensor
            for name, tensor in tensors.items()
        }
    header = {key: saved[key] for key in KEYS if key in saved}
    header["exported"] = {"averaged": bool(averaged), "half": half}
    if "tokenizer" in saved:
        header["tokenizer"] = {key: value for key, value in saved["tokenizer"].items() if key != "vocabulary"}
        if torch.is_tensor(saved["tokenizer"].get("vocabulary")):
            tensors[VOCABULARY] = saved["tokenizer"]["vocabulary"]
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}  # each in its own memory
    metadata = {key: json.dumps(value, default=str) for key, value in header.items()}
    try:
        with atomic_write(path, sync=True) as file:
            save_file(tensors, file.name, {"format": "pt", "crc32": checksum(tensors), **metadata})
    except SafetensorError as error:  # a full disk among other things
        raise OSError(f"{path}: could not be written ({error})") from error


def read(path):
    """A file of write() → its checkpoint's dict, with `exported`. ValueError in one line where it is none."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the package's own, and what torch raises for a dtype that it lacks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path}: damaged, cut short or no safetensors file ({reason})") from None
    if metadata.get("crc32") not in (None, checksum(tensors)):
        raise ValueError(f"{path}: damaged (checksum differs)")
    try:
        saved = {key: json.loads(metadata[key]) for key in KEYS if key in metadata}
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged (its header is not JSON)") from None
    if isinstance(saved.get("tokenizer"), dict):
        saved["tokenizer"]["vocabulary"] = tensors.pop(VOCABULARY, None)
    about = saved.get("exported") if isinstance(saved.get("exported"), dict) else {}
    return {**saved, "weights": tensors, "exported": about}


def checksum(tensors):
    """CRC-32 over the bytes of all tensors in order of their names, as hexadecimal text; the format itself has none."""
    found = 0
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"
