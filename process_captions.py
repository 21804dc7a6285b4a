"""Convert COCO's captions file to one text file per image; needs no images.

COCO (Lin et al., 2014) keeps the captions of all images, about five each, in one JSON file:

    {"images": [{"id": 139, "file_name": "000000000139.jpg"}, ...],
     "annotations": [{"image_id": 139, "caption": "A room with chairs."}, ...]}

They become the lines of 000000000139.txt. Training reads such a file itself (data/sources/captions_lists.py); text
files are for other programs, and for captions that are to be edited.
"""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Optional, Sequence, Tuple

from tqdm import tqdm

from utils.command_line import Parser, exit_on_error
from utils.files import atomic_write, check_writable


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write the caption files that the flags ask for."""
    parser = Parser("Write COCO's captions as one .txt per image, one caption per line, named like the image.")
    add = parser.add_argument
    captions, out = "./data/COCO/annotations/captions_train2017.json", "./data/COCO/train2017_captions"
    add("--captions", metavar="JSON", default=captions, help="COCO captions file")
    add("--out-dir", "--out_dir", metavar="DIR", default=out, help="folder for the .txt files; created if missing")
    settings = parser.parse_args(argv)
    with exit_on_error():
        write_caption_files(Path(settings.captions), Path(settings.out_dir))


def write_caption_files(captions_file: Path, out_dir: Path) -> None:
    """Write a file in UTF-8 for each image, one caption per line, in the order of the file.

    A file is called like its image; if the JSON does not say how that is called, <image id, 12 digits>.txt. White space
    within a caption, including line breaks, becomes one space; nothing else is changed. Nothing is written until the
    whole file has been checked. Existing files are replaced.
    """
    lines, empty = read_captions(captions_file)
    check_writable(out_dir, "--out-dir")
    for name, captions in tqdm(lines.items(), desc="captions", unit="file", mininterval=0.5, disable=None):
        with atomic_write(out_dir / name, text=True) as file:
            file.writelines(caption + "\n" for caption in captions)
    skipped = f", {empty:,} empty ones skipped" if empty else ""
    print(f"{sum(map(len, lines.values())):,} captions of {len(lines):,} images in {out_dir}{skipped}")


def read_captions(path: Path) -> Tuple[Dict[str, List[str]], int]:
    """Return the captions of a COCO captions file by the name of their text file, and the number of empty ones."""
    from data.sources.captions_lists import default_name, image_names, read_json  # torch, which --help does not need

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; utils/download_coco_dataset.sh downloads COCO's captions")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a captions JSON file is needed")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f'{path} has no list "annotations"; it is not a COCO captions file')
    names, empty = image_names(content), 0
    captions: Dict[str, List[str]] = {}
    images: Dict[str, str] = {}  # of each text file
    for index, entry in enumerate(content["annotations"]):
        if not _is_caption(entry, names):
            raise ValueError(
                f"{path}: annotation {index} is {json.dumps(entry)[:80]}, without an image_id or a valid caption; "
                "is it one of COCO's captions_*.json?"
            )
        caption = " ".join((entry["caption"] or "").split())  # some exports have null for images without captions
        key = str(entry["image_id"])
        if caption:
            image = names.get(key) or default_name(key)
            name = PurePosixPath(image).with_suffix(".txt").name
            if images.setdefault(name, image) != image:
                raise ValueError(
                    f"{path}: {images[name]} and {image} would share {name}; images need names that differ without "
                    "folder and suffix"
                )
            captions.setdefault(name, []).append(caption)
        empty += not caption
    if not captions:
        raise ValueError(f"{path} has no caption")
    return captions, empty


def _is_caption(entry: Any, names: Dict[str, str]) -> bool:
    """Return whether an annotation names an image, by a whole number or an id of "images", and has a text or null."""
    if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
        return False
    image_id, caption = entry["image_id"], entry["caption"]
    is_number = isinstance(image_id, int) and not isinstance(image_id, bool) and image_id >= 0
    # JSON can spell half a surrogate pair, which UTF-8 cannot.
    is_text = caption is None or (isinstance(caption, str) and not re.search("[\ud800-\udfff]", caption))
    return (is_number or (isinstance(image_id, str) and image_id in names)) and is_text


if __name__ == "__main__":
    main()
