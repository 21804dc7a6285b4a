"""Convert COCO's captions file to one text file per image; needs no images.

COCO (Lin et al., 2014) keeps the captions of all images, about five each, in one JSON file:

    {"images": [{"id": 139, "file_name": "000000000139.jpg"}, ...],
     "annotations": [{"image_id": 139, "caption": "A room with chairs."}, ...]}

They become the lines of 000000000139.txt. Training reads such a file itself (data/sources/captions_json.py); text files
are for other programs, and for captions that are to be edited.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, NamedTuple, Tuple, Union

from tqdm import tqdm

from data.sources.captions_json import default_name, image_names, read_json
from utils.files import atomic_write


class Written(NamedTuple):
    """How many files and captions write_caption_files wrote, and how many empty captions it skipped."""

    files: int
    captions: int
    empty: int


def write_caption_files(captions_file: Union[str, Path], out_dir: Union[str, Path]) -> Written:
    """Write a file in UTF-8 for each image, one caption per line, in the order of the file.

    A file is called like its image; if the JSON does not say how that is called, <image id, 12 digits>.txt. White space
    within a caption, including line breaks, becomes one space; nothing else is changed. Nothing is written until the
    whole file has been checked. Existing files are replaced.

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
        for name, captions in bar:
            with atomic_write(out_dir / name, text=True) as file:
                file.writelines(caption + "\n" for caption in captions)
    return Written(len(lines), sum(map(len, lines.values())), empty)


def read_captions(captions_file: Union[str, Path]) -> Tuple[Dict[str, List[str]], int]:
    """Return the captions of a COCO captions file by the name of their text file, and the number of empty ones."""
    captions: Dict[str, List[str]] = {}
    empty = 0
    path = Path(captions_file)
    content = _read_content(path)
    names = image_names(content)
    for index, entry in enumerate(content["annotations"]):
        fault = _fault(entry, names)
        if fault:
            raise ValueError(f"{captions_file}: annotation {index} {fault}; is it one of COCO's captions_*.json?")
        caption = " ".join((entry["caption"] or "").split())
        if caption:
            key = str(entry["image_id"])
            image = PurePosixPath(names.get(key) or default_name(key))
            captions.setdefault(image.with_suffix(".txt").name, []).append(caption)
        else:
            empty += 1
    if not captions:
        raise ValueError(f"{captions_file} has no caption")
    return captions, empty


def _read_content(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; utils/download_coco_dataset.sh downloads COCO's captions")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a captions JSON file is needed")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f'{path} has no list "annotations"; it is not a COCO captions file')
    return content


def _fault(entry: Any, names: Dict[str, str]) -> str:
    """Return what is wrong with an annotation, as the end of a sentence; empty if nothing is."""
    if not isinstance(entry, dict):
        return "is not an object"
    for key in ("image_id", "caption"):
        if key not in entry:
            return f'has no "{key}"'
    image_id, caption = entry["image_id"], entry["caption"]
    is_number = isinstance(image_id, int) and not isinstance(image_id, bool) and image_id >= 0
    if not is_number and not (isinstance(image_id, str) and image_id in names):
        return f'has the "image_id" {json.dumps(image_id)[:40]}, not a whole number of at least 0'
    if caption is None:  # some exports have images without captions
        return ""
    if not isinstance(caption, str):
        return f'has the "caption" {json.dumps(caption)[:40]}, not a text'
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which UTF-8 cannot
        return f'has the "caption" {json.dumps(caption)[:40]}, not valid Unicode'
    return ""
