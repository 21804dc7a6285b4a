"""Convert checkpoints of lucidrains' DALLE-pytorch, versions 0.14 to 1.6.6, to the layout of utils/checkpoint.py.

What the network is like follows from the names of its weights, because older files do not say it: wrappers add `fn.` to
the names, and options of later versions were on by default.
"""

import math
import re
from typing import Any, Dict, List, Tuple

from torch.nn import functional as F

from utils.foreign_pickle import Tensors

DEFAULTS = {"num_text_tokens": 10000, "text_seq_len": 256, "heads": 8, "dim_head": 64, "loss_img_weight": 7}
OPTIONAL = ("ff_dropout", "attn_dropout", "stable", "shared_attn_ids", "shared_ff_ids")
UNSUPPORTED = {"mlp": "gated MLPs", "sparse": "DeepSpeed's random sparse attention"}
FIRST_UP_LEFT = (1, 5)  # the first version whose conv_like reaches up and to the left
SEQUENTIAL, REVERSIBLE = "transformer.layers.layers.", "transformer.layers.blocks."


def convert(saved: Dict[str, Any]) -> Dict[str, Any]:
    """Return the content of a DALLE-pytorch checkpoint in our layout, without the optimizer's state.

    Raises:
        ValueError: the file has no weights, or the network has layers that this program lacks; says which.
    """
    weights, given = saved["weights"], saved["hparams"]
    if not isinstance(weights, dict):
        raise ValueError("its weights are in the files of DeepSpeed next to it; consolidate them with zero_to_fp32.py")
    missing = [name for name in ("dim", "depth") if not isinstance(given.get(name), int)]
    if missing:
        raise ValueError(f"its hparams lack {' and '.join(missing)}")
    types = given.get("attn_types") or ("full",)
    types = (types,) if isinstance(types, str) else tuple(types)
    for name, what in UNSUPPORTED.items():
        if name in types:
            raise ValueError(f"its attn_types include {name} ({what}), which this program does not have")
    in_attention, in_feed_forward = (max(_wrappers(weights, layer), default=0) for layer in ("to_qkv", "net"))
    hparams = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    hparams.update({name: given[name] for name in OPTIONAL if given.get(name) is not None})
    hparams.update(
        dim=given["dim"],
        depth=given["depth"],
        attn_types=_patterns(types, saved.get("version"), in_attention > in_feed_forward),
        sandwich_norm=any(name.endswith(".fn.norm_out.weight") for name in weights),
        rotary_emb="transformer.pos_emb" in weights,
        shift_tokens=in_feed_forward > 2,
        reversible=any(name.startswith(REVERSIBLE) for name in weights),
    )
    converted = _rename(weights, hparams["text_seq_len"] + 1)
    _split_shared_embedding(converted, hparams["num_text_tokens"] + hparams["text_seq_len"])
    return {
        "hparams": hparams,
        "vae_params": _vae_params(saved.get("vae_params"), weights),
        "weights": converted,
        "tokenizer": {"keeps_ids": True},
        "versions": {"dalle-pytorch": str(saved.get("version", "unknown"))},
    }


def _wrappers(weights: Tensors, layer: str) -> List[int]:
    """Return how many times `fn.` comes before a kind of layer in each name."""
    found = (re.search(rf"((?:\.fn)+)\.{layer}\.", name) for name in weights)
    return [match.group(1).count(".fn") for match in found if match]


def _patterns(types: Tuple[str, ...], version: Any, has_cache: bool) -> Tuple[str, ...]:
    """Return attn_types in our names; without a version, version 1.4's wrapping for a cache tells new from old."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    up_left = tuple(map(int, numbers.groups())) >= FIRST_UP_LEFT if numbers else has_cache
    return tuple("conv_up_left" if name == "conv_like" and up_left else name for name in types)


def _rename(weights: Tensors, text_len: int) -> Tensors:
    """Return the weights under our names, and angles of rotary embeddings also for the last code."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace(SEQUENTIAL, "transformer.layers.")
        name = re.sub(r"transformer\.layers\.blocks\.(\d+)\.f\.net\.", r"transformer.layers.\1.0.", name)
        name = re.sub(r"transformer\.layers\.blocks\.(\d+)\.g\.net\.", r"transformer.layers.\1.1.", name)
        name = re.sub(r"(?:\.fn)+\.(to_qkv|to_out|net)\.", r".fn.fn.\1.", name)
        name = re.sub(r"^image_pos_emb\.weights\.(\d)$", r"image_pos_emb.weights_\1", name)
        if name.startswith("vae.") and not name.startswith("vae.model."):
            name = f"vae.model.{name[4:]}"
        if name == "transformer.pos_emb":
            tensor = tensor.reshape(1, *tensor.shape[-2:])
            codes = tensor.shape[1] - text_len
            if math.isqrt(max(codes, 0)) ** 2 != codes:  # version 1.1 lacks the last code, which is never an input
                tensor = F.pad(tensor, (0, 0, 0, 1))
        renamed[name] = tensor
    return renamed


def _split_shared_embedding(weights: Tensors, num_text_tokens: int) -> None:
    """Give embeddings that are the head's matrix (share_input_output_emb) their own tensors."""
    if "text_emb.linear.weight" in weights:
        matrix = weights["text_emb.linear.weight"]
        weights["text_emb.weight"], weights["image_emb.weight"] = matrix[:num_text_tokens], matrix[num_text_tokens:]
        for name in [name for name in weights if re.match(r"(text|image)_emb\.linear\.", name)]:
            del weights[name]


def _vae_params(params: Any, weights: Tensors) -> Dict[str, Any]:
    """Return what describes the image tokenizer; nothing for a VQGAN, whose sizes follow from its weights."""
    if "vae.codebook.weight" in weights:
        return {"target": "DiscreteVAE", "params": params if isinstance(params, dict) else {}}
    if any(name.startswith("vae.enc.blocks.") for name in weights):
        return {"target": "OpenAIDiscreteVAE", "params": {}}
    return {}
