"""The files of a folder: list them, open images, read captions, find out what cannot be used and report it.

Nothing here decodes pixels or tokenizes text: images are opened up to their header.
"""

import io
import json
import logging
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features
from tqdm import tqdm

from utils.files import decode_text

logger = logging.getLogger("minidalle")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".jfif")
LINE_BREAK = re.compile(r"\r\n|\r|\n")  # str.splitlines would also cut at form feeds and U+2028 inside a caption
CAPTION_SUFFIX = ".txt"
CAPTION_SUFFIXES = (CAPTION_SUFFIX, ".caption")  # the second one is that of programs for fine-tuning
JSON_KEYS = ("caption", "text", "captions", "TEXT")  # where img2dataset and others write an image's captions
# What a file with those suffixes may really be. Others that PIL knows are refused: EPS would start a program.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF") + (
    ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
)
# Editors write megabytes of text and color profiles into PNG files; PIL's own limit of 1 MB would refuse such images.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes that one compressed text or color profile may unpack to
PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes of all texts of an image

NO_CAPTION = "image without caption"
NO_IMAGE = "caption without image"
NOT_LISTED = "image that no list names"
OTHER_SPLIT = "image of another split"
CAPTION_TAKEN = "image whose caption file belongs to another image"
LABEL_FILE = "label file"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "neither UTF-8 nor UTF-16"
NOT_JSON = "neither text nor JSON"
ZERO_BYTES = "zero-byte image"
NOT_AN_IMAGE = "not an image"
TOO_LARGE = "image over PIL's pixel limit"
CANNOT_OPEN = "cannot be opened"
UNREAD = "caption that the vocabulary cannot read"
UNREADABLE = "unreadable image"  # only the header is good, which shows when the image is decoded

Skipped = Dict[str, List[Path]]  # reason -> paths
File = Tuple[str, int, int]  # a file in one state: name relative to the folder with "/", bytes, mtime in nanoseconds


class StoredImage(ABC):
    """An image that is part of another file, such as a tar archive; str() names it."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the bytes of the image file; OSError or ValueError if they cannot be read."""


class Listing(NamedTuple):
    """The files of a folder and below, as sorted relative paths with "/" between the parts."""

    images: List[str]
    texts: List[str]  # with one of CAPTION_SUFFIXES
    others: List[str]


_PROGRESS_FROM = 2000  # files; fewer are checked before a progress bar could be read
_THREADS = 4  # for a slow disk or network
_CHUNK = 128


def report_skipped(skipped: Skipped, examples: int = 3) -> None:
    """Log one line per reason: how many files, and the first few of them."""
    for reason, paths in sorted(skipped.items()):
        if paths:
            level = logging.INFO if reason in (LABEL_FILE, NO_IMAGE, NOT_LISTED, OTHER_SPLIT) else logging.WARNING
            named = ", ".join(map(printable, paths[:examples])) + (", …" if len(paths) > examples else "")
            logger.log(level, "skipped %s (%s): %s", count(len(paths), "file"), reason, named)


def read_captions(path: Union[str, Path]) -> List[str]:
    """Return the captions of a file of one image; ValueError or OSError if it cannot be read."""
    with open(path, "rb") as file:
        return parse_captions(str(path), file.read())


def parse_captions(name: str, content: bytes) -> List[str]:
    """Return the captions of a file of one image: its lines, or those in JSON; ValueError if it is neither."""
    text = decode_text(content)
    if not name.lower().endswith(".json"):
        return [line.strip() for line in LINE_BREAK.split(text) if line.strip()]
    try:
        entry = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    value = next((entry[key] for key in JSON_KEYS if entry.get(key)), None) if isinstance(entry, dict) else None
    return clean_captions(value if isinstance(value, list) else [value])


def clean_captions(values: Iterable[object]) -> List[str]:
    """Return the texts among some values, each in one line, without empty ones."""
    texts = (" ".join(value.split()) for value in values if isinstance(value, str))
    return [text for text in texts if text]


def open_image(path: Union[str, Path, StoredImage]) -> Image.Image:
    """Open an image's header; pixels stay on disk until they are used, so close it or use `with`.

    ValueError or OSError if it cannot be opened, has none of IMAGE_FORMATS, or is over PIL's pixel limit, up to twice
    which PIL only warns.
    """
    file = io.BytesIO(path.read()) if isinstance(path, StoredImage) else path
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{printable(path)}: {TOO_LARGE}") from None
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError(f"{printable(path)}: {NOT_AN_IMAGE}") from None
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{printable(path)}: {TOO_LARGE}")
    return image


def printable(path: Union[str, Path, StoredImage]) -> str:
    """Return the path for a message; printing bytes of a file name that are not UTF-8 would fail."""
    return os.fsencode(str(path)).decode("utf-8", "replace")


def same_name(name: str) -> str:
    """Return the form of a file name in which different spellings in Unicode are equal."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def describe_others(others: Sequence[str]) -> str:
    """Count files of other kinds by their suffixes, for a message."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in others)
    return ", ".join(f"{count:,} × {suffix}" for suffix, count in counts.most_common(8))


def list_files(folder: Union[str, Path], skipped: Dict[str, List[str]]) -> Listing:
    """List the files of a folder and below; add folders that cannot be opened to `skipped`.

    Folders are entered before links to them, so that a link does not give a file a second name. Hidden files count as
    images or texts only. ValueError or OSError if the folder itself cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{printable(folder)}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)}: is a file; a folder is needed")
    images, texts, others = [], [], []
    seen = set()
    folders: List[str] = [""]
    links: List[str] = []
    while folders or links:
        prefix = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder / prefix)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / prefix) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)  # popped from the end
        except OSError as error:
            if not prefix:
                raise PermissionError(f"{folder}: the folder cannot be opened ({error.strerror})") from error
            skipped.setdefault(CANNOT_OPEN, []).append(prefix.rstrip("/"))
            continue
        for entry in entries:
            name = prefix + entry.name
            suffix = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(name + "/")
            elif suffix in IMAGE_SUFFIXES:
                images.append(name)
            elif suffix in CAPTION_SUFFIXES:
                texts.append(name)
            elif not entry.name.startswith("."):
                others.append(name)
        links.sort(reverse=True)
    return Listing(sorted(images), sorted(texts), sorted(others))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def check_files(
    names: Sequence[str],
    folder: Path,
    known_good: Callable[[File], bool],
    find_fault: Callable[[str], Optional[str]],
    skipped: Dict[str, List[str]],
) -> Dict[str, File]:
    """Return the state of each file without a fault (None), in order; add the others to `skipped` by the fault."""
    root = os.path.join(str(folder), "")
    files: Dict[str, File] = {}
    unknown = []
    for name in names:
        try:
            status = os.stat(root + name)
            files[name] = (name, status.st_size, status.st_mtime_ns)
        except OSError:
            files[name] = (name, 0, 0)  # find_fault reports it
        if not known_good(files[name]):
            unknown.append(name)
    hidden = None if len(unknown) > _PROGRESS_FROM else True  # None: a bar on a terminal only
    with ThreadPool(_THREADS) as pool:
        faults = pool.imap(find_fault, [root + name for name in unknown], chunksize=_CHUNK)
        bar = tqdm(faults, total=len(unknown), desc="checking files", disable=hidden, leave=False)
        for name, fault in zip(unknown, bar):
            if fault:
                skipped.setdefault(fault, []).append(name)
                del files[name]
    return files


def image_fault(path: str) -> Optional[str]:
    """Return why this file cannot be an image, judged by its header."""
    if not os.path.isfile(path):
        return CANNOT_OPEN
    try:
        with open(path, "rb", buffering=0) as file:
            if not file.read(1):
                return ZERO_BYTES
    except OSError:
        return CANNOT_OPEN
    try:
        open_image(path).close()
    except Exception as error:  # damaged headers make PIL raise struct.error, SyntaxError, OverflowError and more
        return TOO_LARGE if isinstance(error, ValueError) and TOO_LARGE in str(error) else NOT_AN_IMAGE
    return None


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
