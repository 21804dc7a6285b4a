"""Draw the demo set: captioned images of two colored shapes.

`python -m data.shapes` writes 64 × 64 images such as "a small red circle above a large blue square": 8 colors, 5
shapes, 2 sizes and 4 relations, five captions per image. data/shapes_reader.py reads such images back. There is
one folder per split:

    data/shapes/train/images/000000000001.png      data/shapes/train/captions/000000000001.txt   one caption per line
    data/shapes/val/images/000000020001.png        data/shapes/val/captions/000000020001.txt
    data/shapes/dataset.json                       settings

Image ids continue from `train` to `val`, so no stem occurs twice. A tenth of the (color, shape, relation, color, shape)
combinations is withheld from training, 560 of 5,600, the same ones for every seed and count: `train` shows none of them
and `val` nothing else. "A above B" and "B below A" are one image, so they are withheld together.

Every shape fills whole cells of an 8 × 8 grid, small ones 2 × 2 and large ones 3 × 3. An image tokenizer with one code
per cell then meets only 449 different patches.
"""

import hashlib
import itertools
import math
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from data.rendered_set import render_set, write_sample
from utils.command_line import COUNT, Parser, exit_on_error

VERSION = 1  # of the drawings and captions: raised when the same settings would give other files

BACKGROUND = (247, 244, 238)
COLORS = {
    "red": (214, 48, 49),
    "orange": (243, 132, 34),
    "yellow": (248, 206, 48),
    "green": (52, 162, 90),
    "blue": (45, 112, 214),
    "purple": (126, 66, 170),
    "pink": (246, 138, 184),
    "black": (52, 54, 64),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
RELATIONS = {
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
}
INVERSE = {"above": "below", "below": "above", "left": "right", "right": "left"}

GRID = 8  # cells per side
CELLS = {"small": 2, "large": 3}  # cells per side of a shape
CAPTIONS_PER_IMAGE = 5
CAPTION_TOKENS = 12  # most tokens of bpe/bpe_yttm_vocab.txt in a caption
LONG_WORDS = {"triangle": 2}  # tokens; every other word of the grammar is one

Combination = Tuple[str, str, str, str, str]  # color, shape, relation, color, shape


class Item(NamedTuple):
    """One shape as a caption names it; `size` is None if the caption does not mention it."""

    color: str
    shape: str
    size: Optional[str]


class Scene(NamedTuple):
    """Two items; `first` stands in `relation` ("above", "below", "left", "right") to `second`."""

    first: Item
    relation: str
    second: Item

    @property
    def combination(self) -> Combination:
        return (self.first.color, self.first.shape, self.relation, self.second.color, self.second.shape)

    def inverse(self) -> "Scene":
        return Scene(self.second, INVERSE[self.relation], self.first)


@lru_cache(maxsize=None)
def _combinations() -> Tuple[Tuple[Combination, ...], ...]:
    """Return what images can show, described from the upper or left shape: (to train, to choose, to score).

    The order comes from a hash of the words alone. The first tenth of each axis is withheld from training, and halved.
    """
    kinds = list(itertools.product(COLORS, SHAPES))
    train, choose, score = [], [], []
    for relation in ("above", "left"):
        axis = [(*a, relation, *b) for a, b in itertools.product(kinds, kinds) if a[0] != b[0]]
        axis.sort(key=lambda combination: hashlib.sha256(" ".join(combination).encode()).digest())
        tenth = len(axis) // 10
        choose += axis[: tenth // 2]
        score += axis[tenth // 2 : tenth]
        train += axis[tenth:]
    return tuple(train), tuple(choose), tuple(score)


# -------------------------------------------------------------------------------------------------- captions


def _describe_item(item: Item, article: bool, rng: random.Random) -> str:
    words = [rng.choice(SIZES[item.size])] if item.size else []
    words += [item.color, item.shape]
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def describe_scene(scene: Scene, rng: random.Random) -> str:
    """Return one caption from `first` to `second`, without sizes that are None; at most CAPTION_TOKENS tokens."""
    while True:  # the shortest wording, without articles, always fits: 11 tokens for two triangles
        article = rng.random() < 0.75
        opening = "there is " if article and rng.random() < 0.25 else ""
        first, second = _describe_item(scene.first, article, rng), _describe_item(scene.second, article, rng)
        caption = f"{opening}{first} {rng.choice(RELATIONS[scene.relation])} {second}"
        if sum(LONG_WORDS.get(word, 1) for word in caption.split()) <= CAPTION_TOKENS:
            return caption


def describe_differently(scene: Scene, rng: random.Random) -> List[str]:
    """Return five different captions, from either shape; the first one and about two others name both sizes."""
    captions: List[str] = []
    while len(captions) < CAPTIONS_PER_IMAGE:
        described = scene if rng.random() < 0.5 else scene.inverse()
        if captions and rng.random() < 0.5:
            unsized = (described.first._replace(size=None), described.second._replace(size=None))
            first, second = rng.choice(((described.first, unsized[1]), (unsized[0], described.second), unsized))
            described = Scene(first, described.relation, second)
        caption = describe_scene(described, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


def _alternatives(words: Mapping[str, Tuple[str, ...]]) -> Tuple[str, Dict[str, str]]:
    """Return a regular expression for all wordings, and the name that each of them stands for."""
    names = {wording: name for name, wordings in words.items() for wording in wordings}
    return "|".join(names), names


_SIZE, _SIZE_NAMES = _alternatives(SIZES)
_RELATION, _RELATION_NAMES = _alternatives(RELATIONS)
_ITEM = rf"(?:an? )?(?:({_SIZE}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"(?:there is )?{_ITEM} ({_RELATION}) {_ITEM}\.?")


def parse_caption(text: str) -> Scene:
    """Return the scene that a caption describes; ValueError if it is outside the grammar."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(f"caption {text!r} is not like 'a small red circle above a large blue square'")
    size1, color1, shape1, relation, size2, color2, shape2 = match.groups()
    first, second = Item(color1, shape1, _SIZE_NAMES.get(size1)), Item(color2, shape2, _SIZE_NAMES.get(size2))
    return Scene(first, _RELATION_NAMES[relation], second)


def validation_prompts(split: str, count: int = 256, seed: int = 0) -> List[str]:
    """Return different captions of withheld combinations that name both sizes: at most 1,120 per split.

    Args:
        split: "choose" (to choose sampling settings) or "score" (for reported figures); they share no combination.
        count: a shorter list is the beginning of a longer one with the same seed.
    """
    splits = dict(zip(("choose", "score"), _combinations()[1:]))
    if split not in splits:
        raise ValueError(f"split {split!r} is unknown: it should be 'choose' or 'score'")
    scenes = []
    for (c1, s1, relation, c2, s2), size1, size2 in itertools.product(splits[split], SIZES, SIZES):
        scene = Scene(Item(c1, s1, size1), relation, Item(c2, s2, size2))
        scenes += [scene, scene.inverse()]
    if not 1 <= count <= len(scenes):
        raise ValueError(f"count {count} is out of range: {split!r} has between 1 and {len(scenes)} prompts")
    rng = random.Random(f"prompts {split} {seed}")
    rng.shuffle(scenes)
    return [describe_scene(scene, rng) for scene in scenes[:count]]


# --------------------------------------------------------------------------------------------------- drawing


def _outline(shape: str, half: float) -> np.ndarray:
    """Return the corners of a polygon, (N, 2), x to the right and y down, in [-half, half] around its cells' center."""
    reach = half - 0.5  # half a pixel less, because the next cell has another code
    if shape == "square":  # as wide as the circle it would look bigger
        side = half - 2
        return np.array([(-side, -side), (side, -side), (side, side), (-side, side)])
    if shape == "triangle":
        return np.array([(0, -reach), (reach, 0.78 * reach), (-reach, 0.78 * reach)])
    turn = np.linspace(0, 2 * math.pi, 10 if shape == "star" else 72, endpoint=False)
    if shape == "circle":
        return reach / math.cos(math.pi / 72) * np.stack([np.sin(turn), np.cos(turn)], 1)
    if shape == "star":
        radius = reach / math.cos(math.radians(18)) * np.where(np.arange(10) % 2, 0.48, 1.0)
        points = radius[:, None] * np.stack([np.sin(turn), -np.cos(turn)], 1)
    else:  # the well-known heart curve is 32 units wide
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = reach / 16 * np.stack([16 * np.sin(turn) ** 3, -y], 1)
    points[:, 1] -= (points[:, 1].max() + points[:, 1].min()) / 2
    return points


@lru_cache(maxsize=None)
def coverage(shape: str, size: str, cell: int) -> np.ndarray:
    """Return how much of each pixel a shape covers: float32 (n, n) in [0, 1], n = 2 or 3 cells of `cell` pixels."""
    side, samples = CELLS[size] * cell, 8  # 8 × 8 points per pixel
    half = CELLS[size] * 4.0  # outlines are measured in 64ths of the image
    steps = ((np.arange(side * samples) + 0.5) / (side * samples) * 2 - 1) * half
    x, y = steps[None, :], steps[:, None]
    inside = np.zeros((side * samples, side * samples), dtype=bool)
    points = _outline(shape, half)
    # A point is inside if a ray to its left crosses the outline an odd number of times.
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0)):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x > x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return inside.reshape(side, samples, side, samples).mean((1, 3), dtype=np.float32)


@lru_cache(maxsize=None)
def _placements(relation: str, size1: str, size2: str) -> Tuple[Tuple[int, int, int, int], ...]:
    """Return the top left cells (row, column, row, column) possible for an upper or left shape and its partner.

    At least one empty cell lies between them, and they are at least twice as far apart along the relation as across.
    """
    n1, n2 = CELLS[size1], CELLS[size2]
    places = []
    for along1, across1 in itertools.product(range(GRID - n1 + 1), repeat=2):
        for along2, across2 in itertools.product(range(along1 + n1 + 1, GRID - n2 + 1), range(GRID - n2 + 1)):
            along = (2 * along2 + n2) - (2 * along1 + n1)  # between centers, in half cells
            across = abs((2 * across2 + n2) - (2 * across1 + n1))
            if along >= 2 * across:
                upright = relation == "above"
                places.append((along1, across1, along2, across2) if upright else (across1, along1, across2, along2))
    return tuple(places)


def draw_scene(scene: Scene, rng: random.Random, size: int = 64) -> np.ndarray:
    """Return an image of a scene with both sizes, at a random place: uint8 (size, size, 3), size a multiple of 8."""
    if scene.relation in ("below", "right"):
        scene = scene.inverse()
    cell = size // GRID
    row1, column1, row2, column2 = rng.choice(_placements(scene.relation, scene.first.size, scene.second.size))
    pixels = np.full((size, size, 3), BACKGROUND, dtype=np.uint8)
    for item, row, column in ((scene.first, row1, column1), (scene.second, row2, column2)):
        side = CELLS[str(item.size)] * cell
        top, left = row * cell, column * cell
        pixels[top : top + side, left : left + side] = _stamp(item, cell)
    return pixels


@lru_cache(maxsize=None)
def _stamp(item: Item, cell: int) -> np.ndarray:
    cover = coverage(item.shape, item.size, cell)[..., None]  # (n, n, 1)
    ground, paint = np.array(BACKGROUND, np.float32), np.array(COLORS[item.color], np.float32)
    return np.rint(ground + cover * (paint - ground)).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------- files


def make_sample(split: str, index: int, seed: int = 0, size: int = 64) -> Tuple[np.ndarray, List[str]]:
    """Return image `index` of "train" or "val", uint8 (size, size, 3), and its captions."""
    train, choose, score = _combinations()
    rng = random.Random(f"{split} {seed} {index}")  # a string seeds the same on every Python
    c1, s1, relation, c2, s2 = rng.choice(train if split == "train" else choose + score)
    scene = Scene(Item(c1, s1, rng.choice(tuple(SIZES))), relation, Item(c2, s2, rng.choice(tuple(SIZES))))
    return draw_scene(scene, rng, size), describe_differently(scene, rng)


def write_dataset(out: str, pictures: int = 20000, val: int = 1000, seed: int = 0, size: int = 64) -> bool:
    """Draw the set into `out`, unless it is there; ValueError for a bad size, or a folder of something else."""
    if not (32 <= size <= 1024 and size % GRID == 0):
        raise ValueError(f"--size {size} is out of range: it should be a multiple of {GRID} from 32 to 1024")
    settings = {"drawn_by": "data/shapes.py", "version": VERSION}
    settings.update(pictures=pictures, val=val, seed=seed, size=size)

    def render(folder: Path) -> None:
        for split, count, first in (("train", pictures, 1), ("val", val, pictures + 1)):
            for index in tqdm(range(count), desc=f"drawing {split}", unit="image", disable=None):
                write_sample(folder / split, first + index, *make_sample(split, index, seed, size))

    return render_set(out, settings, render)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = Parser("Draw the demo set of colored shapes.")
    parser.prog = "python -m data.shapes"
    parser.add_argument("--out", default="./data/shapes", help="folder for the set")
    parser.add_argument("--pictures", type=COUNT, default=20000, help="training images")
    parser.add_argument("--val", type=COUNT, default=1000, help="validation images, of withheld combinations")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument("--size", type=int, default=64, help="pixels per side, a multiple of 8")
    flags = parser.parse_args(argv)

    with exit_on_error():
        drawn = write_dataset(flags.out, flags.pictures, flags.val, flags.seed, flags.size)
        done = "drawn into" if drawn else "already drawn in"
        print(f"{flags.pictures} training and {flags.val} validation images {done} {flags.out}")


if __name__ == "__main__":
    main()
