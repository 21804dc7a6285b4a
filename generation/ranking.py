"""Scores of generated images, and the choice of the best.

The model's own score needs no pixels: it is log p(codes | caption), from one pass. Measured against alternatives in
docs/experiments.md.
"""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from generation.images import ImageSpec, to_image
from generation.loading import LoadedModel
from models.dalle import DALLE

ClipScore = Callable[[List[Image.Image], List[str]], Tensor]


@torch.no_grad()
def log_likelihood(dalle: DALLE, text: Tensor, codes: Tensor) -> Tensor:
    """Return log p(codes | text) in nats, float32 (B,), of text int64 (B, text_seq_len) and codes int64 (B, L)."""
    x = torch.cat((dalle.embed_text(dalle.number_padding(text)), dalle.embed_codes(codes[:, :-1])), dim=1)
    x = dalle.transformer(x)  # (B, T + L, dim)
    logits = dalle.image_logits(x[:, dalle.text_seq_len :]).float()  # (B, L, V)
    return -F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(dim=1)


def best_of(
    loaded: LoadedModel, specs: Sequence[ImageSpec], codes: Tensor, count: int, clip: Optional[ClipScore] = None
) -> List[Tuple[int, Optional[Dict[str, float]]]]:
    """Choose the best images of one prompt.

    Args:
        codes: int64 (n, L), of the images in `specs`.
        count: number of images to keep.
        clip: models/image_scores.clip_score, which decides if given.

    Returns:
        (index, scores by name) of each, the best first.
    """
    scores = {"likelihood": _likelihoods(loaded, specs, codes)}
    if clip is not None:
        scores["clip"] = _clip_scores(loaded, specs, codes, clip)
    deciding = scores["likelihood" if clip is None else "clip"]
    best = deciding.argsort(descending=True, stable=True)[:count].tolist()
    return [(index, {name: round(float(values[index]), 3) for name, values in scores.items()}) for index in best]


def _likelihoods(loaded: LoadedModel, specs: Sequence[ImageSpec], codes: Tensor) -> Tensor:
    device = next(loaded.model.parameters()).device
    text = torch.stack([spec.tokens for spec in specs]).to(device)
    parts = zip(text.split(loaded.batch_size), codes.to(device).split(loaded.batch_size))
    with loaded.backend.autocast():
        return torch.cat([log_likelihood(loaded.model, *part).cpu() for part in parts])


def _clip_scores(loaded: LoadedModel, specs: Sequence[ImageSpec], codes: Tensor, clip: ClipScore) -> Tensor:
    scores = []
    for first in range(0, len(specs), loaded.batch_size):
        part = slice(first, first + loaded.batch_size)
        images = [to_image(pixels) for pixels in loaded.decode(codes[part])]
        scores.append(clip(images, [spec.prompt for spec in specs[part]]))
    return torch.cat(scores)
