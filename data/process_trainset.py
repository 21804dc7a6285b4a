"""Convert COCO's captions file to one text file per image; needs no images.

COCO (Lin et al., 2014) keeps the captions of all images, about five each, in one JSON file:

    {"annotations": [{"image_id": 139, "caption": "A room with chairs."}, ...]}

They become the lines of 000000000139.txt, because the image is 000000000139.jpg.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple, Union

from tqdm import tqdm

from utils.files import atomic_write


class Written(NamedTuple):
    """How many files and captions write_caption_files wrote, and how many empty captions it skipped."""

    files: int
    captions: int
    empty: int


def write_caption_files(captions_file: Union[str, Path], out_dir: Union[str, Path]) -> Written:
    """Write `<out_dir>/<image id, 12 digits>.txt` in UTF-8, one caption per line, in the order of the file.

    White space within a caption, including line breaks, becomes one space; nothing else is changed. Nothing is written
    until the whole file has been checked. Existing files are replaced.

    Raises:
        ValueError: `captions_file` is not a COCO captions file, or `out_dir` is not a folder.
        OSError: one of them cannot be read or written.
    """
    lines, empty = read_captions(captions_file)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out_dir} is a file, or part of that path is; --out-dir takes a folder") from None
    with tqdm(lines.items(), desc="captions", unit="file", mininterval=0.5, disable=None) as bar:
        for image_id, captions in bar:
            with atomic_write(out_dir / f"{image_id:012d}.txt", text=True) as file:
                file.writelines(caption + "\n" for caption in captions)
    return Written(len(lines), sum(map(len, lines.values())), empty)


def read_captions(captions_file: Union[str, Path]) -> Tuple[Dict[int, List[str]], int]:
    """Return the captions of a COCO captions file by image id, cleaned, and the number of empty ones."""
    captions: Dict[int, List[str]] = {}
    empty = 0
    for index, entry in enumerate(_read_annotations(Path(captions_file))):
        fault = _fault(entry)
        if fault:
            raise ValueError(f"{captions_file}: annotation {index} {fault}; is it one of COCO's captions_*.json?")
        caption = " ".join(entry["caption"].split())
        if caption:
            captions.setdefault(entry["image_id"], []).append(caption)
        else:
            empty += 1
    if not captions:
        raise ValueError(f"{captions_file} has no caption")
    return captions, empty


def _read_annotations(path: Path) -> List[Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; utils/download_coco_dataset.sh downloads COCO's captions")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a captions JSON file is needed")
    try:
        with open(path, encoding="utf-8-sig") as file:  # also without the byte order mark that some editors add
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a JSON file, or is cut short: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path} is not a JSON file") from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f'{path} has no list "annotations"; it is not a COCO captions file')
    return annotations


def _fault(entry: Any) -> str:
    """Return what is wrong with an annotation, as the end of a sentence; empty if nothing is."""
    if not isinstance(entry, dict):
        return "is not an object"
    for key in ("image_id", "caption"):
        if key not in entry:
            return f'has no "{key}"'
    image_id, caption = entry["image_id"], entry["caption"]
    if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
        return f'has the "image_id" {json.dumps(image_id)[:40]}, not a whole number of at least 0'
    if not isinstance(caption, str):
        return f'has the "caption" {json.dumps(caption)[:40]}, not a text'
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which UTF-8 cannot
        return f'has the "caption" {json.dumps(caption)[:40]}, not valid Unicode'
    return ""
