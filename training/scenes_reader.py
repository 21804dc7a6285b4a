"""Read images of data/scenes.py back: objects, their sizes and places, and whether the image follows a caption.

    python -m training.scenes_reader                                    train the reader, measure it on renderings
    python -m training.scenes_reader --vae-path output/scenes/vqgan     the same, and on VQGAN reconstructions
    python -m training.scenes_reader --measure                          measure the one that exists

The reader is a small convolutional network, trained on crowds of objects with blur and noise. It knows
where objects can lie (data/scenes.py's grid of 12 × 12 cells) and asks for every place whether one lies there, which
one, and in which size. The background is the palette's color that most pixels are nearest to.
"""

import itertools
import logging
import random
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import log
from data.scene_captions import BACKGROUNDS, Scene, objects, withheld_scene
from data.scenes import CELLS, GRID, Placed, draw, place, place_crowd
from training.checkpoints import write
from utils.command_line import COUNT, Parser, exit_on_error
from utils.muon import has_amx
from utils.optimization import cosine

logger = logging.getLogger("minidalle")
WEIGHTS = Path("output/scenes/reader.pt")
SIDE = 96  # pixels; images are read at this size
CHANNELS = 128
STEPS, BATCH, RATE = 3000, 32, 3e-3
TEST_IMAGES = 1000
FAULTS = ("objects", "size", "relation", "background")
NEAR = 3  # most empty cells between objects that are next to each other

_NAMES = tuple(objects())
_SIZES = tuple(CELLS)


class Reading(NamedTuple):
    """What an image shows."""

    objects: List[Placed]
    background: str


def _convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, side, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.Sequential(*_convolution(channels, channels, 3), *_convolution(channels, channels, 3))
        del self.convs[-1]  # the last ReLU comes after the sum

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.convs(x))


class Reader(nn.Module):
    """Maps pixels (B, 3, 96, 96) in [0, 1] to presence logits (B, 2, 12, 12) and class logits (B, classes, 12, 12).

    Both are for objects whose middle is the upper left corner of the cell; presence is by size, small and large.
    """

    def __init__(self) -> None:
        super().__init__()
        quarter, half = CHANNELS // 4, CHANNELS // 2
        self.stem = nn.Sequential(_convolution(3, quarter, 4, 2), _convolution(quarter, half, 4, 2))
        self.body = nn.Sequential(_convolution(half, CHANNELS, 4, 2), *[_Block(CHANNELS) for _ in range(3)])
        self.presence = nn.Conv2d(CHANNELS, len(_SIZES), 1)
        self.classes = nn.Conv2d(CHANNELS, len(_NAMES), 1)

    def forward(self, pixels: Tensor) -> Tuple[Tensor, Tensor]:
        features = self.body(self.stem(pixels - 0.5))
        return self.presence(features), self.classes(features)

    @torch.no_grad()
    def read(self, images: Tensor) -> List[Reading]:
        """Read (N, 3, S, S) images in [0, 1]; for a reader in evaluation mode."""
        readings = []
        for batch in _resize(images.float()).split(64):
            presence, classes = self(batch)
            names = classes.argmax(dim=1)
            palette = torch.tensor(list(BACKGROUNDS.values())) / 255  # (8, 3)
            distances = (batch[:, None] - palette[None, :, :, None, None]).square().sum(dim=2)  # (B, 8, S, S)
            grounds = F.one_hot(distances.argmin(dim=1).flatten(1), len(palette)).sum(dim=1).argmax(dim=1)
            for index, ground in enumerate(grounds.tolist()):
                found = _objects(presence[index], names[index])
                readings.append(Reading(found, tuple(BACKGROUNDS)[ground]))
        return readings


def _resize(images: Tensor) -> Tensor:
    if images.shape[-1] == SIDE:
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def _objects(presence: Tensor, names: Tensor) -> List[Placed]:
    """Return the objects at places with a positive logit that overlap no surer one, from (2, 12, 12) and (12, 12)."""
    found: List[Placed] = []
    for size, y, x in sorted((presence > 0).nonzero().tolist(), key=lambda at: -presence[tuple(at)].item()):
        side = CELLS[_SIZES[size]]
        one = Placed(_NAMES[names[y, x]], _SIZES[size], y - side // 2, x - side // 2)
        if all(_overlap(one, other) <= 0.25 for other in found):
            found.append(one)
    return found


def _overlap(one: Placed, other: Placed) -> float:
    """Return the common area of two objects as a share of the smaller one's."""
    side1, side2 = CELLS[one.size], CELLS[other.size]
    height = min(one.row + side1, other.row + side2) - max(one.row, other.row)
    width = min(one.column + side1, other.column + side2) - max(one.column, other.column)
    return max(0, height) * max(0, width) / min(side1, side2) ** 2


# -------------------------------------------------------------------------------------------------- captions


def find_faults(scene: Scene, reading: Reading) -> List[str]:
    """Return which of FAULTS an image has, compared with a scene; none if it shows the scene.

    If the objects are wrong, so are sizes and relation. Sizes count only if the scene names them.
    """
    faults = [] if reading.background == scene.background else ["background"]
    wanted = sorted(item.name for item in scene.items for _ in range(item.count))
    if sorted(one.name for one in reading.objects) != wanted:
        return ["objects", "size", "relation", *faults]
    groups = [[one for one in reading.objects if one.name == item.name] for item in scene.items]
    for item, group in zip(scene.items, groups):
        if item.size and any(one.size != item.size for one in group):
            faults.append("size")
            break
    if len(groups) == 2 and not _holds(scene.relation, groups[0], groups[1]):
        faults.append("relation")
    return faults


def _holds(relation: str, first: Sequence[Placed], second: Sequence[Placed]) -> bool:
    """Return whether all of the first objects stand in a relation to all of the second."""
    if relation in ("below", "right"):
        return _holds({"below": "above", "right": "left"}[relation], second, first)
    if relation == "and":
        return True
    if relation == "next":
        gaps = [max(_gap(a, b, "left"), _gap(b, a, "left")) for a, b in itertools.product(first, second)]
        return all(-1 <= gap <= NEAR for gap in gaps) and (
            _holds("left", first, second) or _holds("left", second, first)
        )
    (y1, x1), (y2, x2) = _center(first), _center(second)
    along, aside = (y2 - y1, x2 - x1) if relation == "above" else (x2 - x1, y2 - y1)
    return along > abs(aside) and all(_gap(a, b, relation) >= -1 for a, b in itertools.product(first, second))


def _gap(one: Placed, other: Placed, relation: str) -> int:
    """Return the cells between an upper or left object and another one; negative if they overlap along the axis."""
    if relation == "above":
        return other.row - one.row - CELLS[one.size]
    return other.column - one.column - CELLS[one.size]


def _center(group: Sequence[Placed]) -> Tuple[float, float]:
    rows = [one.row + CELLS[one.size] / 2 for one in group]
    columns = [one.column + CELLS[one.size] / 2 for one in group]
    return sum(rows) / len(rows), sum(columns) / len(columns)


# -------------------------------------------------------------------------------------------------- training


def _blur_and_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return (B, 3, S, S) images, half of them blurred, with noise and slightly different brightness."""
    count = len(images)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    blurred = images
    for _ in range(int(torch.randint(1, 3, (), generator=generator))):
        weight = (kernel[:, None] * kernel)[None, None].expand(3, 1, 3, 3)
        blurred = F.conv2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    share = torch.rand((count, 1, 1, 1), generator=generator) * (
        torch.rand((count, 1, 1, 1), generator=generator) < 0.5
    )
    images = images + share * (blurred - images)
    noise = torch.randn(images.shape, generator=generator) * 0.06 * torch.rand((count, 1, 1, 1), generator=generator)
    tint = torch.randn((count, 3, 1, 1), generator=generator) * 0.02
    return (images + noise + tint).clamp(0, 1)


def _targets(crowds: Sequence[Sequence[Placed]]) -> Tuple[Tensor, Tensor]:
    """Return presence (B, 2, 12, 12) as 0 or 1 and classes int64 (B, 12, 12), -1 for no object."""
    presence = torch.zeros(len(crowds), len(_SIZES), GRID, GRID)
    classes = torch.full((len(crowds), GRID, GRID), -1)
    for index, crowd in enumerate(crowds):
        for name, size, row, column in crowd:
            middle = CELLS[size] // 2
            presence[index, _SIZES.index(size), row + middle, column + middle] = 1
            classes[index, row + middle, column + middle] = _NAMES.index(name)
    return presence, classes


def _random_crowds(rng: random.Random, count: int) -> Tuple[List[List[Placed]], Tensor]:
    crowds = [place_crowd(rng) for _ in range(count)]
    images = [draw(crowd, rng.choice(tuple(BACKGROUNDS)), SIDE) for crowd in crowds]
    return crowds, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def train_reader(steps: int = STEPS, reconstruct: Any = None) -> Reader:
    """Train a reader on the CPU.

    Args:
        reconstruct: a function of (B, 3, 96, 96) images in [0, 1]; every fourth batch is what it returns.
    """
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), RATE, weight_decay=0.01)
    with tqdm(range(steps), desc="training the reader", unit="step", disable=None) as bar:
        for step in bar:
            crowds, images = _random_crowds(rng, BATCH)
            if reconstruct is not None and step % 4 == 3:
                images = reconstruct(images)
            wanted_presence, wanted_classes = _targets(crowds)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_amx()):
                presence, classes = reader(_blur_and_noise(images, generator))
            loss = F.cross_entropy(classes.float(), wanted_classes, ignore_index=-1)
            loss = loss + 20 * F.binary_cross_entropy_with_logits(presence.float(), wanted_presence)
            optimizer.param_groups[0]["lr"] = RATE * cosine(step, steps, steps // 10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 49:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
    return reader.eval()


def measure(reader: Reader, reconstruct: Any = None, count: int = TEST_IMAGES, seed: int = 1) -> Dict[str, float]:
    """Return the shares of withheld scenes whose objects, sizes and background, places, and all are read right."""
    rng = random.Random(f"reader {seed}")
    scenes, places, images = [], [], []
    for _ in range(count):
        scene = withheld_scene(rng, rng.choice(("choose", "score")))
        placed = place(scene, rng)
        scenes.append(scene)
        places.append(placed)
        images.append(draw(placed, scene.background, 2 * SIDE))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    if reconstruct is not None:
        pixels = torch.cat([reconstruct(part) for part in pixels.split(32)])
    readings = reader.read(pixels)
    same = [sorted(reading.objects) == sorted(placed) for reading, placed in zip(readings, places)]
    faults = [find_faults(scene, reading) for scene, reading in zip(scenes, readings)]
    shares = {name: sum(name not in found for found in faults) / count for name in ("objects", "size", "background")}
    return {**shares, "places": sum(same) / count, "all": sum(not found for found in faults) / count}


def load_reader(path: Path = WEIGHTS) -> Reader:
    """Load the reader; if the file does not exist, train one and save it, which takes minutes.

    Raises:
        ValueError: the file is damaged or of another list of objects, or it does not exist, and the drawings to train
            a reader are not installed.
    """
    if not path.is_file():
        logger.info("%s: not there yet; training the reader once, which takes minutes", path)
        try:
            reader = train_reader()
        except ModuleNotFoundError as error:  # few users of evaluate.py need it
            raise ValueError(f"{error.name} is missing: pip install -r requirements-scenes.txt") from error
        save_reader(reader, path)
        return reader
    reader = Reader()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["names"] != list(_NAMES):
            raise ValueError("it knows other objects")
        reader.load_state_dict(state["weights"])
    except Exception as error:
        raise ValueError(f"{path}: cannot be used to read scenes ({error}); delete it to train a new one") from error
    return reader.eval()


def save_reader(reader: Reader, path: Path = WEIGHTS) -> None:
    """Write the reader's weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, {"names": list(_NAMES), "weights": reader.state_dict()})


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command that the flags describe."""
    parser = Parser("Train and measure the reader of scenes.")
    parser.prog = "python -m training.scenes_reader"
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file of the weights")
    parser.add_argument("--steps", type=COUNT, default=STEPS, help="training steps")
    parser.add_argument("--vae-path", help="VQGAN whose reconstructions to train and measure on, too")
    parser.add_argument("--measure", action="store_true", help="measure the reader in --out instead of training one")
    flags = parser.parse_args(argv)

    log.set_up()
    with exit_on_error("requirements-scenes.txt"):
        if flags.measure and not flags.out.is_file():
            raise ValueError(f"--out {flags.out}: no such file; without --measure a reader is trained")
        reconstruct = _reconstruction(flags.vae_path) if flags.vae_path else None
        reader = load_reader(flags.out) if flags.measure else train_reader(flags.steps, reconstruct=reconstruct)
        if not flags.measure:
            save_reader(reader, flags.out)
        for title, function in (("renderings", None), ("reconstructions", reconstruct)):
            if title == "renderings" or function is not None:
                shares = measure(reader, function)
                line = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
                print(f"{TEST_IMAGES} withheld {title} read right: {line}")


def _reconstruction(vae_path: str) -> Any:
    from models.vqgan_files import load_vqgan

    vae = load_vqgan(vae_path)

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        full = F.interpolate(images, size=(vae.image_size,) * 2, mode="bilinear", align_corners=False)
        return _resize(vae.decode(vae.get_codebook_indices(full)))

    return reconstruct


if __name__ == "__main__":
    main()
