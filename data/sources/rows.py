"""Rows of Hugging Face's data sets: Parquet files with images, as on the Hub, and Arrow files, as of save_to_disk.

A row has an image file's bytes, or its path, and a caption or a list of them. Rows are read in place: Arrow files are
mapped into memory; of a Parquet file, one row group is kept.
"""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from data.files import EMPTY_CAPTION, OTHER_SPLIT, File, StoredImage, clean_captions, printable
from data.sources.base import ImagePath, ImageSource, choose_splits, files_of_split, text_columns, text_state
from utils.errors import first_line

ROW_SUFFIXES = (".parquet", ".arrow")


class RowImage(StoredImage):
    """The image of one row: that of a row group, and `number` in the whole file."""

    def __init__(self, path: Path, column: str, group: int, row: int, number: int):
        self.path, self.column, self.group, self.row, self.number = path, column, group, row, number

    def __str__(self) -> str:
        return f"{printable(self.path)}, row {self.number}"

    def read(self) -> bytes:
        value = _read_group(self.path, self.group, self.column)[self.row].as_py()
        content, elsewhere = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None and elsewhere:
            return (self.path.parent / elsewhere).read_bytes()
        if not content:
            raise ValueError(f"{self}: has no image")
        return content


class Rows(ImageSource):
    """The rows of Parquet and Arrow files; of several splits, those to train or to validate on."""

    form = "Hugging Face data set"

    def __init__(self, folder: Path, files: Sequence[str], validation: bool = False):
        """Read the texts of all rows; ValueError without pyarrow, or if a file is damaged or has not both columns."""
        self.holders = files_of_split(folder, _without_replaced(folder, files), validation)
        self._images: Dict[str, RowImage] = {}
        self._captions: Dict[str, List[str]] = {}
        images: List[File] = []
        skipped: Dict[str, List[Path]] = {}
        rows = [row for file in self.holders for row in _read_rows(folder, file)]
        splits = choose_splits({row.split for row in rows}, validation, folder)
        for row in rows:
            name = row.state[0]
            if row.captions and row.split in splits:
                images.append(row.state)
                self._images[name], self._captions[name] = row.image, row.captions
            else:
                skipped.setdefault(EMPTY_CAPTION if row.split in splits else OTHER_SPLIT, []).append(folder / name)
        if not images:
            raise ValueError(f"{printable(folder)}: none of the {len(rows)} rows of its files has a caption")
        texts = [text_state(name, captions) for name, captions in self._captions.items()]
        super().__init__(folder, images, texts, skipped)

    def image(self, name: str) -> ImagePath:
        return self._images[name]

    def captions(self, name: str) -> List[str]:
        return self._captions[name]


def import_pyarrow(path: Path) -> Any:
    """Import pyarrow with its Parquet reader; ValueError that names `path` if it is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{printable(path)}: needs pyarrow; pip install -r requirements-data.txt") from None
    return pyarrow


def _without_replaced(folder: Path, files: Sequence[str]) -> List[str]:
    """Return the files without those that save_to_disk has replaced, or that `datasets` keeps as its own cache."""
    current = []
    for file in files:
        state, listed = (folder / file).with_name("state.json"), []
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or that of another program
            listed = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        name = file[file.rfind("/") + 1 :]
        if name in listed or not (listed or name.startswith("cache-")):
            current.append(file)
    return current


class _Row(NamedTuple):
    state: File
    image: RowImage
    captions: List[str]
    split: str


def _read_rows(folder: Path, file: str) -> Iterator[_Row]:
    arrow, path = import_pyarrow(folder / file), folder / file
    try:
        is_parquet = path.suffix.lower() == ".parquet"
        groups = arrow.parquet.read_metadata(path).num_row_groups if is_parquet else 1
        schema = arrow.parquet.read_schema(path) if is_parquet else _map_arrow(path).schema
        image_column, caption_columns, split_column = _find_columns(arrow.types, path, schema)
        status, number = path.stat(), 0
        for group in range(groups):
            texts = [_read_group(path, group, column).to_pylist() for column in caption_columns]
            splits = _read_group(path, group, split_column).to_pylist() if split_column else [""] * len(texts[0])
            for row, (split, *values) in enumerate(zip(splits, *texts)):
                image = RowImage(path, image_column, group, row, number)
                captions = clean_captions(t for one in values for t in (one if isinstance(one, list) else [one]))
                state = (f"{file}/{number:08d}", status.st_size, status.st_mtime_ns)
                yield _Row(state, image, captions, str(split or "").lower())
                number += 1
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{printable(path)}: cannot be read by pyarrow ({first_line(error)})") from None


def image_columns(types: Any, schema: Any) -> List[str]:
    """Return the names of the columns that have the bytes of images; "image" comes first."""

    def is_image(kind: Any) -> bool:
        holds_bytes = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return holds_bytes or types.is_binary(kind) or types.is_large_binary(kind)

    names = [field.name for field in schema if is_image(field.type)]
    return sorted(names, key=lambda name: name.lower() != "image")


def _find_columns(types: Any, path: Path, schema: Any) -> Tuple[str, List[str], Optional[str]]:
    """Return the columns of images, of texts and, if there is one, of splits."""

    def is_text(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    images = image_columns(types, schema)
    texts = [field.name for field in schema if is_text(field.type)]
    captions = text_columns(texts) or texts[: len(texts) == 1]  # a single column of texts may have any name
    if not images or not captions:
        raise ValueError(
            f"{printable(path)}: needs a column of images and one of strings called text or caption; it has "
            f"{', '.join(f'{field.name} ({field.type})' for field in schema)}"
        )
    return images[0], captions, "split" if "split" in texts else None


@functools.lru_cache(maxsize=64)
def _map_arrow(path: Path) -> Any:
    arrow = import_pyarrow(path)
    return arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()


@functools.lru_cache(maxsize=1)
def _read_group(path: Path, group: int, column: str) -> Any:
    """Return a column of a row group, or of a whole Arrow file, which has one."""
    if path.suffix.lower() != ".parquet":
        return _map_arrow(path)[column]
    with import_pyarrow(path).parquet.ParquetFile(path) as file:
        return file.read_row_group(group, [column], use_threads=False)[column]  # threads do not survive a fork
