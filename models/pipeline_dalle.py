"""The IPU's annotations, put on a plain DALLE from outside: stages, recomputation, and serialised embedding and head.

The model computes what it computed before, under the same names in its state dict. poptorch is named here and in
backends/ipu/backend.py only, and imported when an IPU run asks for it.
"""

import torch
from torch import nn
from torch.nn import functional as F


def placement(depth, *, layers_per_ipu, embedding_ipu_id=0, cls_ipu_id=None, pixels=False):
    """[(module of a DALLE, its IPU)] in the order in which a step enters them.

    The VQGAN (where a step is given pixels) is on IPU 0; layers_per_ipu[i] layers are on IPU i; the head is on the last
    IPU unless cls_ipu_id says otherwise. ValueError where the layers do not add up.
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


def stages(places):
    """A placement as pipeline stages, [(IPU, [modules])]: what follows one another on an IPU is one stage."""
    found = []
    for module, ipu in places:
        if not found or found[-1][0] != ipu:
            found.append((ipu, []))
        found[-1][1].append(module)
    return found


class WrappedDALLE(nn.Module):
    """A DALLE with an IPU's annotations, as PopTorch trains it: (text, image) → total, text and image loss.

    dalle is changed in place: its state dict and results stay what they were. serialization: the number of pieces in
    which the text embedding and the head are computed, so that their temporaries fit an IPU's memory; it has to divide
    text (with padding) and image vocabulary. places: see placement().
    """

    def __init__(self, dalle, places, serialization=1):
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
        poptorch.BeginBlock(dalle, user_id="stage 0", ipu_id=found[0][0])  # what comes before the first module
        for number, (ipu, modules) in enumerate(found):
            for module in modules:
                poptorch.BeginBlock(dalle.get_submodule(module), user_id=f"stage {number}", ipu_id=ipu)

    def forward(self, text, image):
        """text int (B, text_seq_len); image codes int (B, L), or pixels (B, 3, S, S) → three fp32 scalars."""
        import poptorch

        losses = self.model(text, image, return_loss=True)
        return poptorch.identity_loss(losses.total, reduction="none"), losses.text, losses.image


def unshare_masks(dalle):
    """Give each layer a mask of its own. PopTorch moves buffers module by module, and loses all but the first of one
    that several modules share.
    """
    for attention, _ in dalle.transformer.layers:
        attention.fn.fn.mask = attention.fn.fn.mask.clone()


def keep_output(module, inputs, output):
    """A forward hook: the output is kept for the backward pass, what lies between two of them is computed again."""
    import poptorch

    return poptorch.recomputationCheckpoint(output)


def check_serialization(dalle, factor):
    """ValueError in one line for a factor that does not divide the vocabularies."""
    sizes = {"text tokens with padding": dalle.num_text_tokens, "image tokens": dalle.num_image_tokens}
    for name, size in sizes.items():
        if size % factor:
            fitting = max(n for n in range(1, factor) if not any(size % n for size in sizes.values()))
            raise ValueError(
                f"--embedding-serialization-factor {factor} does not divide the {size} {name}; {fitting} does"
            )


class SerializedEmbedding(nn.Module):
    """An nn.Embedding whose rows are looked up in `factor` pieces, parameters of their own; one `weight` in files."""

    def __init__(self, weight, factor):
        super().__init__()
        self.rows = weight.shape[0] // factor
        for number, piece in enumerate(weight.detach().split(self.rows)):
            self.register_parameter(f"piece_{number}", nn.Parameter(piece.clone()))

    def forward(self, ids):
        """int (B, n) → (B, n, dim)."""
        found = 0
        for number, piece in enumerate(self.parameters()):
            local = ids - number * self.rows
            inside = (local >= 0) & (local < self.rows)
            rows = F.embedding(local.clamp(0, self.rows - 1), piece)
            found = found + rows * inside[..., None].to(rows.dtype)
        return found

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if keep_vars:  # the variables themselves are wanted, whatever their names: PopTorch does, to move them
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
            destination[f"{prefix}weight"] = torch.cat([piece.detach() for piece in self.parameters()])

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        rows = state_dict[f"{prefix}weight"].split(self.rows) if f"{prefix}weight" in state_dict else ()
        pieces = {f"{prefix}piece_{number}": piece for number, piece in enumerate(rows)}
        super()._load_from_state_dict(pieces, prefix, *rest)


class SerializedLinear:
    """F.linear whose outputs are computed in `factor` pieces one after the other."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x, weight, bias):
        """x (B, n, dim), weight (V, dim), bias (V,) → (B, n, V)."""
        import poptorch

        # Flat, because it is a plain matrix product that PopTorch can cut up.
        mode = poptorch.MatMulSerializationMode.OutputChannels
        product = poptorch.serializedMatMul(x.flatten(0, 1), weight.t(), mode, factor=self.factor)
        return (product + bias).view(*x.shape[:2], -1)
