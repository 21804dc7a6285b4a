"""Data sets that Hugging Face's `datasets` saved to disk (save_to_disk), with a column of images and one of texts."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

from data.files import EMPTY_CAPTION, File, StoredImage, printable
from data.sources.base import ImagePath, ImageSource, text_state
from data.sources.captions_table import TEXT_COLUMNS
from data.sources.table import clean_captions
from utils.files import first_line

VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")


def is_saved(folder: Path) -> bool:
    """Return whether a folder is a data set, or several splits, that `datasets` saved."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


class RowImage(StoredImage):
    """The image of one row."""

    def __init__(self, rows: Any, column: str, row: int, name: str):
        self.rows, self.column, self.row, self.name = rows, column, row, name

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the bytes of the image file."""
        value = self.rows[self.row][self.column]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


class SavedDataset(ImageSource):
    """The rows of a saved data set; of several splits, the training or the validation split."""

    form = "Hugging Face data set"

    def __init__(self, folder: Path, validation: bool = False):
        """Open the data set.

        Raises:
            ValueError: `datasets` is not installed, or the columns of images and texts are missing.
        """
        rows, split = _load(folder, validation)
        self._rows, self._column, text_column = _find_columns(folder, rows)
        self._title = f"{printable(folder)}{split and '/'}{split}"
        state = int.from_bytes(rows._fingerprint.encode()[:7], "big")  # `datasets` hashes what led to these rows
        images: List[File] = []
        texts: List[File] = []
        skipped: List[Path] = []
        self._captions: Dict[str, List[str]] = {}
        for row, value in enumerate(rows[text_column]):
            name = f"{split}{split and '/'}{row:08d}"
            captions = clean_captions(value if isinstance(value, list) else [value])
            if captions:
                self._captions[name] = captions
                images.append((name, 0, state))
                texts.append(text_state(name, captions))
            else:
                skipped.append(folder / name)
        if not images:
            raise ValueError(f"{self._title}: none of its {len(rows)} rows has a text in column {text_column}")
        super().__init__(folder, images, texts, {EMPTY_CAPTION: skipped} if skipped else {})

    def image(self, name: str) -> ImagePath:
        """Return the image of a row."""
        row = int(name.rpartition("/")[2])
        return RowImage(self._rows, self._column, row, f"{self._title}, row {row}")

    def captions(self, name: str) -> List[str]:
        """Return the captions of a row."""
        return self._captions[name]


def _load(folder: Path, validation: bool) -> Tuple[Any, str]:
    """Return the data set and the name of its split, "" if it has none."""
    try:
        import datasets
    except ImportError:
        needed = "needs Hugging Face's datasets; pip install -r requirements-data.txt"
        raise ValueError(f"{printable(folder)}: {needed}") from None
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files make pyarrow, json and datasets raise many types of errors
        raise ValueError(f"{printable(folder)}: cannot be read by datasets ({first_line(error)})") from None
    if not isinstance(found, datasets.DatasetDict):
        return found, ""
    names = [name for name in VALIDATION_SPLITS if name in found]
    if validation and not names:
        raise ValueError(f"{printable(folder)}: has no split to validate on, only {', '.join(found)}")
    name = names[0] if validation else "train" if "train" in found else next(iter(found))
    return found[name], name


def _find_columns(folder: Path, rows: Any) -> Tuple[Any, str, str]:
    """Return the rows with the bytes of their images, and the names of the columns of images and of texts."""
    from datasets import Image, Value

    def is_text(feature: Any) -> bool:
        feature = getattr(feature, "feature", feature)  # of a list
        return isinstance(feature, Value) and feature.dtype in ("string", "large_string")

    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    texts = [name for name, feature in rows.features.items() if is_text(feature)]
    named = [name for known in TEXT_COLUMNS for name in texts if name.lower() == known]
    if not images or not (named or len(texts) == 1):
        raise ValueError(
            f"{printable(folder)}: needs a column of type Image and one of strings called text or caption; it has "
            f"{', '.join(f'{name} ({type(feature).__name__})' for name, feature in rows.features.items())}"
        )
    image = images[0]
    return rows.select_columns([image]).cast_column(image, Image(decode=False)), image, (named or texts)[0]
