"""`python -m utils.checkpoint FILE`: what a checkpoint is and what made it, in lines; and the export of its weights.

Files of the reference application say less; a line that a file has nothing for is left out.
"""

import textwrap
from pathlib import Path

import torch

from utils import checkpoint
from utils.command_line import Parser

WIDTH = 118
LABEL = 12


def main(argv=None):
    parser = Parser("Says what a checkpoint is and what made it; with --export, writes its weights alone.")
    parser.prog = "python -m utils.checkpoint"
    parser.add_argument("file", metavar="FILE", help="of train.py (.pt or .safetensors), or of the reference")
    add = parser.heading("Export")
    add("export", None, "write weights (averaged ones where kept), vocabulary and settings to this .safetensors file")
    add("half", False, "in fp16, but for the VQGAN, whose codes would change", bool)
    arguments = parser.parse_args(argv)
    if arguments.export is not None and not arguments.export.endswith(".safetensors"):
        parser.error(f"argument --export: {arguments.export} does not end in .safetensors")
    try:
        saved = checkpoint.read(arguments.file)
        if arguments.export is not None:
            from utils import exported

            exported.write(arguments.export, saved, arguments.half)
            print(f"wrote {arguments.export} ({size(Path(arguments.export).stat().st_size)})")
            return
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(description(arguments.file, saved)))


def description(path, saved):
    """The lines for a file and its dict."""
    rows = [("made by", made_by(saved)), ("progress", progress(saved)), ("parameters", parameters(saved))]
    rows += [("hparams", listed(part(saved, "hparams"))), ("VQGAN", vqgan(saved)), ("tokenizer", tokenizer(saved))]
    rows += [("data", str(saved.get("data") or "")), ("sampling", listed(part(saved, "sampling")))]
    rows += [("settings", listed(part(saved, "settings"))), ("also holds", also(saved))]
    lines = [f"{path}: {size(Path(path).stat().st_size)}"]
    for label, text in rows:
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        # No phrase is broken at a hyphen: what is copied from here should be found again.
        found = textwrap.wrap(text, WIDTH - LABEL, break_on_hyphens=False)
        lines += [f"{name:<{LABEL}}{line}" for name, line in zip([label] + [""] * len(found), found)]
    return lines


def part(saved, key):
    """A dict within a checkpoint; an empty one where there is none, or something else."""
    return saved[key] if isinstance(saved.get(key), dict) else {}


def listed(values):
    """A dict as `name value, …`, without what is None or off."""
    return ", ".join(
        f"{name} {plain(value)}" for name, value in values.items() if value is not None and value is not False
    )


def plain(value):
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "on" if value is True else str(value)


def size(count):
    return f"{count / 1e6:,.1f} MB"


def made_by(saved):
    versions = part(saved, "versions")
    if versions:
        return f"train.py with {listed(versions)}"
    return "not told, as in files of the reference application"


def progress(saved):
    found = [f"{key} {saved[key]}" for key in ("step", "epoch") if saved.get(key) is not None]
    names = {"held_out_loss": "held-out loss {:.4f}", "best_loss": "best {:.4f}", "skipped": "{} updates left out"}
    values = part(saved, "progress")
    known = [name for name in names if isinstance(values.get(name), (int, float))]
    found += [names[name].format(values[name]) for name in known]
    return ", ".join(found)


def parameters(saved):
    found = []
    for owner, is_vqgan in (("DALL-E", False), ("VQGAN", True)):
        # vae.model.loss.…: the discriminator's, which takes no part
        tensors = [
            tensor
            for name, tensor in saved["weights"].items()
            if (".vae." in f".{name}") is is_vqgan and "vae.model.loss." not in name
        ]
        if tensors:
            types = " and ".join(sorted({str(tensor.dtype).partition(".")[2] for tensor in tensors}))
            found.append(f"{owner} {sum(tensor.numel() for tensor in tensors):,} in {types}")
    return "; ".join(found)


def vqgan(saved):
    params = part(saved, "vae_params")
    inner = part(params, "params")
    found = [str(params["target"])] if params.get("target") else []
    found += [f"fingerprint {saved['vqgan']}"] if saved.get("vqgan") else []
    found += [listed({**part(inner, "ddconfig"), **{k: v for k, v in inner.items() if k != "ddconfig"}} or params)]
    return ", ".join(phrase for phrase in found if phrase)


def tokenizer(saved):
    known = part(saved, "tokenizer")
    found = [str(known["kind"])] if known.get("kind") else []
    found += [f"fingerprint {known['sha256']}"] if known.get("sha256") else []
    if torch.is_tensor(known.get("vocabulary")):
        found.append(f"its vocabulary of {known['vocabulary'].numel():,} bytes is in the file")
    return ", ".join(found)


def also(saved):
    found = ["averaged weights"] if part(saved, "ema_weights") else []
    state = tensors_in(saved.get("opt_state"))
    if state:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state)
        found.append(f"optimizer state ({len(state)} tensors, {size(total)})")
    found += ["schedule state"] if saved.get("scheduler_state") else []
    if "exported" in saved:
        averaged = part(saved, "exported").get("averaged")
        found.append(f"nothing: {'averaged ' if averaged else ''}weights alone, exported")
    return ", ".join(found) or "neither averaged weights nor optimizer state"


def tensors_in(value):
    """Every tensor in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in tensors_in(item)]
