"""Rows of Hugging Face's data sets: Parquet files with images, as on the Hub, and Arrow files, as of save_to_disk.

A row has an image file's bytes, or its path, and a caption or a list of them. Rows are read in place: Arrow files are
mapped into memory; of a Parquet file, one row group is kept.
"""

import functools
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from data.files import EMPTY_CAPTION, File, StoredImage, clean_captions, printable
from data.sources.base import ImagePath, ImageSource, files_of_split, text_state
from utils.files import first_line

ROW_SUFFIXES = (".parquet", ".arrow")
TEXT_COLUMNS = ("text", "caption", "captions", "comment", "raw", "sentence", "sentences", "description", "prompt")


class RowImage(StoredImage):
    """The image of one row."""

    def __init__(self, path: Path, name: str, column: str, group: int, row: int):
        self.path, self.name, self.column, self.group, self.row = path, name, column, group, row

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the bytes of the image file."""
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
        """Read the texts of all rows.

        Raises:
            ValueError: pyarrow is not installed, or a file is damaged or has no columns of images and of texts.
        """
        self.holders = files_of_split(folder, _without_replaced(folder, files), validation)
        self._images: Dict[str, RowImage] = {}
        self._captions: Dict[str, List[str]] = {}
        images: List[File] = []
        skipped: List[Path] = []
        for file in self.holders:
            path, start = folder / file, 0
            status = path.stat()
            for group, (image_column, values) in enumerate(_read_texts(path)):
                for row, value in enumerate(values):
                    name = f"{file}/{start + row:08d}"
                    captions = clean_captions(value if isinstance(value, list) else [value])
                    if captions:
                        title = f"{printable(path)}, row {start + row}"
                        self._images[name] = RowImage(path, title, image_column, group, row)
                        self._captions[name] = captions
                        images.append((name, status.st_size, status.st_mtime_ns))
                    else:
                        skipped.append(folder / name)
                start += len(values)
        if not images:
            raise ValueError(f"{printable(folder)}: none of the {len(skipped)} rows of its files has a caption")
        texts = [text_state(name, captions) for name, captions in self._captions.items()]
        super().__init__(folder, images, texts, {EMPTY_CAPTION: skipped} if skipped else {})

    def image(self, name: str) -> ImagePath:
        """Return the image of a row."""
        return self._images[name]

    def captions(self, name: str) -> List[str]:
        """Return the captions of a row."""
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
        state = (folder / file).with_name("state.json")
        listed = (
            [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]] if state.is_file() else []
        )
        name = file[file.rfind("/") + 1 :]
        if name in listed or not (listed or name.startswith("cache-")):
            current.append(file)
    return current


def _read_texts(path: Path) -> List[Tuple[str, List[Any]]]:
    """Return the name of the column of images and the texts of all rows, for each row group."""
    arrow = import_pyarrow(path)
    try:
        if path.suffix.lower() == ".parquet":
            groups, schema = arrow.parquet.read_metadata(path).num_row_groups, arrow.parquet.read_schema(path)
        else:
            groups, schema = 1, _map_arrow(path).schema
        image, text = _find_columns(arrow.types, path, schema)
        return [(image, _read_group(path, group, text).to_pylist()) for group in range(groups)]
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{printable(path)}: cannot be read by pyarrow ({first_line(error)})") from None


def _find_columns(types: Any, path: Path, schema: Any) -> Tuple[str, str]:
    """Return the names of the columns of images and of texts."""

    def is_text(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    def is_image(kind: Any) -> bool:
        holds_bytes = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return holds_bytes or types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    texts = [field.name for field in schema if is_text(field.type)]
    named = [name for known in TEXT_COLUMNS for name in texts if name.lower() == known]
    if not images or not (named or len(texts) == 1):
        raise ValueError(
            f"{printable(path)}: needs a column of images and one of strings called text or caption; it has "
            f"{', '.join(f'{field.name} ({field.type})' for field in schema)}"
        )
    return images[0], (named or texts)[0]


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
