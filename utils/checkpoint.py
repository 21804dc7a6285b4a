"""Read and write checkpoint files, in one layout for every backend.

The layout is the reference application's: a dict of hparams, vae_params, epoch, weights (`model.…`), opt_state and
scheduler_state. Further entries are ours: step, tokenizer, sampling, settings, versions, captions and others. All are
tensors or plain values. A .safetensors file holds the weights and what generating needs, nothing of the training.
"""

import contextlib
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.errors import first_line, ran_out_of_memory
from utils.files import AnyPath, atomic_write
from utils.foreign_pickle import Tensors, read_entries

Checkpoint = Dict[str, Any]

PREFIX = "model."
ANGLES = "transformer.pos_emb"  # too large for fp16
LAYOUT = 2  # versions["layout"] of files written now; in train.py's earlier ones, conv_like is what is now conv_up_left
BUNDLED_VOCABULARY = "71af8ba2decff41932e78199383441ee1c2d56b594da9a5501aaf50df3d844bd"  # bpe/bpe_yttm_vocab.txt
ENTRY_TYPES = {
    **dict.fromkeys(("hparams", "weights", "vae_params", "ema_weights", "tokenizer", "sampling", "settings"), dict),
    **dict.fromkeys(("progress", "trainer", "versions", "captions"), dict),
    **dict.fromkeys(("step", "epoch"), int),
}
DALLE_PYTORCH_PREFIXES = ("transformer.layers.layers.", "transformer.layers.blocks.")  # how its weights are named
MAX_WORDS = 20_000  # of captions that a file keeps: the most frequent ones
EXAMPLES = 12
EXAMPLE_CHARACTERS = 120
VOCABULARY = "tokenizer.vocabulary"  # name of the vocabulary's bytes among a .safetensors file's tensors
EXPORTED_KEYS = (
    *("hparams", "vae_params", "epoch", "step", "progress", "tokenizer", "vqgan", "data", "sampling"),
    *("settings", "versions", "captions", "exported"),
)


def write_safetensors(path: AnyPath, checkpoint: Checkpoint, half: bool = False) -> None:
    """Write a checkpoint's weights, averaged ones if it has them, its vocabulary and plain values to .safetensors.

    Args:
        half: store weights in fp16; but angles of positions, and weights of the VQGAN that fp16 would change, stay in
            fp32, since rounding would change its codes. train_vqgan.py's weights have values of fp16.
    """
    averaged = checkpoint.get("ema_weights", {})
    tensors = {**checkpoint["weights"], **averaged}
    if half:
        for name, tensor in tensors.items():
            rounds = not name.startswith(f"{PREFIX}vae.") and not name.endswith(ANGLES)
            if tensor.is_floating_point() and (rounds or torch.equal(tensor, tensor.half().to(tensor.dtype))):
                tensors[name] = tensor.half()
    header = {key: checkpoint[key] for key in EXPORTED_KEYS if key in checkpoint}
    header["exported"] = {"averaged": bool(averaged), "half": half}
    if "tokenizer" in checkpoint:
        header["tokenizer"] = dict(checkpoint["tokenizer"])
        vocabulary = header["tokenizer"].pop("vocabulary", None)
        if torch.is_tensor(vocabulary):
            tensors[VOCABULARY] = vocabulary
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}  # none shares memory
    metadata = {key: json.dumps(value, default=str) for key, value in header.items()}
    try:
        with atomic_write(path, sync=True) as file:
            mode = os.stat(file.name).st_mode
            save_file(tensors, file.name, {"format": "pt", "crc32": _checksum(tensors), **metadata})
            os.chmod(file.name, mode)  # save_file's own files are for their owner alone
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error


def read(path: AnyPath) -> Checkpoint:
    """Read a checkpoint to the CPU, without its empty entries.

    Entries have the types of ENTRY_TYPES if they are there. A .safetensors file has no optimizer or schedule, and the
    entry `exported`. Attention patterns have the names of models/transformer.py.

    Raises:
        ValueError, OSError: not a checkpoint, damaged, or it has more than tensors and plain values; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a file that train.py wrote (dalle_<epoch>.pt)")
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if _is_dalle_pytorch(checkpoint):
        from utils import dalle_pytorch

        try:
            checkpoint = dalle_pytorch.convert(checkpoint)
        except ValueError as error:
            raise ValueError(f"{path}: a checkpoint of DALLE-pytorch that cannot be used: {error}") from None
    missing = {"hparams", "weights"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise ValueError(f"{path}: not a DALL-E checkpoint: it has no {' and no '.join(sorted(missing))}")
    for key, kind in ENTRY_TYPES.items():
        value = checkpoint.get(key)
        if not isinstance(value, kind) and (value is not None or key in ("hparams", "weights")):
            raise ValueError(f"{path}: not a DALL-E checkpoint: its {key} is not a {kind.__name__}")
    for key in ("weights", "ema_weights"):
        weights = checkpoint.get(key) or {}
        if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in weights.items()):
            raise ValueError(f"{path}: not a DALL-E checkpoint: its {key} are not tensors under names")
        if not all(map(_is_whole, weights.values())):
            raise ValueError(f"{path}: damaged: a tensor of its {key} has more values than the file holds")
    checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
    hparams = checkpoint["hparams"]
    ours = "step" in checkpoint  # which the reference application does not have
    if ours and "layout" not in checkpoint.get("versions", {}) and isinstance(hparams.get("attn_types"), (list, tuple)):
        renamed = ("conv_up_left" if name == "conv_like" else name for name in hparams["attn_types"])
        hparams["attn_types"] = tuple(renamed)
    return checkpoint


def _is_dalle_pytorch(saved: Any) -> bool:
    """Return whether a file's content is a checkpoint of DALLE-pytorch's train_dalle.py."""
    if not isinstance(saved, dict) or not isinstance(saved.get("hparams"), dict):
        return False
    weights = saved.get("weights")
    if isinstance(weights, str):  # DeepSpeed's auxiliary.pt has a hint in their place
        return True
    return isinstance(weights, dict) and any(str(name).startswith(DALLE_PYTORCH_PREFIXES) for name in weights)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an ordinary one whose values are all stored, not one value shown many times."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused anyway
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
                    if archive.testzip() is not None:
                        raise OSError("checksum differs")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|Unsupported class) ([a-zA-Z_]\w*(?:\.\w+)*)", str(error))
        with contextlib.suppress(ValueError):  # DALLE-pytorch's files may hold their settings as objects
            entries = read_entries(path)
            if _is_dalle_pytorch(entries):
                return entries
        if name:
            problem = f"holds {name.group(1)}, neither tensor nor plain value, and was not opened"
            raise ValueError(f"{path}: {problem}") from None
        raise ValueError(f"{path}: damaged, cut short or not a checkpoint") from None
    except Exception as error:  # damage shows as whatever the layer that meets it raises
        # A file without checksums may ask for any amount of memory because it is damaged.
        if isinstance(error, PermissionError) or (ran_out_of_memory(error) and zipfile.is_zipfile(path)):
            raise
        reason = f" ({first_line(error)})" if isinstance(error, OSError) else ""
        raise ValueError(f"{path}: damaged, cut short or not a checkpoint{reason}") from None


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the package's own, or torch's for a dtype that it lacks
        if isinstance(error, PermissionError) or ran_out_of_memory(error):
            raise
        raise ValueError(f"{path}: damaged, cut short or not a safetensors file ({first_line(error)})") from None
    if metadata.get("crc32") not in (None, _checksum(tensors)):
        raise ValueError(f"{path}: damaged (checksum differs)")
    try:
        saved = {key: json.loads(metadata[key]) for key in EXPORTED_KEYS if key in metadata}
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged (its header is not JSON)") from None
    if isinstance(saved.get("tokenizer"), dict):
        saved["tokenizer"]["vocabulary"] = tensors.pop(VOCABULARY, None)
    exported = saved.get("exported")
    return {**saved, "weights": tensors, "exported": exported if isinstance(exported, dict) else {}}


def _checksum(tensors: Tensors) -> str:
    """Return the CRC-32 of all tensors' bytes, ordered by name; the safetensors format has none."""
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def step_of(path: AnyPath) -> Optional[int]:
    """Return the number of updates that one of our files records, without reading tensors; None if that fails."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            expected = False
            for opcode, value, _ in pickletools.genops(archive.read(name)):  # parsed, not executed
                if expected and isinstance(value, int) and opcode.name.startswith("BININT"):
                    return value
                expected = value == "step" or (expected and opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"))
    except Exception:  # damage shows as whatever the layer that meets it raises
        pass
    return None


def model_weights(weights: Tensors) -> Tensors:
    """Return a file's weights in fp32 under a DALLE's own names, with the pieces of split embeddings joined.

    The VQGAN's training loss (`vae.model.loss.…`) is omitted. ValueError if an embedding's pieces do not fit together.
    """
    joined: Tensors = {}
    pieces: Dict[str, Dict[int, torch.Tensor]] = {}
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
            message = f"{name}.split_embeddings: the pieces do not fit together ({first_line(error)})"
            raise ValueError(message) from None
    return joined


def first_misfit(model: torch.nn.Module, weights: Tensors) -> Optional[str]:
    """Describe the first way in which weights, under the module's names, do not fit it; None if they fit."""
    expected = model.state_dict()
    for name in sorted(expected.keys() - weights.keys()):
        return f"{name} is missing"
    for name in sorted(weights.keys() - expected.keys()):
        return f"{name} is not part of this model"
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return None


def check_vocabulary(path: AnyPath, saved: Checkpoint, fingerprint: str, flag: str) -> None:
    """Raise ValueError if another program's checkpoint is used with our bpe_yttm_vocab.txt, which has `fingerprint`.

    That program's file of this name has 8,192 tokens, too, so the sizes fit, but almost every id means another word.
    """
    ours = "step" in saved or saved.get("tokenizer", {}).get("sha256") is not None
    if fingerprint == BUNDLED_VOCABULARY and not ours:
        raise ValueError(
            f"{path}: was trained by another program, with another vocabulary than our bpe_yttm_vocab.txt; "
            f"give its own file with {flag} (Graphcore's application has one of the same name)"
        )


def tensors_in(value: Any) -> List[torch.Tensor]:
    """Collect every tensor in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in tensors_in(item)]


def size_of(value: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def short(fingerprint: Any) -> str:
    return str(fingerprint)[:12]


def split_words(text: str) -> List[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def read_summary(entry: Any) -> Tuple[Dict[str, int], List[str]]:
    """Return the words, with their counts, and the examples of a `captions` entry; what is malformed is left out."""
    entry = entry if isinstance(entry, dict) else {}
    words, examples = entry.get("words"), entry.get("examples")
    words = list(words.items())[:MAX_WORDS] if isinstance(words, dict) else []
    examples = examples[:EXAMPLES] if isinstance(examples, list) else []
    return (
        {word: count for word, count in words if isinstance(word, str) and isinstance(count, int)},
        [one[:EXAMPLE_CHARACTERS] for one in examples if isinstance(one, str)],
    )
