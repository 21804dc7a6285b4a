"""Read images of data/shapes.py back: which shapes they show, and whether they follow a caption.

This is color segmentation and geometry; nothing is learned. It tolerates what an image tokenizer does to an image (soft
edges, slight noise and tints) and no more: a speck of 8 pixels counts as an object, and an object of two colors, or
with a bite out of it, follows no caption.
"""

from functools import lru_cache
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from data.shapes import BACKGROUND, COLORS, SHAPES, SIZES, coverage, parse_caption

SIDE = 64  # images are read at this size
WINDOW = 32  # side in pixels of the window for comparing shapes; the largest shape takes 24
FAINTEST = 45.0  # RGB distance from the background at which an object begins; the palest color is 119 away
SMALLEST = 8  # pixels; fewer are a speck and not counted (the smallest shape has 88)
OTHER_COLOR = 45.0  # RGB distance from all mixtures of the background and the object's color
PURITY = 0.9  # least share of an object's inside that has its color
TINT = 60.0  # largest RGB distance of an object's color from one of the palette
LIKENESS = 0.8  # least overlap (intersection over union) with a drawn shape
BLEMISH = 10.0  # most pixels that are missing, too many or of another color within 5 × 5
CLEARLY = 1.5  # how many times farther along a relation than across it, for it to hold

_NAMES = tuple(COLORS)
_GROUND = np.array(BACKGROUND, np.float32)
_PALETTE = np.array([*COLORS.values(), BACKGROUND], np.float32) - _GROUND  # (9, 3), the background last
_TEMPLATES = tuple((shape, size) for shape in SHAPES for size in SIZES)


class Seen(NamedTuple):
    """An object in an image; None if it has no single color, or is like no shape."""

    color: Optional[str]
    shape: Optional[str]
    size: Optional[str]
    center: Tuple[float, float]  # of its box, (x, y) in pixels; that of mass is high in a heart and low in a triangle


@lru_cache(maxsize=None)
def _templates() -> np.ndarray:
    """Return every shape and size at 9 places around the window's center: float32 (10, 9, WINDOW²)."""
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
    """Return a coverage with steeper edges, so that blur moves them less."""
    return np.clip(3 * cover - 1, 0, 1)


def _centroid(cover: np.ndarray) -> Tuple[float, float]:
    """Return a coverage's center of mass (y, x), in pixels from the outer corner."""
    places = np.arange(len(cover)) + 0.5
    across = np.arange(cover.shape[1]) + 0.5
    total = cover.sum()
    return float(cover.sum(1) @ places / total), float(cover.sum(0) @ across / total)


def _components(mask: np.ndarray) -> np.ndarray:
    """Return labels (H, W) of the mask's 8-connected regions: a positive number for each, 0 outside."""
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
    """Return the mask without the rims of its regions, where colors mix with the background."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _find_paint(offsets: np.ndarray, core: np.ndarray) -> Tuple[Optional[str], np.ndarray, np.ndarray]:
    """Return an object's color, how much of each pixel it covers (N,), and which pixels have another color (N,).

    Args:
        offsets: the object's pixels minus the background, (N, 3).
        core: which of them are not on the rim, (N,).
    """
    distance = np.linalg.norm(offsets, axis=-1)
    full = offsets[core & (distance >= 0.75 * distance[core].max())]  # hardly mixed with the background
    nearest = np.linalg.norm(full[:, None] - _PALETTE, axis=-1).argmin(-1)
    winner = int(np.bincount(nearest).argmax())
    paint = np.median(full[nearest == winner], axis=0)
    # A pixel of a soft edge lies on the line from the background to the paint; one of another color lies off it.
    cover = np.clip(offsets @ paint / (paint @ paint), 0, 1)
    other = np.linalg.norm(offsets - cover[:, None] * paint, axis=-1) > OTHER_COLOR
    named = winner < len(_NAMES) and np.linalg.norm(paint - _PALETTE[winner]) <= TINT
    pure = 1 - other[core].mean() >= PURITY
    return (_NAMES[winner] if named and pure else None), cover, other


def _match(cover: np.ndarray, stray: np.ndarray) -> Tuple[Optional[str], Optional[str]]:
    """Return (shape, size) of the drawn shape that a coverage (H, W) in [0, 1] overlaps best.

    `stray` (H, W) is 1 for pixels that belong to no such shape. A poor fit gives (None, None).
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
    """Return every object in a square image, uint8 (S, S, 3), in no particular order."""
    scale = len(pixels) / SIDE
    if scale != 1:
        pixels = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))
    offsets = pixels - _GROUND  # (SIDE, SIDE, 3)
    mask = np.einsum("hwc,hwc->hw", offsets, offsets) > FAINTEST**2
    labels, inside = _components(mask), _inside(mask)
    seen = []
    for label, area in zip(*np.unique(labels[mask], return_counts=True)):
        if area < SMALLEST:
            continue
        ys, xs = np.nonzero(labels == label)
        core = inside[ys, xs]
        color, cover, other = _find_paint(offsets[ys, xs], core if core.any() else ~core)
        shape = size = None
        if color is not None:
            place = ys - ys.min(), xs - xs.min()
            box, stray = np.zeros((2, np.ptp(ys) + 1, np.ptp(xs) + 1), dtype=np.float32)
            box[place] = _crisp(cover)
            # A shape's faint fringe is at most two pixels wide; anything farther out does not belong to it.
            near = sliding_window_view(np.pad(box, 2), (5, 5)).max((2, 3)) >= 0.5
            stray[place] = other | ~near[place]
            shape, size = _match(box, stray)
        middle = (xs.min() + xs.max() + 1) / 2 * scale, (ys.min() + ys.max() + 1) / 2 * scale
        seen.append(Seen(color, shape, size, (float(middle[0]), float(middle[1]))))
    return seen


def _relation_holds(relation: str, first: Seen, second: Seen) -> bool:
    right, down = second.center[0] - first.center[0], second.center[1] - first.center[1]
    along = {"above": down, "below": -down, "left": right, "right": -right}[relation]
    across = right if relation in ("above", "below") else down
    return along > 0 and along >= CLEARLY * abs(across)


def find_faults(caption: str, pixels: np.ndarray) -> Tuple[str, ...]:
    """Return what an image, uint8 (S, S, 3), gets wrong: among "count", "colour", "shape", "size" and "relation".

    Anything but two objects is ("count",) alone. The two are assigned to the caption's items so that fewest faults
    remain. A size that the caption does not name is never wrong. ValueError as for parse_caption.
    """
    scene = parse_caption(caption)
    seen = find_objects(pixels)
    if len(seen) != 2:
        return ("count",)

    def compare(first: Seen, second: Seen) -> Tuple[str, ...]:
        pairs = ((scene.first, first), (scene.second, second))
        wrong = {
            "colour": any(item.color != it.color for item, it in pairs),
            "shape": any(item.shape != it.shape for item, it in pairs),
            "size": any(item.size not in (None, it.size) for item, it in pairs),
            "relation": not _relation_holds(scene.relation, first, second),
        }
        return tuple(name for name, is_wrong in wrong.items() if is_wrong)

    return min(compare(*seen), compare(*reversed(seen)), key=len)
