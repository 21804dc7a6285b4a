"""Describe a checkpoint, or export its weights.

python -m utils.checkpoint_info FILE [--export OUT.safetensors [--half] [--decoder FOLDER]]
"""

import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from utils import checkpoint
from utils.command_line import Parser, exit_on_closed_output, parse
from utils.files import AnyPath, first_line

WIDTH = 118
LABEL = 12
VQGAN = f"{checkpoint.PREFIX}vae.model."  # how names of its weights begin
DECODER = ("decoder.", "post_quant_conv.")


@exit_on_closed_output()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the description of a checkpoint, or write its weights alone."""
    parser = Parser("Describe a checkpoint; with --export, write its weights alone.", usage="FILE [flags]")
    parser.prog = "python -m utils.checkpoint_info"
    parser.add_argument("file", metavar="FILE", help="checkpoint of train.py or of the reference, or .safetensors")
    add = parser.heading("Export")
    add("export", None, "write weights (averaged if there are), vocabulary and settings to this .safetensors file")
    add("half", False, "in fp16, except for a VQGAN whose codes would change", bool)
    add("decoder", None, "with the decoder of this VQGAN, which train_vqgan.py --decoder-of trained for the same codes")
    arguments = parse(parser, argv)
    if arguments.export is not None and not arguments.export.endswith(".safetensors"):
        parser.error(f"argument --export: {arguments.export} does not end in .safetensors")
    try:
        saved = checkpoint.read(arguments.file)
        if arguments.export is None:
            print("\n".join(describe(arguments.file, saved)))
        else:
            if arguments.decoder is not None:
                replace_decoder(saved["weights"], Path(arguments.decoder) / "vqgan.ckpt")
            checkpoint.write_safetensors(arguments.export, saved, arguments.half)
            print(f"wrote {arguments.export} ({_megabytes(Path(arguments.export).stat().st_size)})")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def replace_decoder(weights: Dict[str, torch.Tensor], path: Path) -> None:
    """Replace the VQGAN's decoder among a DALL-E's weights by that of a taming checkpoint.

    Raises:
        ValueError: the file is damaged, or its VQGAN has other codes.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--decoder {path}: no such file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # damage shows as whatever the layer that meets it raises
        raise ValueError(f"--decoder {path}: damaged, or not a VQGAN of train_vqgan.py ({first_line(error)})") from None
    names = {name: name[len(VQGAN) :] for name in weights if name.startswith(VQGAN)}
    if not names or not all(name in found and found[name].shape == weights[ours].shape for ours, name in names.items()):
        raise ValueError(f"--decoder {path}: its VQGAN has another shape than the checkpoint's")
    for ours, name in names.items():
        if name.startswith(DECODER):
            weights[ours] = found[name]
        elif not torch.equal(found[name], weights[ours]):
            raise ValueError(f"--decoder {path}: its VQGAN has other codes; train it with --decoder-of")


def describe(path: AnyPath, saved: checkpoint.Checkpoint) -> List[str]:
    """Return the lines that describe a file and its dict; a line without content is left out."""
    versions, captions = _dict(saved, "versions"), _dict(saved, "captions")
    rows = {
        "made by": _maker(versions),
        "progress": _progress(saved),
        "parameters": _parameters(saved),
        "hparams": _list(_dict(saved, "hparams")),
        "VQGAN": _vqgan(saved),
        "tokenizer": _tokenizer(saved),
        "data": str(saved.get("data") or ""),
        "captions": f"{len(_dict(captions, 'words')):,} words" if captions else "",
        "sampling": _list(_dict(saved, "sampling")),
        "settings": _list(_dict(saved, "settings")),
        "also holds": _other_entries(saved),
    }
    lines = [f"{path}: {_megabytes(Path(path).stat().st_size)}"]
    for label, text in rows.items():
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        wrapped = textwrap.wrap(text, WIDTH - LABEL, break_on_hyphens=False)  # names are copied from here
        lines += [f"{name:<{LABEL}}{line}" for name, line in zip([label] + [""] * len(wrapped), wrapped)]
    return lines


def _maker(versions: Dict[str, Any]) -> str:
    if "dalle-pytorch" in versions:
        return f"DALLE-pytorch {versions['dalle-pytorch']}"
    return f"train.py with {_list(versions)}" if versions else "unknown, as in the reference's files"


def _dict(saved: Dict[str, Any], key: str) -> Dict[str, Any]:
    return saved[key] if isinstance(saved.get(key), dict) else {}


def _list(values: Dict[str, Any]) -> str:
    """Join a dict as `name value, …`, without values that are None or off."""
    shown = {name: value for name, value in values.items() if value is not None and value is not False}
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown.items())


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "on" if value is True else str(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _progress(saved: checkpoint.Checkpoint) -> str:
    phrases = [f"{key} {saved[key]}" for key in ("step", "epoch") if saved.get(key) is not None]
    formats = {"held_out_loss": "validation loss {:.4f}", "best_loss": "best {:.4f}", "skipped": "{} updates skipped"}
    values = _dict(saved, "progress")
    known = [name for name in formats if isinstance(values.get(name), (int, float))]
    return ", ".join(phrases + [formats[name].format(values[name]) for name in known])


def _parameters(saved: checkpoint.Checkpoint) -> str:
    phrases = []
    for owner, is_vqgan in (("DALL-E", False), ("VQGAN", True)):
        tensors = [
            tensor
            for name, tensor in saved["weights"].items()
            if (".vae." in f".{name}") is is_vqgan and "vae.model.loss." not in name  # the loss is not part of a VQGAN
        ]
        if tensors:
            types = " and ".join(sorted({str(tensor.dtype).partition(".")[2] for tensor in tensors}))
            phrases.append(f"{owner} {sum(tensor.numel() for tensor in tensors):,} in {types}")
    return "; ".join(phrases)


def _vqgan(saved: checkpoint.Checkpoint) -> str:
    params = _dict(saved, "vae_params")
    inner = _dict(params, "params")
    phrases = [str(params["target"])] if params.get("target") else []
    phrases += [f"fingerprint {saved['vqgan']}"] if saved.get("vqgan") else []
    sizes = {**_dict(inner, "ddconfig"), **{key: value for key, value in inner.items() if key != "ddconfig"}}
    return ", ".join(phrase for phrase in [*phrases, _list(sizes or params)] if phrase)


def _tokenizer(saved: checkpoint.Checkpoint) -> str:
    known = _dict(saved, "tokenizer")
    phrases = [str(known["kind"])] if known.get("kind") else []
    phrases += [f"fingerprint {known['sha256']}"] if known.get("sha256") else []
    if torch.is_tensor(known.get("vocabulary")):
        phrases.append(f"its vocabulary of {known['vocabulary'].numel():,} bytes is in the file")
    return ", ".join(phrases)


def _other_entries(saved: checkpoint.Checkpoint) -> str:
    phrases = ["averaged weights"] if _dict(saved, "ema_weights") else []
    state = _tensors_in(saved.get("opt_state"))
    if state:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state)
        phrases.append(f"optimizer state ({len(state)} tensors, {_megabytes(total)})")
    phrases += ["schedule state"] if saved.get("scheduler_state") else []
    if "exported" in saved:
        averaged = "averaged " if _dict(saved, "exported").get("averaged") else ""
        phrases.append(f"nothing: {averaged}weights alone, exported")
    return ", ".join(phrases) or "neither averaged weights nor optimizer state"


def _tensors_in(value: Any) -> List[torch.Tensor]:
    """Collect every tensor in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in _tensors_in(item)]


if __name__ == "__main__":
    main()
