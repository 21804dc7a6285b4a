"""What the scenes of data/scenes.py show, and captions for them: objects, counts, sizes, relations, backgrounds.

A tenth of the pairs of objects and a tenth of the combinations of object and background color are withheld from
training, the same ones for every seed and count.
"""

import hashlib
import itertools
import random
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

PLAIN = "white"  # the background if a caption names none
BACKGROUNDS = {
    "white": (247, 244, 238),
    "blue": (150, 196, 240),
    "green": (166, 219, 160),
    "yellow": (250, 230, 130),
    "pink": (250, 190, 210),
    "orange": (250, 196, 130),
    "purple": (200, 178, 230),
    "gray": (190, 194, 198),
}
SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
RELATIONS = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "left": ("left of", "left of", "to the left of"),
    "right": ("right of", "right of", "to the right of"),
    "next": ("next to", "next to", "beside"),
    "and": ("and", "and", "with"),  # anywhere
}
DIRECTIONS = ("above", "below", "left", "right")
INVERSE = {"above": "below", "below": "above", "left": "right", "right": "left", "next": "next", "and": "and"}
COUNTS = {2: "two", 3: "three"}
PLURALS = {  # that do not follow the rules of plural()
    **{name: name for name in ("sheep", "deer", "fish", "goldfish", "jellyfish", "dice", "broccoli", "corn", "bread")},
    **{name: name for name in ("rice", "popcorn", "sushi", "bacon", "honey", "milk", "yarn", "cutlery", "lightning")},
    "mouse": "mice",
    "wolf": "wolves",
    "bunny": "bunnies",
    "leaf": "leaves",
    "knife": "knives",
    "scarf": "scarves",
    "man": "men",
    "woman": "women",
    "snowman": "snowmen",
}
CAPTIONS_PER_IMAGE = 3
OBJECTS_FILE = Path(__file__).with_name("scene_objects.txt")


class Item(NamedTuple):
    """One or more equal objects; `size` is None if the caption does not mention it."""

    name: str
    size: Optional[str]
    count: int = 1  # type: ignore[assignment]


class Scene(NamedTuple):
    """One to three items; of two items, the first stands in `relation` to the second. Three are anywhere ("and")."""

    items: Tuple[Item, ...]
    relation: str = "and"
    background: str = PLAIN


# -------------------------------------------------------------------------------------------------- objects


@lru_cache(maxsize=None)
def objects() -> Dict[str, Tuple[str, Tuple[str, ...]]]:
    """Return OpenMoji's code point and all names of each object, by its first name."""
    found = {}
    for line in OBJECTS_FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            code_point, names = line.split(" ", 1)
            names_of_object = tuple(names.split(", "))
            found[names_of_object[0]] = (code_point, names_of_object)
    return found


def _bucket(*words: str) -> int:
    """Return a number from 0 to 19 that depends on the words alone: 0 and 1 are withheld from training."""
    return int.from_bytes(hashlib.sha256(" + ".join(sorted(words)).encode()).digest()[:8], "big") % 20


@lru_cache(maxsize=None)
def split_of(first: str, second: str) -> str:
    """Return the split that may show two objects, or an object on a background color: "train", "choose" or "score"."""
    if first == second:
        return "train"
    return {0: "choose", 1: "score"}.get(_bucket(first, second), "train")


def withheld(scene: Scene) -> List[str]:
    """Return the splits, "choose" or "score", of each withheld pair or combination in a scene."""
    names = [item.name for item in scene.items]
    pairs = list(itertools.combinations(names, 2))
    if scene.background != PLAIN:
        pairs += [(name, f"{scene.background} background") for name in names]
    return [split for split in (split_of(*pair) for pair in pairs) if split != "train"]


# --------------------------------------------------------------------------------------------------- scenes


def random_scene(
    rng: random.Random, kind: str, relations: Sequence[str] = (*DIRECTIONS, *DIRECTIONS, "next", "and")
) -> Scene:
    """Return a scene of a kind: "one", "many" (equal objects), "two", "group" (two small ones and another), "three".

    Two objects stand in one of `relations`, which are equally likely; a relation may be given more than once.
    """
    names = list(objects())
    background = rng.choice(list(BACKGROUNDS)[1:]) if rng.random() < 0.4 else PLAIN
    chosen = rng.sample(names, {"one": 1, "many": 1, "two": 2, "group": 2, "three": 3}[kind])
    sizes = [rng.choice(tuple(SIZES)) for _ in chosen]
    if kind == "many":
        count = rng.choice((2, 2, 3))
        return Scene((Item(chosen[0], "small" if count == 3 else sizes[0], count),), background=background)
    if kind == "three":
        sizes = [size if index == 0 else "small" for index, size in enumerate(sizes)]
        rng.shuffle(sizes)
        return Scene(tuple(map(Item, chosen, sizes)), background=background)
    items = tuple(map(Item, chosen, sizes))
    if kind == "one":
        return Scene(items, background=background)
    if kind == "group":
        items = (Item(chosen[0], "small", 2), items[1])
        if rng.random() < 0.5:
            items = items[::-1]
        return Scene(items, rng.choice(DIRECTIONS), background)
    return Scene(items, rng.choice(relations), background)


# What training shows most is what a model has to remember: which of the objects that the caption names it has drawn.
# A direction tells which one is first; "next to", "and" and three objects do not.
KINDS = {"one": 4, "many": 8, "two": 54, "group": 8, "three": 26}  # percent of the training images
TRAINING_RELATIONS = (*DIRECTIONS, "next", "next", "and")


def training_scene(rng: random.Random) -> Scene:
    """Return a scene without withheld pairs and combinations."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        scene = random_scene(rng, kind, TRAINING_RELATIONS)
        if not withheld(scene):
            return scene


def withheld_scene(rng: random.Random, split: str, kind: str = "two") -> Scene:
    """Return a scene with a withheld pair, or an object on a withheld background if `kind` shows one.

    All of its pairs and combinations belong to training or to `split`.
    """
    while True:
        scene = random_scene(rng, kind)
        if kind == "two" and split_of(scene.items[0].name, scene.items[1].name) != split:
            continue
        if set(withheld(scene)) == {split}:
            return scene


def validation_scenes(split: str, count: int, seed: int = 0) -> List[Tuple[str, Scene]]:
    """Return captions that name both sizes, and their scenes: two objects that training never showed together.

    Args:
        split: "choose" (to choose sampling settings) or "score" (for reported figures); they share no pair.
        count: a shorter list is the beginning of a longer one with the same seed.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("choose", "score"):
        raise ValueError(f"split {split!r} is unknown: it should be 'choose' or 'score'")
    rng = random.Random(f"prompts {split} {seed}")
    scenes: List[Tuple[str, Scene]] = []
    while len(scenes) < count:
        scene = withheld_scene(rng, split)
        if scene.relation != "and":
            scenes.append((describe(scene, rng, first_names=True), scene))
    return scenes


# ------------------------------------------------------------------------------------------------- captions


def plural(name: str) -> str:
    """Return the plural of an object's name."""
    if name in PLURALS:
        return PLURALS[name]
    head, _, last = name.rpartition(" ")
    if last in PLURALS:
        return f"{head} {PLURALS[last]}".strip()
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return name if is_plural(name) else name + "es"
    if last.endswith("y") and last[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if last.endswith("to") else "s")


def is_plural(name: str) -> bool:
    """Return whether a name, like "scissors", takes no article."""
    singular = ("bus", "cactus", "octopus", "dress", "cross", "hourglass", "glass", "walrus", "wine glass", "canvas")
    return name.endswith("s") and name not in (*singular, "compass", "hibiscus", "magnifying glass")


def indefinite_article(word: str) -> str:
    """Return "a" or "an", as a word of the captions takes it."""
    return "an" if word[0] in "aeiou" and word not in ("unicorn", "ufo") else "a"


def _describe_item(item: Item, article: bool, rng: random.Random, first_names: bool) -> str:
    known = objects()[item.name][1]
    name = known[0] if first_names or rng.random() < 0.7 else rng.choice(known)
    words = [rng.choice(SIZES[item.size])] if item.size else []
    words.append(plural(name) if item.count > 1 else name)
    if item.count > 1:
        words.insert(0, COUNTS[item.count])
    elif article and not is_plural(name):
        words.insert(0, indefinite_article(words[0]))
    return " ".join(words)


def describe(scene: Scene, rng: random.Random, first_names: bool = False) -> str:
    """Return one caption of a scene, without sizes that are None.

    Args:
        first_names: use no other names of the objects.
    """
    article = rng.random() < 0.8
    items = [_describe_item(item, article, rng, first_names) for item in scene.items]
    if len(items) == 2:
        caption = f"{items[0]} {rng.choice(RELATIONS[scene.relation])} {items[1]}"
    else:
        caption = ", ".join(items[:-1]) + " and " * (len(items) > 1) + items[-1]
    if scene.background != PLAIN or rng.random() < 0.1:
        a = f"{indefinite_article(scene.background)} " if article or rng.random() < 0.5 else ""
        caption += f" on {a}{scene.background} background"
    return caption


def describe_differently(scene: Scene, rng: random.Random) -> List[str]:
    """Return different captions of a scene, the first one with all sizes."""
    captions: List[str] = []
    while len(captions) < CAPTIONS_PER_IMAGE:
        items = list(scene.items)
        if captions:
            items = [item if rng.random() < 0.6 else item._replace(size=None) for item in items]
        described = scene._replace(items=tuple(items))
        if len(items) == 2 and rng.random() < 0.5:
            described = Scene((items[1], items[0]), INVERSE[scene.relation], scene.background)
        elif len(items) == 3:
            rng.shuffle(items)
            described = scene._replace(items=tuple(items))
        caption = describe(described, rng)
        if caption not in captions:
            captions.append(caption)
    return captions
