"""What every form of captioned images offers to the rest of the program."""

import hashlib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Collection, List, Sequence, Set

from data.files import File, Skipped, printable
from data.images import ImagePath

TRAINING_SPLITS = ("train", "training", "restval", "")  # "restval" is Karpathy's; "" is what names no split
TEXT_COLUMNS = ("text", "caption", "captions", "comment", "raw", "sentence", "sentences", "description", "prompt")
VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")  # in the order of preference
# Hugging Face finds splits in the names of files and folders in this way: train/, val.csv, test-00000-of-00002.parquet.
SPLIT_NAME = re.compile(r"(?<![^/._-])(train|training|validation|val|valid|dev|test)(?![^/._-])")


class ImageSource(ABC):
    """Captioned images in a fixed order.

    Attributes:
        form: description of the form, for the log.
        folder: what names are relative to.
        images: of each image the name, the size in bytes and the time of change in ns.
        texts: the same of the file or the entry with each image's captions.
        skipped: files, or samples, that are not used, by reason.
        holders: files that hold many captions or images.
        others: files of other kinds, which are not used.
    """

    form: str
    holders: Sequence[str] = ()
    others: Sequence[str] = ()

    def __init__(self, folder: Path, images: Sequence[File], texts: Sequence[File], skipped: Skipped):
        self.folder, self.images, self.texts, self.skipped = folder, list(images), list(texts), skipped

    def image(self, name: str) -> ImagePath:
        """Return where to read an image of this name."""
        return self.folder / name

    @abstractmethod
    def captions(self, name: str) -> List[str]:
        """Return the captions that a text of this name holds; ValueError or OSError if it cannot be read."""


def text_state(name: str, captions: Sequence[str]) -> File:
    """Return name and state of captions that share a file with others: their length, and a hash for the time."""
    content = "\n".join(captions).encode("utf-8", "surrogatepass")
    return name, len(content), int.from_bytes(hashlib.sha256(content).digest()[:7], "big")


def text_columns(names: Sequence[str]) -> List[str]:
    """Return which of some columns have captions: one with a known name, or numbered ones such as caption_0."""
    lower = [name.strip().lower() for name in names]
    for known in TEXT_COLUMNS:
        if known in lower:
            return [names[lower.index(known)]]
    return [name for name, plain in zip(names, lower) if plain.rstrip("0123456789").rstrip("_") in TEXT_COLUMNS]


def split_of(name: str) -> str:
    """Return the split that a file's relative path names, "" if it names none."""
    found = SPLIT_NAME.findall(name.lower())
    return found[-1] if found else ""


def choose_splits(splits: Collection[str], validation: bool, folder: Path) -> Set[str]:
    """Return the splits to train on, or the split to validate on.

    Without a known training split, these are all; without names of splits, {""}.

    Raises:
        ValueError: splits have names, and none is for validation.
    """
    if not any(splits):
        return {""}
    if validation:
        for split in VALIDATION_SPLITS:
            if split in splits:
                return {split}
        has = ", ".join(sorted(filter(None, splits)))
        raise ValueError(f"{printable(folder)}: has no split to validate on, only {has}")
    return {split for split in splits if split in TRAINING_SPLITS} or set(splits)


def files_of_split(folder: Path, names: Sequence[str], validation: bool) -> List[str]:
    """Return the files of the splits that choose_splits returns, with its ValueError."""
    chosen = choose_splits({split_of(name) for name in names}, validation, folder)
    return [name for name in names if split_of(name) in chosen]
