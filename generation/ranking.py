"""Scores of drawn pictures, by which the best of several are kept.

`likelihood` is the model's own, from codes; `clip` a network's that the user brings (models/image_scores.py).
"""

import torch

from generation.output import to_image
from models.likelihood import CONTRAST, caption_score


def likelihoods(loaded, pictures, codes):
    """How well each picture's codes (B, L) explain its prompt, in nats: fp32 (B,); see models/likelihood.py."""
    device = next(loaded.model.parameters()).device
    text = torch.stack([one.tokens for one in pictures]).to(device)
    parts = zip(text.split(loaded.batch_size), codes.to(device).split(loaded.batch_size))
    contrast = CONTRAST if loaded.guidable else 0
    with loaded.backend.autocast():
        return torch.cat([caption_score(loaded.model, *part, contrast=contrast).cpu() for part in parts])


def best_of(loaded, pictures, codes, count, clip=None):
    """The `count` best of pictures of one prompt, the best first: a list of (place, {name: score}).

    Where all are kept, nothing is scored: they stay in their order, with no scores. clip: a score of
    models/image_scores.clip_score, which then decides.
    """
    if count >= len(pictures):
        return [(place, None) for place in range(len(pictures))]
    figures = {"likelihood": likelihoods(loaded, pictures, codes)}
    if clip is not None:
        figures["clip"] = clip_scores(loaded, pictures, codes, clip)
    deciding = figures["likelihood" if clip is None else "clip"]
    best = deciding.argsort(descending=True, stable=True)[:count].tolist()
    return [(place, {name: round(float(scores[place]), 3) for name, scores in figures.items()}) for place in best]


def clip_scores(loaded, pictures, codes, clip):
    parts = []
    for first in range(0, len(pictures), loaded.batch_size):
        part = slice(first, first + loaded.batch_size)
        images = [to_image(pixels) for pixels in loaded.decode(codes[part])]
        parts.append(clip(images, [one.prompt for one in pictures[part]]))
    return torch.cat(parts)
