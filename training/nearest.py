"""Compare generated images with the training images that are nearest to them, to see whether a model copies.

Two images are near if many of their codes are equal at the same place, or if their pixels differ little. How near two
training images are to each other says what is usual in a set.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from data.codes import CodeCache, load_codes
from data.images import load_image
from training.validation import make_sample_grid
from utils.files import atomic_write

if TYPE_CHECKING:
    from data.dataset import TextImageDataset
    from generation.loading import LoadedModel

SIDE = 32  # pixels that images are reduced to for the comparison
COPY = 0.5  # share of equal codes from which an image counts as a copy
MOST_USUAL = 256  # training images that are compared with the others
ROWS = "generated", "by codes", "by pixels"


class Found(NamedTuple):
    """The nearest image of each of N images, and the share of equal codes or the root mean square error."""

    which: Tensor  # int64 (N,)
    score: Tensor  # float (N,)


def nearest_by_codes(codes: Tensor, others: Tensor, exclude: Sequence[int] = ()) -> Found:
    """Return which of codes (M, L), but `exclude`, has most in common with each of codes (N, L), and the share."""
    equal = torch.stack([(one == others).float().mean(dim=1) for one in codes])  # (N, M)
    if exclude:
        equal[range(len(codes)), list(exclude)] = -1
    share, which = equal.max(dim=1)
    return Found(which, share)


def nearest_by_pixels(pixels: Tensor, others: Tensor) -> Found:
    """Return for each of pixels (N, 3, s, s) which of `others` (M, 3, s, s), both in [0, 255], differs least."""
    squares = torch.stack([(one.float() - others.float()).square().flatten(1).mean(dim=1) for one in pixels])  # (N, M)
    least, which = squares.min(dim=1)
    return Found(which, least.sqrt() / 255)


def compare(
    loaded: LoadedModel,
    training_set: TextImageDataset,
    captions: List[str],
    codes: Tensor,
    folder: Path,
    batch_size: int,
) -> Dict[str, Any]:
    """Find the nearest training images of generated ones, write nearest.png, print and return the figures.

    Args:
        training_set: images as pixels; each is read twice and encoded once.
        codes: of the generated images, int64 (N, L), one for each caption.
        folder: for nearest.png and, in `.codes`, the codes of the training images.
    """
    vae, small = loaded.model.vae, []
    cache = CodeCache(training_set.folder, folder / ".codes", vae)
    paths = training_set.image_paths()
    rows, index = load_codes(training_set.images, loaded.encode, cache, paths=paths, batch_size=min(batch_size, 16))
    good = np.flatnonzero(index >= 0)
    real = torch.from_numpy(rows[index[good]].astype(np.int64))
    for number in good:
        pixels = torch.from_numpy(load_image(paths[number], vae.image_size)).permute(2, 0, 1)
        small.append(adaptive_avg_pool2d(pixels.float(), SIDE).round().byte())
    generated = loaded.decode(codes)
    by_codes = nearest_by_codes(codes, real)
    by_pixels = nearest_by_pixels(adaptive_avg_pool2d(generated * 255, SIDE), torch.stack(small))
    some = torch.linspace(0, len(real) - 1, min(len(real), MOST_USUAL)).long()
    usual = nearest_by_codes(real[some], real, some.tolist()).score if len(real) > 1 else torch.zeros(1)

    shown = [
        torch.stack([torch.from_numpy(load_image(paths[good[one]], vae.image_size)) for one in found.which[:8]])
        for found in (by_codes, by_pixels)
    ]
    images = [generated[:8], *(pixels.permute(0, 3, 1, 2).float() / 255 for pixels in shown)]
    labels = [
        f"{caption} ({share:.0%} of codes, error {error:.3f})"
        for caption, share, error in zip(captions[:8], by_codes.score.tolist(), by_pixels.score.tolist())
    ]
    grid = make_sample_grid(labels, images, f"nearest of {len(real):,} training images", ROWS)
    with atomic_write(folder / "nearest.png") as file:
        grid.save(file, "PNG")
    copies = int((by_codes.score >= COPY).sum())
    print(
        f"nearest of {len(real):,} training images: {by_codes.score.median():.1%} of codes equal (median; "
        f"{usual.median():.1%} between training images), {copies} of {len(codes)} images with {COPY:.0%} or more; "
        f"error of pixels {by_pixels.score.median():.3f} (median); {folder / 'nearest.png'} has them"
    )
    names = [training_set.images[number][0] for number in good]
    return {
        "training_images": len(real),
        "equal_codes": by_codes.score.tolist(),
        "equal_codes_between_training_images": usual.median().item(),
        "copies": copies,
        "nearest_by_codes": [names[one] for one in by_codes.which.tolist()],
        "pixel_error": by_pixels.score.tolist(),
        "nearest_by_pixels": [names[one] for one in by_pixels.which.tolist()],
    }
