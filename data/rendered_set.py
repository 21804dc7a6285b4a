"""Folders of images that the program renders itself: replaced if their settings change, and never other files."""

import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import numpy as np
from PIL import Image

from utils.files import replace_folder

SETTINGS_FILE = "dataset.json"


def render_set(out: str, settings: Dict[str, Any], render: Callable[[Path], None]) -> bool:
    """Let `render` fill the folder `out`, unless it holds the set with these settings; return whether it was rendered.

    A set that the same program, settings["drawn_by"], rendered with other settings is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    target = Path(os.path.realpath(out))
    try:
        found = json.loads((target / SETTINGS_FILE).read_text(encoding="utf-8"))
        is_ours = found["drawn_by"] == settings["drawn_by"]
    except (OSError, ValueError, LookupError, TypeError):
        found, is_ours = None, False
    if found == settings:
        return False
    if not is_ours and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        expected = f"an empty or new folder, or a set drawn by {settings['drawn_by']}"
        raise ValueError(f"--out {out} holds other files: it should be {expected}")
    with replace_folder(out) as draft:
        render(draft)
        (draft / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return True


def write_sample(folder: Path, number: int, pixels: np.ndarray, captions: Sequence[str]) -> None:
    """Write an image, uint8 (S, S, 3), and its captions into the folders `images` and `captions`, created if needed."""
    images, texts = folder / "images", folder / "captions"
    images.mkdir(parents=True, exist_ok=True)
    texts.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(images / f"{number:012d}.png", compress_level=1)
    (texts / f"{number:012d}.txt").write_text("".join(f"{text}\n" for text in captions), encoding="utf-8")
