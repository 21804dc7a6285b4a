"""Reads pictures of ``data/shapes.py`` back: which shapes they show, and whether they follow a caption.

Colour segmentation and geometry; nothing is learned and nothing here draws. The reader forgives what an image
tokenizer does to a picture (soft edges, slight noise and tints) and no more: a speck of 8 pixels counts as an object,
and an object that is of two colours, or has a bite out of it, follows no caption.
"""

from functools import lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from data.shapes import BACKGROUND, COLORS, SHAPES, SIZES, Item, coverage, parse_caption

SIDE = 64  # pictures are read at this size
WINDOW = 32  # pixels a side compared with the drawn shapes, of which the largest takes 24
FAINTEST = 45.0  # RGB distance from the background at which something begins; the palest colour is 119 away
SMALLEST = 8  # pixels; fewer are a speck and not counted (the smallest shape drawn has 88)
BESIDE = 45.0  # RGB distance from the mixtures of background and an object's colour at which a pixel is of another
PURITY = 0.9  # share of an object's inside that must be of its colour
TINT = 60.0  # RGB distance of an object's colour from the palette beyond which it has no name
LIKENESS = 0.8  # overlap with a drawn shape below which an object is no shape
BLEMISH = 10.0  # pixels missing, too many or of another colour within 5x5, above which it is none either
CLEARLY = 1.5  # how many times farther along the relation than across it, for it to hold

_NAMES = tuple(COLORS)
_PALETTE = np.float32([*COLORS.values(), BACKGROUND]) - np.float32(BACKGROUND)  # (9, 3), the background last
_TEMPLATES = tuple((shape, size) for shape in SHAPES for size in SIZES)


class Seen(NamedTuple):
    """An object in a picture: None where it is of no one colour, or like no shape.

    ``centre`` is that of its bounding box, (x, y) in pixels: centres of mass sit high in a heart and low in a triangle.
    """

    colour: Optional[str]
    shape: Optional[str]
    size: Optional[str]
    centre: Tuple[float, float]


@lru_cache(maxsize=None)
def _templates() -> np.ndarray:
    """Every shape and size with its centroid at the window's middle, give or take a pixel: (10, 9, WINDOW²) float32."""
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    stack = []
    for shape, size in _TEMPLATES:
        cover = _crisp(coverage(shape, size, SIDE // 8))
        top, left = (int(round(WINDOW / 2 - middle)) for middle in _centroid(cover))
        canvas = np.zeros((WINDOW, WINDOW), dtype=np.float32)
        canvas[top : top + len(cover), left : left + len(cover)] = cover
        stack.append([np.roll(canvas, shift, axis=(0, 1)).ravel() for shift in shifts])
    return np.array(stack)


def _crisp(cover: np.ndarray) -> np.ndarray:
    """Coverage with its edges steeper about the middle, so that blur moves them little."""
    return np.clip(3 * cover - 1, 0, 1)


def _centroid(cover: np.ndarray) -> Tuple[float, float]:
    """(y, x) of a coverage's centre of mass, in pixels from the outer corner."""
    places = np.arange(len(cover)) + 0.5
    across = np.arange(cover.shape[1]) + 0.5
    total = cover.sum()
    return float(cover.sum(1) @ places / total), float(cover.sum(0) @ across / total)


def _components(mask: np.ndarray) -> np.ndarray:
    """Labels (H, W) of the 8-connected regions of ``mask``: any positive number each, 0 outside."""
    height, width = mask.shape
    labels = np.zeros((height + 2, width + 2), dtype=np.int32)
    inner = labels[1:-1, 1:-1]
    inner[mask] = np.arange(1, mask.sum() + 1)
    while True:  # the highest number of each region spreads until nothing changes
        before = inner.copy()
        for _ in range(8):
            tall = np.maximum(np.maximum(labels[:-2], labels[2:]), labels[1:-1])  # (H, W + 2)
            inner[:] = np.maximum(np.maximum(tall[:, :-2], tall[:, 2:]), tall[:, 1:-1]) * mask
        if np.array_equal(before, inner):
            return before


def _inside(mask: np.ndarray) -> np.ndarray:
    """``mask`` without the rim of its regions, where colours mix with the background."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _find_paint(offsets: np.ndarray, core: np.ndarray) -> Tuple[Optional[str], np.ndarray, np.ndarray]:
    """The colour of an object, how much of each of its pixels that covers, and which pixels are of another colour.

    ``offsets`` (N, 3) are its pixels less the background, ``core`` (N,) marks those off the rim.
    """
    distance = np.linalg.norm(offsets, axis=-1)
    full = offsets[core & (distance >= 0.75 * distance[core].max())]  # hardly mixed with the background
    nearest = np.linalg.norm(full[:, None] - _PALETTE, axis=-1).argmin(-1)
    winner = int(np.bincount(nearest).argmax())
    paint = np.median(full[nearest == winner], axis=0)
    # A pixel of a soft edge lies on the way from the background to the paint, one of another colour beside it.
    cover = np.clip(offsets @ paint / (paint @ paint), 0, 1)
    other = np.linalg.norm(offsets - cover[:, None] * paint, axis=-1) > BESIDE
    named = winner < len(_NAMES) and np.linalg.norm(paint - _PALETTE[winner]) <= TINT
    pure = 1 - other[core].mean() >= PURITY
    return (_NAMES[winner] if named and pure else None), cover, other


def _match(cover: np.ndarray, stray: np.ndarray) -> Tuple[Optional[str], Optional[str]]:
    """(shape, size) of the drawn shape that a coverage (H, W) in [0, 1] overlaps best; (None, None) for a poor fit.

    ``stray`` (H, W) is 1 where the object has something that belongs to no such shape.
    """
    height, width = cover.shape
    if max(height, width) > WINDOW or not cover.any():
        return None, None
    top, left = (int(round(WINDOW / 2 - middle)) for middle in _centroid(cover))
    top, left = max(0, min(top, WINDOW - height)), max(0, min(left, WINDOW - width))
    window, strays = np.zeros((2, WINDOW, WINDOW), dtype=np.float32)
    window[top : top + height, left : left + width] = cover
    strays[top : top + height, left : left + width] = stray
    common = np.minimum(_templates(), window.ravel()).sum(-1)  # (10, 9)
    either = _templates().sum(-1) + window.sum() - common
    best, shift = np.unravel_index((common / either).argmax(), common.shape)
    wrong = np.maximum(np.abs(window - _templates()[best, shift].reshape(window.shape)), strays)
    blemish = sliding_window_view(wrong, (5, 5)).sum((2, 3)).max()
    alike = common[best, shift] >= LIKENESS * either[best, shift] and blemish <= BLEMISH
    return _TEMPLATES[best] if alike else (None, None)


def find_objects(pixels: np.ndarray) -> List[Seen]:
    """Every object in a square picture, (S, S, 3) uint8, in no particular order."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture is (S, S, 3) uint8, not {pixels.shape} {pixels.dtype}")
    scale = len(pixels) / SIDE
    if scale != 1:
        pixels = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.BOX))
    offsets = pixels - np.float32(BACKGROUND)  # (SIDE, SIDE, 3)
    mask = np.einsum("hwc,hwc->hw", offsets, offsets) > FAINTEST**2
    labels, inside = _components(mask), _inside(mask)
    seen = []
    for label, area in zip(*np.unique(labels[mask], return_counts=True)):
        if area < SMALLEST:
            continue
        ys, xs = np.nonzero(labels == label)
        core = inside[ys, xs]
        colour, cover, other = _find_paint(offsets[ys, xs], core if core.any() else ~core)
        shape = size = None
        if colour is not None:
            place = ys - ys.min(), xs - xs.min()
            box, stray = np.zeros((2, np.ptp(ys) + 1, np.ptp(xs) + 1), dtype=np.float32)
            box[place] = _crisp(cover)
            # The faint fringe of a shape is at most two pixels wide; farther out is a piece of something pale.
            near = sliding_window_view(np.pad(box, 2), (5, 5)).max((2, 3)) >= 0.5
            stray[place] = other | ~near[place]
            shape, size = _match(box, stray)
        middle = (xs.min() + xs.max() + 1) / 2 * scale, (ys.min() + ys.max() + 1) / 2 * scale
        seen.append(Seen(colour, shape, size, (float(middle[0]), float(middle[1]))))
    return seen


def _relation_holds(relation: str, first: Seen, second: Seen) -> bool:
    right, down = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    along = {"above": down, "below": -down, "left": right, "right": -right}[relation]
    across = right if relation in ("above", "below") else down
    return along > 0 and along >= CLEARLY * abs(across)


def faults(caption: str, pixels: np.ndarray) -> Tuple[str, ...]:
    """What a picture, (S, S, 3) uint8, gets wrong: among "count", "colour", "shape", "size" and "relation".

    Anything but two objects is ("count",) alone. Of two objects, each is taken for the one it is more like. A size that
    the caption leaves out is never wrong. ValueError for a caption that ``parse_caption`` does not understand.
    """
    scene = parse_caption(caption)
    seen = find_objects(pixels)
    if len(seen) != 2:
        return ("count",)

    def compared(first: Seen, second: Seen) -> Tuple[str, ...]:
        pairs: Sequence[Tuple[Item, Seen]] = ((scene.first, first), (scene.second, second))
        wrong = {
            "colour": any(item.colour != it.colour for item, it in pairs),
            "shape": any(item.shape != it.shape for item, it in pairs),
            "size": any(item.size not in (None, it.size) for item, it in pairs),
            "relation": not _relation_holds(scene.relation, first, second),
        }
        return tuple(name for name, is_wrong in wrong.items() if is_wrong)

    return min(compared(*seen), compared(*reversed(seen)), key=len)


def follows(caption: str, pixels: np.ndarray) -> bool:
    """Whether a picture shows what the caption says: two objects, their colours, shapes, stated sizes and relation."""
    return not faults(caption, pixels)


def prompt_accuracy(captions: Sequence[str], pictures: Sequence[np.ndarray]) -> float:
    """The share of pictures, (N, S, S, 3) uint8, that follow the caption of the same index."""
    if len(captions) != len(pictures) or not captions:
        raise ValueError(
            f"{len(captions)} captions and {len(pictures)} pictures: there should be one caption a picture"
        )
    return sum(follows(caption, pixels) for caption, pixels in zip(captions, pictures)) / len(captions)
