"""COCO's captions file to one text file a picture, as the loader wants captions; needs no pictures and touches none.

COCO (Lin et al., 2014) keeps the captions of all its pictures, five or so each, in one JSON file:

    {"annotations": [{"image_id": 139, "caption": "A room with chairs."}, ...]}

They become the lines of 000000000139.txt, named as the picture 000000000139.jpg is.
"""

import json
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple, Union

from tqdm import tqdm


class Written(NamedTuple):
    """What `write_caption_files` did."""

    files: int
    captions: int
    empty: int  # captions of white space, left out


def write_caption_files(captions_file: Union[str, Path], out_dir: Union[str, Path]) -> Written:
    """Writes `<out_dir>/<image id, 12 digits>.txt` in UTF-8, one caption a line, in the order of the file.

    Within a caption any run of white space, line breaks included, becomes one space; nothing else is changed. Nothing
    is written before the whole file has been found good. A file that is there already is replaced.

    Raises ValueError if `captions_file` is not a COCO captions file or `out_dir` is not a folder, OSError if one of
    them cannot be read or written.
    """
    lines, empty = read_captions(captions_file)
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; --out-dir takes a folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out_dir} cannot be made: part of that path is a file; --out-dir takes a folder") from None
    with tqdm(lines.items(), desc="captions", unit="file", mininterval=0.5, disable=None) as bar:
        for image_id, captions in bar:
            _write(out_dir / f"{image_id:012d}.txt", "".join(caption + "\n" for caption in captions))
    return Written(len(lines), sum(map(len, lines.values())), empty)


def read_captions(captions_file: Union[str, Path]) -> Tuple[Dict[int, List[str]], int]:
    """The captions of a COCO captions file by image id, tidied, and the number of empty ones left out."""
    annotations = _read_annotations(Path(captions_file))
    captions: Dict[int, List[str]] = {}
    empty = 0
    for index, entry in enumerate(annotations):
        fault = _fault(entry)
        if fault:
            raise ValueError(f"{captions_file}: annotation {index} {fault}; is it one of COCO's captions_*.json?")
        caption = " ".join(entry["caption"].split())
        if caption:
            captions.setdefault(entry["image_id"], []).append(caption)
        else:
            empty += 1
    if not captions:
        raise ValueError(f"{captions_file} holds no caption")
    return captions, empty


def _read_annotations(path: Path) -> List[Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; utils/download_coco_dataset.sh fetches COCO's captions")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a captions JSON file is wanted")
    try:
        with open(path, encoding="utf-8-sig") as file:  # also without the byte order mark that some editors add
            content = json.load(file)
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path} is not a JSON file") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a JSON file, or is cut short: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f'{path} has no list "annotations"; it is not a COCO captions file')
    return annotations


def _fault(entry: Any) -> str:
    """What is wrong with an annotation, as the end of a sentence; empty if nothing is."""
    if not isinstance(entry, dict):
        return "is not an object"
    for key in ("image_id", "caption"):
        if key not in entry:
            return f'has no "{key}"'
    image_id, caption = entry["image_id"], entry["caption"]
    if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
        return f'has the "image_id" {json.dumps(image_id)[:40]}, not a whole number from 0 on'
    if not isinstance(caption, str):
        return f'has the "caption" {json.dumps(caption)[:40]}, not a text'
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which UTF-8 cannot
        return f'has the "caption" {json.dumps(caption)[:40]}, not valid Unicode'
    return ""


def _write(path: Path, text: str) -> None:
    """Beside the final name first, so that a run that is stopped never leaves half a file under it."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise
