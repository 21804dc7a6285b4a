"""Describe a checkpoint, or export its weights.

python -m utils.checkpoint_info FILE [--export OUT.safetensors [--half] [--decoder FOLDER]]
"""

import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from utils import checkpoint
from utils.command_line import Parser, exit_on_error
from utils.errors import first_line
from utils.files import AnyPath

WIDTH = 118
LABEL = 17
MOST_SHOWN = 100  # entries of a dict
VQGAN = f"{checkpoint.PREFIX}vae.model."  # how names of its weights begin
DECODER = ("decoder.", "post_quant_conv.")


@exit_on_error()
def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = Parser("Describe a checkpoint; with --export, write its weights alone.", usage="FILE [flags]")
    parser.prog = "python -m utils.checkpoint_info"
    parser.add_argument("file", metavar="FILE", help="checkpoint of train.py or of the reference, or .safetensors")
    add = parser.heading("Export")
    add("export", None, "write weights (averaged if there are), vocabulary and settings to this .safetensors file")
    add("half", False, "in fp16, except for a VQGAN whose codes would change", bool)
    add("decoder", None, "with the decoder of this VQGAN, which train_vqgan.py --decoder-of trained for the same codes")
    arguments = parser.parse(argv)
    if arguments.export is None and (arguments.half or arguments.decoder is not None):
        parser.error(f"argument {'--half' if arguments.half else '--decoder'}: needs --export OUT.safetensors")
    if arguments.export is not None and not arguments.export.endswith(".safetensors"):
        parser.error(f"argument --export: {arguments.export} does not end in .safetensors")
    saved = checkpoint.read(arguments.file)
    if arguments.export is None:
        print("\n".join(describe(arguments.file, saved)))
        return
    if arguments.decoder is not None:
        replace_decoder(saved["weights"], Path(arguments.decoder) / "vqgan.ckpt")
    checkpoint.write_safetensors(arguments.export, saved, arguments.half)
    print(f"wrote {arguments.export} ({_megabytes(Path(arguments.export).stat().st_size)})")


def replace_decoder(weights: Dict[str, torch.Tensor], path: Path) -> None:
    """Replace the VQGAN's decoder by that of a taming checkpoint; ValueError if it is for other codes, or damaged."""
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
    """Return the lines that describe a file and the entries of its dict that have content."""
    rows = {key: _render(value) for key, value in saved.items() if key not in ("weights", "ema_weights")}
    rows.update({key: _count_parameters(saved[key]) for key in ("weights", "ema_weights") if saved.get(key)})
    lines = [f"{path}: {_megabytes(Path(path).stat().st_size)}"]
    for label, text in rows.items():
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        wrapped = textwrap.wrap(text, WIDTH - LABEL, break_on_hyphens=False)  # names are copied from here
        lines += [f"{name:<{LABEL}}{line}" for name, line in zip([label] + [""] * len(wrapped), wrapped)]
    return lines


def _render(value: Any) -> str:
    """Write settings as `name value, …` without those that are None or off, and count what else there is."""
    if isinstance(value, dict) and len(value) <= MOST_SHOWN and all(isinstance(name, str) for name in value):
        shown = {name: _render(one) for name, one in value.items() if one is not None and one is not False}
        return ", ".join(f"{name} {text}" for name, text in shown.items() if text)
    tensors = checkpoint.tensors_in(value)
    if tensors:
        return f"{len(tensors)} tensor{'s' * (len(tensors) > 1)}, {_megabytes(checkpoint.size_of(value))}"
    if isinstance(value, dict):
        return f"{len(value):,} entries"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "on" if value is True else str(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _count_parameters(weights: Dict[str, torch.Tensor]) -> str:
    phrases = []
    for owner, is_vqgan in (("DALL-E", False), ("VQGAN", True)):
        tensors = [
            tensor
            for name, tensor in weights.items()
            if (".vae." in f".{name}") is is_vqgan and "vae.model.loss." not in name  # the loss is not part of a VQGAN
        ]
        if tensors:
            types = " and ".join(sorted({str(tensor.dtype).partition(".")[2] for tensor in tensors}))
            phrases.append(f"{owner} {sum(tensor.numel() for tensor in tensors):,} in {types}")
    return "; ".join(phrases)


if __name__ == "__main__":
    main()
