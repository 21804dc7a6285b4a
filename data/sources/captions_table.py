"""Captions in a table: metadata.jsonl, .csv or .parquet of Hugging Face's imagefolder, Flickr's captions.txt.

A row has the name of an image, relative to the table, and a caption; several rows may name one image. Columns are found
by their names; Flickr8k.token.txt has none: "1.jpg#0", a tab, the caption.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from data.files import IMAGE_SUFFIXES, printable
from data.sources.captions_json import read_json
from data.sources.table import Entry, clean_captions
from utils.files import decode_text

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".token")
IMAGE_COLUMNS = (
    *("file_name", "filename", "image", "image_name", "image_path", "file_path", "filepath", "path", "file"),
    *("image_file", "img", "image_id"),
)
TEXT_COLUMNS = ("text", "caption", "captions", "comment", "raw", "sentence", "sentences", "description", "prompt")
_DELIMITERS = (",", "\t", "|", ";")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_NUMBERED = re.compile(r"([^\t]+)#(\d+)\t(.*)")
_LARGEST_FIELD = 2**24

Row = Tuple[Any, Any]  # name and caption, or captions


def read_entries(path: Path, place: str = "") -> Optional[Iterator[Entry]]:
    """Return the rows of a table, or None if the file is no table of images and captions.

    Raises:
        ValueError, OSError: it is such a table but cannot be read; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_rows(_json_lines(path))
    elif suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and any(name.lower().endswith(IMAGE_SUFFIXES) for name in content):
            content = [{"image": name, "text": captions} for name, captions in content.items()]  # {"a.jpg": "caption"}
        rows = _json_rows(content) if isinstance(content, list) else None
    else:
        rows = _text_rows(path)
    return None if rows is None else (_entry(name, captions, place) for name, captions in rows)


def _entry(name: Any, captions: Any, place: str) -> Entry:
    values = captions if isinstance(captions, (list, tuple)) else [captions]
    texts = [value.get("raw") if isinstance(value, dict) else value for value in values]
    return Entry(str(name or ""), clean_captions(texts), place)


def _json_lines(path: Path) -> List[Any]:
    objects = []
    for number, line in enumerate(_LINE_BREAK.split(decode_text(path.read_bytes())), 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except (ValueError, RecursionError):
                raise ValueError(f"{printable(path)}, line {number}: not a JSON object") from None
    return objects


def _json_rows(objects: Sequence[Any]) -> Optional[Iterable[Row]]:
    names: Dict[str, None] = {}
    for entry in objects:
        names.update(dict.fromkeys(entry if isinstance(entry, dict) else ()))
    columns = _columns(list(names))
    if columns is None:
        return None
    image, text = (list(names)[column] for column in columns)
    return [(entry.get(image), entry.get(text)) for entry in objects if isinstance(entry, dict)]


def _text_rows(path: Path) -> Optional[Iterable[Row]]:
    try:
        text = decode_text(path.read_bytes())
    except ValueError:
        return None
    first = _LINE_BREAK.split(text, maxsplit=1)[0]
    if _NUMBERED.match(first):
        matches = (_NUMBERED.match(line) for line in _LINE_BREAK.split(text))
        return [(match[1], match[3]) for match in matches if match]
    for delimiter in _DELIMITERS:
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        columns = _columns(header)
        if columns is not None and len(header) > 1:
            return _delimited_rows(path, text, delimiter, len(header), *columns)
    return None


def _delimited_rows(path: Path, text: str, delimiter: str, width: int, image: int, caption: int) -> Iterable[Row]:
    before = csv.field_size_limit(_LARGEST_FIELD)
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []
    try:
        for fields in reader:
            if len(fields) > width and caption == width - 1:  # a caption with commas and without quotes
                fields[caption:] = [delimiter.join(fields[caption:])]
            if fields:
                rows.append(
                    (fields[image].strip() if image < len(fields) else "", "".join(fields[caption : caption + 1]))
                )
    except csv.Error as error:
        raise ValueError(f"{printable(path)}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)
    return rows[1:]


def _parquet_rows(path: Path) -> Optional[Iterable[Row]]:
    parquet = import_parquet(path)
    try:
        file = parquet.ParquetFile(path)
        columns = _columns(file.schema_arrow.names)
        if columns is None:
            return None
        table = file.read([file.schema_arrow.names[column] for column in columns])
        return list(zip(*(column.to_pylist() for column in table.columns))) if table.num_rows else []
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(
            f"{printable(path)}: cannot be read as a Parquet file ({str(error).splitlines()[0]})"
        ) from None


def import_parquet(path: Path) -> Any:
    """Import pyarrow.parquet; ValueError that names `path` if it is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{printable(path)}: needs pyarrow; pip install -r requirements-data.txt") from None
    return pyarrow.parquet


def _columns(header: Sequence[str]) -> Optional[Tuple[int, int]]:
    """Return the columns of image and caption by their names, or None."""
    names = [name.strip().lower() for name in header]
    image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
    text = next((names.index(name) for name in TEXT_COLUMNS if name in names), None)
    return None if image is None or text is None else (image, text)
