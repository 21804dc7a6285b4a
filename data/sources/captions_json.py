"""Captions in JSON: COCO's captions_*.json (Lin et al., 2014) and Karpathy's dataset_*.json (2015).

    {"images": [{"id": 139, "file_name": "000000000139.jpg"}], "annotations": [{"image_id": 139, "caption": "…"}]}
    {"images": [{"filepath": "val2014", "filename": "….jpg", "split": "train", "sentences": [{"raw": "…"}]}]}

Other programs write {"a.jpg": "caption"} or [{"image": "a.jpg", "caption": "…"}]; these are read as tables.
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List

from data.files import clean_captions, printable
from data.sources.table import Entry
from utils.files import decode_text


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; ValueError that names it if it is none."""
    try:
        return json.loads(decode_text(path.read_bytes()))
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{printable(path)} is not a JSON file, or is cut short: {where}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{printable(path)} is not a JSON file") from None


def is_captions(content: Any) -> bool:
    """Return whether this is the content of COCO's or Karpathy's file."""
    if not isinstance(content, dict):
        return False
    annotations, images = content.get("annotations"), content.get("images")
    if isinstance(annotations, list):
        return any(isinstance(entry, dict) and "caption" in entry for entry in annotations[:1000])
    return isinstance(images, list) and any(isinstance(entry, dict) and "sentences" in entry for entry in images[:1000])


def read_entries(content: Any, path: Path, place: str = "") -> Iterator[Entry]:
    """Yield the images that a file lists, in its order."""
    if isinstance(content.get("annotations"), list):
        yield from _coco_entries(content, path, place)
        return
    for entry in content["images"]:
        if isinstance(entry, dict):
            name = "/".join(str(entry[key]) for key in ("filepath", "filename") if entry.get(key))
            sentences = entry.get("sentences") or []
            texts = [item.get("raw") if isinstance(item, dict) else item for item in sentences]
            yield Entry(name, clean_captions(texts), place, split=str(entry.get("split") or ""))


def _coco_entries(content: Dict[str, Any], path: Path, place: str) -> Iterator[Entry]:
    names = image_names(content)
    captions: Dict[str, List[Any]] = {key: [] for key in names}
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            captions.setdefault(str(entry.get("image_id")), []).append(entry.get("caption"))
    hint = re.sub(r"^captions_", "", path.stem)
    for key, texts in captions.items():
        yield Entry(names.get(key) or default_name(key), clean_captions(texts), place, hint)


def image_names(content: Dict[str, Any]) -> Dict[str, str]:
    """Return the file names of COCO's "images" by their ids as texts; empty if there are none."""
    images = content.get("images")
    entries = [image for image in (images if isinstance(images, list) else []) if isinstance(image, dict)]
    return {str(image.get("id")): image["file_name"] for image in entries if isinstance(image.get("file_name"), str)}


def default_name(image_id: str) -> str:
    """Return what COCO 2017 calls the image of an id, for files that do not say it."""
    return f"{int(image_id):012d}.jpg" if image_id.isascii() and image_id.isdigit() else f"{image_id}.jpg"
