"""Captions in a list: metadata.jsonl, .csv or .parquet of Hugging Face's imagefolder, Flickr's captions.txt, JSON.

A row has the name of an image, relative to the table, and a caption or a list of them; several rows may name one image.
Columns are found by their names. Flickr8k.token.txt has none: "1.jpg#0", a tab, the caption; nor have tables whose rows
are a name and a caption.

In JSON: COCO's captions_*.json (Lin et al., 2014), Karpathy's dataset_*.json (2015), and simple lists:

    {"images": [{"id": 139, "file_name": "000000000139.jpg"}], "annotations": [{"image_id": 139, "caption": "…"}]}
    {"images": [{"filepath": "val2014", "filename": "….jpg", "split": "train", "sentences": [{"raw": "…"}]}]}
    {"a.jpg": "caption"} or [{"image": "a.jpg", "caption": "…"}]
"""

import ast
import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

from data.files import IMAGE_SUFFIXES, LINE_BREAK, clean_captions, printable
from data.sources.base import TEXT_COLUMNS, split_of, text_columns
from data.sources.rows import image_columns, import_pyarrow
from data.sources.table import Entry
from utils.errors import first_line
from utils.files import decode_text

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".token")
IMAGE_COLUMNS = (
    *("file_name", "filename", "image", "image_name", "image_path", "file_path", "filepath", "path", "file"),
    *("image_file", "img", "image_id"),
)
_DELIMITERS = (",", "\t", "|", ";")
_NUMBERED = re.compile(r"([^\t]+)#(\d+)\t(.*)")
_LARGEST_FIELD = 2**24


class Columns(NamedTuple):
    """The places of the columns that are read."""

    name: int
    captions: List[int]
    split: Optional[int] = None

    def entry(self, values: Any) -> Entry:
        """Return the entry of a row's values, by their places."""
        split = "" if self.split is None else str(values[self.split] or "").lower()
        captions = _captions_of([values[column] for column in self.captions])
        name = values[self.name]
        return Entry("" if name is None else str(name), captions, split=split)


def read_entries(path: Path, place: str = "") -> Optional[Iterator[Entry]]:
    """Return the rows of a table, or None if the file is no table of images and captions.

    Raises:
        ValueError, OSError: it is such a table but cannot be read, or has no captions; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_rows(path, _json_lines(path))
    elif suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and any(name.lower().endswith(IMAGE_SUFFIXES) for name in content):
            content = [{"image": name, "text": captions} for name, captions in content.items()]  # {"a.jpg": "caption"}
        rows = _json_rows(path, content) if isinstance(content, list) else None
    else:
        rows = _text_rows(path)
    if rows is None:
        return None
    file_split = split_of(place + path.name)
    return (row._replace(place=place, split=row.split or file_split) for row in rows)


def _captions_of(values: List[Any]) -> List[str]:
    captions: List[Any] = []
    for value in values:
        if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
            with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                listed = ast.literal_eval(value)  # a list in a field of CSV, as pandas and JSON write it
                value = listed if all(isinstance(item, (str, dict)) for item in listed) else value
        captions += value if isinstance(value, (list, tuple)) else [value]
    return clean_captions(item.get("raw") if isinstance(item, dict) else item for item in captions)


def _json_lines(path: Path) -> List[Any]:
    objects = []
    for number, line in enumerate(LINE_BREAK.split(_read_text(path)), 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except (ValueError, RecursionError):
                raise ValueError(f"{printable(path)}, line {number}: not a JSON object") from None
    return objects


def _json_rows(path: Path, objects: Sequence[Any]) -> Optional[Iterable[Entry]]:
    keys: Dict[str, None] = {}
    for entry in objects:
        keys.update(dict.fromkeys(entry if isinstance(entry, dict) else ()))
    names = list(keys)
    columns = _find_columns(path, names)
    if columns is None:
        return None
    return [columns.entry([entry.get(name) for name in names]) for entry in objects if isinstance(entry, dict)]


def _text_rows(path: Path) -> Optional[Iterable[Entry]]:
    try:
        text = _read_text(path)
    except ValueError:
        if path.suffix.lower() in TABLE_SUFFIXES:
            raise
        return None
    first = LINE_BREAK.split(text, maxsplit=1)[0]
    if _NUMBERED.match(first):
        matches = (_NUMBERED.match(line) for line in LINE_BREAK.split(text))
        return [Entry(match[1], _captions_of([match[3]])) for match in matches if match]
    fault = None
    for delimiter in _DELIMITERS:
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if len(header) > 1:
            try:
                columns = _find_columns(path, header)
            except ValueError as error:
                fault = error
                continue
            if columns is not None:
                return _delimited_rows(path, text, delimiter, len(header), columns)[1:]
            if header[0].lower().endswith(IMAGE_SUFFIXES) and not header[1].replace(".", "").isdigit():
                return _delimited_rows(path, text, delimiter, 2, Columns(0, [1]))
    if fault:
        raise fault
    return None


def _delimited_rows(path: Path, text: str, delimiter: str, width: int, columns: Columns) -> List[Entry]:
    before = csv.field_size_limit(_LARGEST_FIELD)
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []
    try:
        for fields in reader:
            if len(fields) > width and columns.captions == [width - 1]:  # a caption with commas and without quotes
                fields[width - 1 :] = [delimiter.join(fields[width - 1 :])]
            if fields:
                rows.append(columns.entry([field.strip() for field in fields] + [""] * (width - len(fields))))
    except csv.Error as error:
        raise ValueError(f"{printable(path)}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)
    return rows


def _parquet_rows(path: Path) -> Optional[Iterable[Entry]]:
    arrow = import_pyarrow(path)
    try:
        schema = arrow.parquet.read_schema(path)
        columns = None if image_columns(arrow.types, schema) else _find_columns(path, schema.names)
        if columns is None:
            return None
        wanted = sorted({columns.name, *columns.captions, *([] if columns.split is None else [columns.split])})
        table = arrow.parquet.read_table(path, columns=[schema.names[column] for column in wanted])
        values = {column: table[schema.names[column]].to_pylist() for column in wanted}
        return [columns.entry({column: values[column][row] for column in wanted}) for row in range(table.num_rows)]
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{printable(path)}: cannot be read as a Parquet file ({first_line(error)})") from None


def _read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except ValueError:
        raise ValueError(f"{printable(path)}: is neither UTF-8 nor UTF-16; save it as UTF-8") from None


def _find_columns(path: Path, header: Sequence[str]) -> Optional[Columns]:
    """Return the columns of a table by their names; None without images, ValueError with images but no captions."""
    names = [name.strip().lower() for name in header]
    image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        return None
    texts = [header.index(name) for name in text_columns(header)]
    if not texts:
        raise ValueError(
            f"{printable(path)}: has no column of captions, such as {' or '.join(TEXT_COLUMNS[:2])}, "
            f"only {', '.join(header)}"
        )
    return Columns(image, texts, names.index("split") if "split" in names else None)


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


def coco_entries(content: Any, path: Path, place: str = "") -> Iterator[Entry]:
    """Yield the images that a file lists, in its order."""
    if isinstance(content.get("annotations"), list):
        names = image_names(content)
        captions: Dict[str, List[Any]] = {key: [] for key in names}
        for entry in content["annotations"]:
            if isinstance(entry, dict):
                captions.setdefault(str(entry.get("image_id")), []).append(entry.get("caption"))
        hint = re.sub(r"^captions_", "", path.stem)
        for key, texts in captions.items():
            yield Entry(names.get(key) or default_name(key), clean_captions(texts), place, hint)
        return
    for entry in content["images"]:
        if isinstance(entry, dict):
            name = "/".join(str(entry[key]) for key in ("filepath", "filename") if entry.get(key))
            sentences = entry.get("sentences") or []
            texts = [item.get("raw") if isinstance(item, dict) else item for item in sentences]
            yield Entry(name, clean_captions(texts), place, split=str(entry.get("split") or ""))


def image_names(content: Dict[str, Any]) -> Dict[str, str]:
    """Return the file names of COCO's "images" by their ids as texts."""
    images = content.get("images")
    entries = [image for image in (images if isinstance(images, list) else []) if isinstance(image, dict)]
    return {str(image.get("id")): image["file_name"] for image in entries if isinstance(image.get("file_name"), str)}


def default_name(image_id: str) -> str:
    """Return what COCO 2017 calls the image of an id, for files that do not say it."""
    return f"{int(image_id):012d}.jpg" if image_id.isascii() and image_id.isdigit() else f"{image_id}.jpg"
