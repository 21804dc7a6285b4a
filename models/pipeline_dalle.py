"""Annotations that let a DALLE train on IPUs: stages, recomputation, and serialized embedding and head.

The model computes the same as before, under the same names in its state dict. poptorch is imported only when an IPU run
asks for it.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dalle import DALLE

Placement = List[Tuple[str, int]]


def placement(
    depth: int,
    *,
    layers_per_ipu: Sequence[int],
    embedding_ipu_id: int = 0,
    cls_ipu_id: Optional[int] = None,
    pixels: bool = False,
) -> Placement:
    """Return (module of a DALLE, its IPU) in the order in which a step enters them.

    Args:
        layers_per_ipu: number of layers on each IPU.
        cls_ipu_id: the head's IPU; None is the last one.
        pixels: whether steps get pixels, so that the VQGAN is needed, on IPU 0.

    Raises:
        ValueError: the layers do not add up to `depth`.
    """
    if sum(layers_per_ipu) != depth:
        raise ValueError(
            f"--layers-per-ipu {','.join(map(str, layers_per_ipu))} adds up to {sum(layers_per_ipu)} layers, "
            f"the model has {depth}"
        )
    places = [("vae", 0)] if pixels else []
    places += [("text_emb", embedding_ipu_id), ("image_emb", embedding_ipu_id)]
    layer_ipus = [ipu for ipu, count in enumerate(layers_per_ipu) for _ in range(count)]
    places += [(f"transformer.layers.{number}", ipu) for number, ipu in enumerate(layer_ipus)]
    return [*places, ("to_logits", len(layers_per_ipu) - 1 if cls_ipu_id is None else cls_ipu_id)]


def stages(places: Placement) -> List[Tuple[int, List[str]]]:
    """Group a placement into pipeline stages, (IPU, modules): successive modules of one IPU are one stage."""
    found: List[Tuple[int, List[str]]] = []
    for module, ipu in places:
        if not found or found[-1][0] != ipu:
            found.append((ipu, []))
        found[-1][1].append(module)
    return found


class WrappedDALLE(nn.Module):
    """A DALLE with an IPU's annotations, as PopTorch trains it.

    Args:
        dalle: changed in place; its state dict and results stay the same.
        places: see placement.
        serialization: number of pieces in which the text embedding and the head are computed, so that their temporary
            values fit an IPU's memory; it must divide the text vocabulary (with padding ids) and the image vocabulary.
    """

    def __init__(self, dalle: DALLE, places: Placement, serialization: int = 1):
        super().__init__()
        import poptorch

        self.model = dalle
        unshare_masks(dalle)
        for layer in dalle.transformer.layers:
            layer.register_forward_hook(keep_output)
        if serialization > 1:
            check_serialization(dalle, serialization)
            dalle.text_emb = SerializedEmbedding(dalle.text_emb.weight, serialization)
            dalle.to_logits.linear = SerializedLinear(serialization)
        found = stages(places)
        poptorch.BeginBlock(dalle, user_id="stage 0", ipu_id=found[0][0])  # for operations before the first module
        for number, (ipu, modules) in enumerate(found):
            for module in modules:
                poptorch.BeginBlock(dalle.get_submodule(module), user_id=f"stage {number}", ipu_id=ipu)

    def forward(self, text: Tensor, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Compute total, text and image loss, fp32 scalars.

        Args:
            text: int (B, text_seq_len).
            image: codes int (B, L), or pixels (B, 3, S, S).
        """
        import poptorch

        losses = self.model(text, image, return_loss=True)
        return poptorch.identity_loss(losses.total, reduction="none"), losses.text, losses.image


def unshare_masks(dalle: DALLE) -> None:
    """Copy the mask for each layer, because PopTorch loses all but the first of a buffer that modules share."""
    for attention, _ in dalle.transformer.layers:
        attention.fn.fn.mask = attention.fn.fn.mask.clone()


def keep_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Keep a module's output for the backward pass (a forward hook); values between two outputs are recomputed."""
    import poptorch

    return poptorch.recomputationCheckpoint(output)


def check_serialization(dalle: DALLE, factor: int) -> None:
    """Raise ValueError, in one line, if the factor does not divide the vocabularies."""
    sizes = {"text tokens with padding": dalle.num_text_tokens, "image tokens": dalle.num_image_tokens}
    for name, size in sizes.items():
        if size % factor:
            fitting = max(n for n in range(1, factor) if not any(size % n for size in sizes.values()))
            raise ValueError(
                f"--embedding-serialization-factor {factor} does not divide the {size} {name}; {fitting} does"
            )


class SerializedEmbedding(nn.Module):
    """An nn.Embedding in `factor` pieces, each a parameter; state dicts have them as one `weight`."""

    def __init__(self, weight: Tensor, factor: int):
        super().__init__()
        self.rows = weight.shape[0] // factor
        for number, piece in enumerate(weight.detach().split(self.rows)):
            self.register_parameter(f"piece_{number}", nn.Parameter(piece.clone()))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up int (B, n) as (B, n, dim)."""
        found: Any = 0
        for number, piece in enumerate(self.parameters()):
            local = ids - number * self.rows
            inside = (local >= 0) & (local < self.rows)
            rows = F.embedding(local.clamp(0, self.rows - 1), piece)
            found = found + rows * inside[..., None].to(rows.dtype)
        return found

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if keep_vars:  # PopTorch asks for the parameters themselves, to move them
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
            destination[f"{prefix}weight"] = torch.cat([piece.detach() for piece in self.parameters()])

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *rest: Any) -> None:
        rows = state_dict[f"{prefix}weight"].split(self.rows) if f"{prefix}weight" in state_dict else ()
        pieces = {f"{prefix}piece_{number}": piece for number, piece in enumerate(rows)}
        super()._load_from_state_dict(pieces, prefix, *rest)


class SerializedLinear:
    """An F.linear that computes its outputs in `factor` pieces, one after another."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Map x (B, n, dim) to (B, n, V), with weight (V, dim) and bias (V,)."""
        import poptorch

        # Flat, because PopTorch can only split a plain matrix product.
        mode = poptorch.MatMulSerializationMode.OutputChannels
        product = poptorch.serializedMatMul(x.flatten(0, 1), weight.t(), mode, factor=self.factor)
        return (product + bias).view(*x.shape[:2], -1)
