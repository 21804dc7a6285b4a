"""Find which image goes with which caption file in a folder, and report what is skipped.

Nothing here decodes pixels or tokenizes text: images are opened up to their header, caption files are read.

    pairs, skipped = find_pairs("data/COCO")
    report_skipped(skipped)
"""

import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from PIL import Image
from tqdm import tqdm

logger = logging.getLogger("minidalle")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
CAPTION_SUFFIX = ".txt"
# What a file with those suffixes may really be. Others that PIL knows are refused: EPS would start a program.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")

NO_CAPTION = "image without caption"
NO_IMAGE = "caption without image"
CAPTION_TAKEN = "image whose caption file belongs to another image"
LABEL_FILE = "label file"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "not UTF-8"
ZERO_BYTES = "zero-byte image"
NOT_AN_IMAGE = "not an image"
TOO_LARGE = "image over PIL's pixel limit"
CANNOT_OPEN = "cannot be opened"
UNREADABLE = "unreadable image"  # only the header is good, which shows when the image is decoded

Skipped = Dict[str, List[Path]]  # reason -> paths
File = Tuple[str, int, int]  # a file in one state: name relative to the folder with "/", bytes, mtime in nanoseconds

_LINE_BREAK = re.compile(r"\r\n|\r|\n")  # str.splitlines would also cut at form feeds and U+2028 inside a caption
_PROGRESS_FROM = 2000  # files; fewer are checked before a progress bar could be read
_THREADS = 4  # for a slow disk or network; for files in memory they only contend for the interpreter lock
_SLOW = 3e-4  # seconds per file, five times what parsing takes
_CHUNK = 128


def find_pairs(
    folder: Union[str, Path], known_good: Callable[[File], bool] = lambda file: False
) -> Tuple[List[Tuple[File, File]], Skipped]:
    """Find the images in `folder` and below that have a caption file of the same stem.

    A caption file in the image's own folder comes first. Otherwise the nearest by path is taken: the one with the most
    leading folders in common, then the most trailing folders (images/val/1.jpg goes with captions/val/1.txt), then the
    first in sorted order. A caption file belongs to one image. Symbolic links are followed; no folder is entered twice.

    Args:
        known_good: whether a file is known to be an image or to hold captions; such files are not opened.

    Returns:
        The pairs (image, caption file), sorted by the image's path, each file in its state before it was opened; and
        every other file with one of the suffixes, by reason.

    Raises:
        FileNotFoundError, PermissionError, ValueError: the folder has no pair.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a folder with images and caption files is needed")
    skipped: Dict[str, List[str]] = {}
    images, texts = _scan(folder, skipped)
    stem_of = {name: _stem(name) for names in (images, texts) for name in names}
    stems = {stem_of[name] for name in images}
    captions = _usable([name for name in texts if stem_of[name] in stems], folder, known_good, _caption_fault, skipped)
    stems = {stem_of[name] for name in captions}
    usable = _usable([name for name in images if stem_of[name] in stems], folder, known_good, _image_fault, skipped)

    matched = _match(list(usable), list(captions))
    taken = set(matched.values())
    refused = {name for names in skipped.values() for name in names}
    for name in images:
        if name not in matched and name not in refused:
            skipped.setdefault(CAPTION_TAKEN if stem_of[name] in stems else NO_CAPTION, []).append(name)
    for name in texts:
        if name not in taken and name not in refused:
            skipped.setdefault(NO_IMAGE, []).append(name)
    if not matched:
        raise ValueError(_no_pair(folder, images, texts, skipped))
    pairs = [(usable[name], captions[matched[name]]) for name in sorted(matched)]
    return pairs, {reason: [folder / name for name in sorted(names)] for reason, names in skipped.items()}


def report_skipped(skipped: Skipped, examples: int = 3) -> None:
    """Log one line per reason: how many files, and the first few of them."""
    for reason, paths in sorted(skipped.items()):
        if paths:
            level = logging.INFO if reason in (LABEL_FILE, NO_IMAGE) else logging.WARNING
            named = ", ".join(map(printable, paths[:examples])) + (", …" if len(paths) > examples else "")
            logger.log(level, "skipped %s (%s): %s", _count(len(paths), "file"), reason, named)


def read_captions(path: Union[str, Path]) -> List[str]:
    """Return the captions of a file: its non-blank lines, stripped. UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig")
    lines = [line.strip() for line in _LINE_BREAK.split(text)]
    return [line for line in lines if line]


def is_label_file(lines: Iterable[str]) -> bool:
    """Return whether every line is a YOLO label: a class number, then at least four numbers between 0 and 1."""
    lines = list(lines)
    return bool(lines) and all(map(_is_label, lines))


def open_image(path: Union[str, Path]) -> Image.Image:
    """Open an image's header; pixels stay on disk until they are used, so close it or use `with`.

    Raises:
        ValueError: the image is over PIL's pixel limit (up to twice the limit, PIL itself only warns).
        OSError: the file has none of IMAGE_FORMATS or cannot be opened.
    """
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{printable(path)}: {TOO_LARGE}") from None
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{printable(path)}: {TOO_LARGE}")
    return image


def printable(path: Union[str, Path]) -> str:
    """Return the path for a message; printing bytes of a file name that are not UTF-8 would fail."""
    return os.fsencode(path).decode("utf-8", "replace")


def _scan(folder: Path, skipped: Dict[str, List[str]]) -> Tuple[List[str], List[str]]:
    """Return the images and .txt files under `folder`, as sorted relative paths with "/" between the parts.

    Folders are entered before links to them, so that a link does not give a file a second name.
    """
    images, texts = [], []
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
            elif suffix == CAPTION_SUFFIX:
                texts.append(name)
        links.sort(reverse=True)
    return sorted(images), sorted(texts)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _usable(
    names: Sequence[str],
    folder: Path,
    known_good: Callable[[File], bool],
    find_fault: Callable[[str], Optional[str]],
    skipped: Dict[str, List[str]],
) -> Dict[str, File]:
    """Return the files without a fault, in order; add the others to `skipped`."""
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
    for name, fault in zip(unknown, _find_faults(find_fault, [root + name for name in unknown])):
        if fault:
            skipped.setdefault(fault, []).append(name)
            del files[name]
    return files


def _find_faults(find_fault: Callable[[str], Optional[str]], paths: Sequence[str]) -> List[Optional[str]]:
    """Return the fault of every path; use several threads if the first files are slow to open."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]

    def check_chunk(chunk: Sequence[str]) -> List[Optional[str]]:
        return [find_fault(path) for path in chunk]

    started = time.monotonic()
    results = check_chunk(chunks[0]) if chunks else []
    slow = time.monotonic() - started > _SLOW * len(results)
    hidden = None if len(paths) > _PROGRESS_FROM else True  # None: a bar on a terminal only
    bar = tqdm(total=len(paths), initial=len(results), desc="checking files", disable=hidden, leave=False)
    with bar, ThreadPoolExecutor(_THREADS if slow else 1) as pool:
        for part in pool.map(check_chunk, chunks[1:]):
            results += part
            bar.update(len(part))
    return results


def _caption_fault(path: str) -> Optional[str]:
    if not os.path.isfile(path):  # a broken link, or a named pipe, which would never finish opening
        return CANNOT_OPEN
    try:
        lines = read_captions(path)
    except UnicodeDecodeError:
        return NOT_UTF8
    except OSError:
        return CANNOT_OPEN
    if not lines:
        return EMPTY_CAPTION
    return LABEL_FILE if is_label_file(lines) else None


def _image_fault(path: str) -> Optional[str]:
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


def _is_label(line: str) -> bool:
    fields = line.split()
    if len(fields) < 5 or not (fields[0].isascii() and fields[0].isdigit()):
        return False
    try:
        return all(0 <= float(field) <= 1 for field in fields[1:])
    except ValueError:
        return False


def _match(images: Sequence[str], captions: Sequence[str]) -> Dict[str, str]:
    """Match images to caption files, both sorted relative paths, by the rule of find_pairs."""
    places = [os.path.splitext(name)[0] for name in captions]
    by_place = dict(zip(places, captions))
    matched: Dict[str, str] = {}
    for image in images:
        caption = by_place.pop(os.path.splitext(image)[0], None)
        if caption is not None:
            matched[image] = caption

    # The rest lies in separate folders. Group it by stem; most groups are one image and one caption file.
    groups: Dict[str, Tuple[List[str], List[str]]] = {}
    for place, caption in zip(places, captions):
        if place in by_place:
            groups.setdefault(_stem(caption), ([], []))[1].append(caption)
    for image in images if groups else ():
        if image not in matched and _stem(image) in groups:
            groups[_stem(image)][0].append(image)
    for group_images, group_captions in groups.values():
        if len(group_images) == len(group_captions) == 1:
            matched[group_images[0]] = group_captions[0]
        elif group_images:
            matched.update(_nearest(group_images, group_captions))
    return matched


def _nearest(images: Sequence[str], captions: Sequence[str]) -> Dict[str, str]:
    """Match files of one stem: those with the most leading, then trailing folders in common first.

    Each round looks up one pair of counts in a dictionary, so a stem that occurs in a thousand folders costs a few
    passes over them, not a million comparisons.
    """
    folders = {name: tuple(name.split("/")[:-1]) for name in (*images, *captions)}
    depth = max(map(len, folders.values()))
    matched: Dict[str, str] = {}
    free = list(captions)
    for leading in range(depth, -1, -1):
        for trailing in range(depth, -1, -1):
            shelf: Dict[tuple, List[str]] = {}
            for caption in free:
                parts = folders[caption]
                if len(parts) >= max(leading, trailing):
                    shelf.setdefault((parts[:leading], parts[len(parts) - trailing :]), []).append(caption)
            for image in images:
                parts = folders[image]
                if image in matched or len(parts) < max(leading, trailing):
                    continue
                candidates = shelf.get((parts[:leading], parts[len(parts) - trailing :]))
                if candidates:
                    matched[image] = candidates.pop(0)
                    free.remove(matched[image])
    return matched


def _stem(name: str) -> str:
    return os.path.splitext(name[name.rfind("/") + 1 :])[0]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _no_pair(folder: Path, images: List[str], texts: List[str], skipped: Dict[str, List[str]]) -> str:
    found = f"{_count(len(images), 'image')} ({' '.join(IMAGE_SUFFIXES)})"
    found += f" and {_count(len(texts), f'{CAPTION_SUFFIX} file')} in it or below"
    if images and texts:
        found += f", such as {printable(images[0])} and {printable(texts[0])}"
    reasons = ", ".join(f"{len(names):,} × {reason}" for reason, names in sorted(skipped.items()))
    needed = f"every image needs a {CAPTION_SUFFIX} file of the same stem, one caption per line"
    coco = "for COCO, process_captions.py writes them"
    return f"{folder}: no pair in {found}{reasons and f' ({reasons})'}; {needed} ({coco})"
