"""What lets a DALLE train on IPUs: stages, recomputation, serialized embedding and head, and sparse attention.

The model computes the same as before, under the same names in its state dict. poptorch is imported only when an IPU run
asks for it.
"""

import functools
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dalle import DALLE
from models.transformer import pattern_mask

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


def check_micro_batches(places: Placement, gradient_accumulation: int) -> int:
    """Return how many micro-batches per update the placement's pipeline needs; ValueError if there are fewer."""
    count = len(stages(places))
    least = 2 * count - 1
    if gradient_accumulation < least:
        raise ValueError(
            f"--gradient-accumulation {gradient_accumulation}: a pipeline of {count} stages needs {least} "
            "micro-batches or more per update"
        )
    return least


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
            attention = layer.attention
            axial = axial_attention(attention.mask, dalle.text_seq_len + 1, dalle.fmap_size)
            attention.attend = attend_in_own_precision if axial is None else axial
        if serialization > 1:
            check_serialization(dalle, serialization)
            dalle.text_emb = SerializedEmbedding(dalle.text_emb.weight, serialization)
            dalle.to_logits.linear = functools.partial(serialized_linear, factor=serialization)
        found = stages(places)
        poptorch.BeginBlock(dalle, user_id="stage 0", ipu_id=found[0][0])  # for operations before the first module
        for number, (ipu, modules) in enumerate(found):
            for module in modules:
                poptorch.BeginBlock(dalle.get_submodule(module), user_id=f"stage {number}", ipu_id=ipu)

    def forward(self, text: Tensor, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Compute total, text and image loss, fp32 scalars, of text int (B, T) and codes int (B, L) or pixels."""
        import poptorch

        losses = self.model(text, image, return_loss=True)
        return poptorch.identity_loss(losses.total, reduction="none"), losses.text, losses.image


def softmax_of_visible(scores: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Return the weights of scores (…, n, m) where `mask` (n, m) is True, in the scores' precision."""
    weights = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max).softmax(-1)
    return F.dropout(weights, dropout) if dropout else weights


def attend_in_own_precision(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """Do what transformer.attend does, with the softmax in fp16 if the model is: in fp32 it would take most memory."""
    scores = query * query.shape[-1] ** -0.5 @ keys.transpose(-1, -2)
    return softmax_of_visible(scores, mask, dropout) @ values


class AxialAttention:
    """Do what transformer.attend does for axial_row or axial_col, as the sparse products that they are.

    A code attends to the text and to the codes of its row (or column) up to itself. For 81 text positions and 16 × 16
    codes this takes 31,393 scores per head instead of the 112,896 of dense products with a mask. The softmax has the
    precision of the model.

    Args:
        text_len: length of the text, `<bos>` included.
        side: of the code grid.
        columns: whether codes attend along columns.
    """

    def __init__(self, text_len: int, side: int, columns: bool):
        self.text_len, self.side, self.columns = text_len, side, columns

    @staticmethod
    def scores(text_len: int, side: int) -> int:
        """Return the number of scores per head."""
        return text_len**2 + side**2 * (text_len + side)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
        count, side = self.text_len, self.side
        step = side if self.columns else 1  # between the codes of a line
        of_line = mask[count : count + step * side : step, count : count + step * side : step]
        (query, query_lines), (keys, key_lines), (values, value_lines) = (
            self.lines(x) for x in (query * query.shape[-1] ** -0.5, keys, values)
        )
        to_text = softmax_of_visible(query @ keys.transpose(-1, -2), mask[:count, :count], dropout)
        text = to_text @ values

        seen = torch.cat((torch.ones(side, count, dtype=torch.bool, device=mask.device), of_line), dim=1)
        with_text = (query_lines.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (side, side))
        scores = torch.cat((with_text, query_lines @ key_lines.transpose(-1, -2)), dim=-1)
        weights = softmax_of_visible(scores, seen, dropout)  # (B, H, side, side, T + 1 + side)
        codes = (weights[..., :count].flatten(2, 3) @ values).unflatten(2, (side, side))
        codes = codes + weights[..., count:] @ value_lines
        codes = codes.transpose(2, 3) if self.columns else codes
        return torch.cat((text, codes.flatten(2, 3)[:, :, :-1]), dim=2)

    def lines(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Split x (B, H, N, D) into text and lines of codes, (B, H, side, side, D); the code that is no input is 0."""
        codes = F.pad(x[:, :, self.text_len :], (0, 0, 0, 1)).unflatten(2, (self.side, self.side))
        return x[:, :, : self.text_len], codes.transpose(2, 3) if self.columns else codes


def axial_attention(mask: Tensor, text_len: int, side: int) -> Optional[AxialAttention]:
    """Return the sparse attention of a layer's mask, or None if its pattern is not axial."""
    for pattern in ("axial_row", "axial_col"):
        if torch.equal(mask, pattern_mask(pattern, text_len, side).to(mask.device)):
            return AxialAttention(text_len, side, pattern == "axial_col")
    return None


def unshare_masks(dalle: DALLE) -> None:
    """Copy the mask for each layer, because PopTorch loses all but the first of a buffer that modules share."""
    for layer in dalle.transformer.layers:
        layer.attention.mask = layer.attention.mask.clone()


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
            problem = f"does not divide the {size} {name}; {fitting} does"
            raise ValueError(f"--embedding-serialization-factor {factor} {problem}")


class SerializedEmbedding(nn.Module):
    """An nn.Embedding in `factor` pieces, each a parameter; state dicts have them as one `weight`."""

    def __init__(self, weight: Tensor, factor: int):
        super().__init__()
        self.rows = weight.shape[0] // factor
        for number, piece in enumerate(weight.detach().split(self.rows)):
            self.register_parameter(f"piece_{number}", nn.Parameter(piece.clone()))

    def forward(self, ids: Tensor) -> Tensor:
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


def serialized_linear(x: Tensor, weight: Tensor, bias: Tensor, factor: int) -> Tensor:
    """Do what F.linear does for x (B, n, dim), with its outputs in `factor` pieces, one after another."""
    import poptorch

    # Flat, because PopTorch can only split a plain matrix product.
    mode = poptorch.MatMulSerializationMode.OutputChannels
    product = poptorch.serializedMatMul(x.flatten(0, 1), weight.t(), mode, factor=factor)
    return (product + bias).view(*x.shape[:2], -1)
