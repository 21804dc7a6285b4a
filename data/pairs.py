"""Which picture goes with which caption file in a folder: the scan, the pairing and the account of what was left out.

Nothing here decodes pixels or tokenizes text; of a picture only the header is opened, of a caption file the lines are
read to see that they are captions.

    pairs, skipped = find_pairs("data/COCO")
    report_skipped(skipped)
"""

import io
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from PIL import Image
from tqdm import tqdm

logger = logging.getLogger("minidalle")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
CAPTION_SUFFIX = ".txt"
# What a file under those suffixes may really be. Others that PIL knows are left out: EPS would start a program.
PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")

NO_CAPTION = "picture without caption"
NO_PICTURE = "caption without picture"
CAPTION_TAKEN = "picture whose caption file serves another picture"
LABEL_FILE = "label file"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "not UTF-8"
ZERO_BYTES = "zero-byte picture"
NOT_A_PICTURE = "not a picture"
TOO_LARGE = "picture over PIL's pixel limit"
CANNOT_OPEN = "cannot be opened"
UNREADABLE = "unreadable picture"  # the header is sound, the pixels are not: seen only when the picture is decoded

Skipped = Dict[str, List[Path]]
File = Tuple[str, int, int]  # a file in one state: name relative to the folder with "/", bytes, mtime in nanoseconds

_LINE_BREAK = re.compile(r"\r\n|\r|\n")  # str.splitlines would also cut at form feeds and U+2028 inside a caption
_PROGRESS_FROM = 2000  # files; fewer are over before a bar could be read
_THREADS = 4  # for a disk or network that is slow to answer; with files in memory they only contend for the lock
_WAITED_FOR = 3e-4  # seconds a file; parsing alone takes a fifth of it
_CHUNK = 128
_HEAD = 16 << 10  # bytes


def find_pairs(
    folder: Union[str, Path], sound: Callable[[File], bool] = lambda file: False
) -> Tuple[List[Tuple[File, File]], Skipped]:
    """Search `folder` and everything below it for pictures with a caption file of the same stem.

    A caption file in the picture's own folder is taken first, whatever else matches; otherwise the nearest by path: the
    longest common leading folders, then the longest common trailing folders (images/val/1.jpg goes with
    captions/val/1.txt), then sorted order. A caption file serves one picture. Symbolic links are followed, and no
    folder is entered twice.

    sound: whether a file was found to be a picture, or to hold captions, before, and need not be opened again.

    Returns the pairs (picture, caption file), sorted by the picture's path relative to `folder`, each in the state it
    had before it was opened, and every other file with one of the suffixes as reason → sorted paths.

    Raises FileNotFoundError, PermissionError or ValueError, in one line, when the folder gives no pair at all.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a folder with pictures and caption files is needed")
    skipped: Dict[str, List[str]] = {}
    pictures, texts = _scan(folder, skipped)
    if not pictures or not texts:
        raise ValueError(_nothing_found(folder, len(pictures), len(texts)))

    stem_of = {name: _stem(name) for names in (pictures, texts) for name in names}
    stems = {stem_of[name] for name in pictures}
    captions = _checked([name for name in texts if stem_of[name] in stems], folder, sound, "captions", skipped)
    caption_stems = {stem_of[name] for name in captions}
    usable = _checked([name for name in pictures if stem_of[name] in caption_stems], folder, sound, "pictures", skipped)

    matched = _match(list(usable), list(captions))
    taken = set(matched.values())
    refused = {name for names in skipped.values() for name in names}
    for name in pictures:
        if name not in matched and name not in refused:
            skipped.setdefault(CAPTION_TAKEN if stem_of[name] in caption_stems else NO_CAPTION, []).append(name)
    for name in texts:
        if name not in taken and name not in refused:
            skipped.setdefault(NO_PICTURE, []).append(name)
    if not matched:
        raise ValueError(_nothing_usable(folder, pictures, texts, skipped))
    pairs = [(usable[name], captions[matched[name]]) for name in sorted(matched)]
    return pairs, {reason: [folder / name for name in sorted(names)] for reason, names in skipped.items()}


def report_skipped(skipped: Skipped, logger: logging.Logger = logger, examples: int = 3) -> None:
    """One log line for each reason: how many files, and the first few of them.

    Label files and captions that belong to no picture are told as information, everything else as a warning.
    """
    for reason, paths in sorted(skipped.items()):
        if not paths:
            continue
        level = logging.INFO if reason in (LABEL_FILE, NO_PICTURE) else logging.WARNING
        named = ", ".join(printable(path) for path in paths[:examples])
        rest = ", …" if len(paths) > examples else ""
        logger.log(level, "skipped %s (%s): %s%s", _count(len(paths), "file"), reason, named, rest)


def read_captions(path: Union[str, Path]) -> List[str]:
    """The captions of one file: its non-blank lines, stripped. UTF-8, with or without a byte order mark.

    Raises ValueError when the file is not UTF-8 (UnicodeDecodeError is one) and OSError when it cannot be opened.
    """
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig")
    lines = [line.strip() for line in _LINE_BREAK.split(text)]
    return [line for line in lines if line]


def is_label_file(lines: Iterable[str]) -> bool:
    """True when every line is a YOLO label: a class number, then at least four numbers between 0 and 1.

    Boxes have four (and a confidence at times), segments any number; a caption never looks so.
    """
    lines = list(lines)
    return bool(lines) and all(map(_is_label, lines))


def open_image(path: Union[str, Path], file: Optional[BinaryIO] = None) -> Image.Image:
    """Open a picture's header; the pixels stay on disk until they are asked for, so close it or use `with`.

    `file` gives the bytes in place of the file at `path`, which errors name all the same.

    Raises ValueError for a picture over PIL's pixel limit (between one and two times the limit PIL itself only warns)
    and OSError for a file that is no picture of PICTURE_FORMATS or cannot be opened.
    """
    try:
        image = Image.open(file or path, formats=PICTURE_FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{printable(path)}: {TOO_LARGE}") from None
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{printable(path)}: {TOO_LARGE}")
    return image


def printable(path: Union[str, Path]) -> str:
    """The path for a message: bytes of a file name that are not UTF-8 would make printing it fail."""
    return os.fsencode(path).decode("utf-8", "replace")


def _scan(folder: Path, skipped: Dict[str, List[str]]) -> Tuple[List[str], List[str]]:
    """Pictures and .txt files under `folder`, as sorted paths relative to it with "/" between the parts.

    Folders are entered by their real place before any link to them, so that a link gives a file no second name.
    """
    pictures, texts = [], []
    seen = set()
    places, links = [""], []
    while places or links:
        prefix = places.pop() if places else links.pop()
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
            if _is_folder(entry):
                (links if entry.is_symlink() else places).append(name + "/")
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                pictures.append(name)
            elif suffix == CAPTION_SUFFIX:
                texts.append(name)
        links.sort(reverse=True)
    return sorted(pictures), sorted(texts)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _checked(
    names: Sequence[str], folder: Path, sound: Callable[[File], bool], what: str, skipped: Dict[str, List[str]]
) -> Dict[str, File]:
    """The "captions" or "pictures" that can be used, in order; the others go to `skipped`."""
    check = _caption_fault if what == "captions" else _picture_fault
    root = os.path.join(str(folder), "")
    files: Dict[str, File] = {}
    doubtful = []
    for name in names:
        try:
            status = os.stat(root + name)
            files[name] = (name, status.st_size, status.st_mtime_ns)
        except OSError:
            files[name] = (name, 0, 0)  # the check tells
        if not sound(files[name]):
            doubtful.append(name)
    for name, fault in zip(doubtful, _in_threads(check, folder, doubtful, f"checking {what}")):
        if fault:
            skipped.setdefault(fault, []).append(name)
            del files[name]
    return files


def _in_threads(
    check: Callable[[str], Optional[str]], folder: Path, names: Sequence[str], title: str
) -> List[Optional[str]]:
    """check(path) of every name, in order; in several threads where files have to be waited for."""
    root = str(folder)
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]

    def check_chunk(chunk: Sequence[str]) -> List[Optional[str]]:
        return [check(os.path.join(root, name)) for name in chunk]

    started = time.monotonic()
    results = check_chunk(chunks[0]) if chunks else []
    waiting = time.monotonic() - started > _WAITED_FOR * len(results)
    hidden = None if len(names) > _PROGRESS_FROM else True  # None: a bar on a terminal only
    bar = tqdm(total=len(names), initial=len(results), desc=title, disable=hidden, leave=False)
    with bar, ThreadPoolExecutor(_THREADS if waiting else 1) as pool:
        for part in pool.map(check_chunk, chunks[1:]):
            results += part
            bar.update(len(part))
    return results


def _caption_fault(path: str) -> Optional[str]:
    """Why this .txt cannot be a caption file, or None."""
    if not os.path.isfile(path):  # a broken link; opening a named pipe would wait for ever
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


def _picture_fault(path: str) -> Optional[str]:
    """Why this file cannot be a picture, from its header alone, or None."""
    if not os.path.isfile(path):
        return CANNOT_OPEN
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD)
    except OSError:
        return CANNOT_OPEN
    if not head:
        return ZERO_BYTES
    # PIL reads a header in many small pieces, and among threads each waits for the interpreter lock: hence one read. A
    # header that does not end within it is read from the file.
    fault = _header_fault(path, io.BytesIO(head))
    return _header_fault(path) if fault == NOT_A_PICTURE and len(head) == _HEAD else fault


def _header_fault(path: str, file: Optional[BinaryIO] = None) -> Optional[str]:
    try:
        open_image(path, file).close()
    except Exception as error:  # damaged headers make PIL raise struct.error, SyntaxError, OverflowError and more
        return TOO_LARGE if isinstance(error, ValueError) and TOO_LARGE in str(error) else NOT_A_PICTURE
    return None


def _is_label(line: str) -> bool:
    fields = line.split()
    if len(fields) < 5 or not (fields[0].isascii() and fields[0].isdigit()):
        return False
    try:
        return all(0 <= float(field) <= 1 for field in fields[1:])
    except ValueError:
        return False


def _match(pictures: Sequence[str], captions: Sequence[str]) -> Dict[str, str]:
    """Picture → caption file, both sorted relative paths, by the rule of find_pairs."""
    places = [os.path.splitext(name)[0] for name in captions]
    by_place = dict(zip(places, captions))
    matched: Dict[str, str] = {}
    for picture in pictures:
        caption = by_place.pop(os.path.splitext(picture)[0], None)
        if caption is not None:
            matched[picture] = caption

    # What is left lies in folders of its own: group it by stem, where most groups are one picture and one caption file.
    groups: Dict[str, Tuple[List[str], List[str]]] = {}
    for place, caption in zip(places, captions):
        if place in by_place:
            groups.setdefault(_stem(caption), ([], []))[1].append(caption)
    for picture in pictures if groups else ():
        if picture not in matched and _stem(picture) in groups:
            groups[_stem(picture)][0].append(picture)
    for group_pictures, group_captions in groups.values():
        if len(group_pictures) == len(group_captions) == 1:
            matched[group_pictures[0]] = group_captions[0]
        elif group_pictures:
            matched.update(_nearest(group_pictures, group_captions))
    return matched


def _nearest(pictures: Sequence[str], captions: Sequence[str]) -> Dict[str, str]:
    """Match files of one stem, the pairs with the most leading, then trailing folders in common first.

    Each round looks for one such pair of counts with a dictionary, so a stem that occurs in a thousand folders costs a
    few passes over them, not a million comparisons.
    """
    folders = {name: tuple(name.split("/")[:-1]) for name in (*pictures, *captions)}
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
            for picture in pictures:
                parts = folders[picture]
                if picture in matched or len(parts) < max(leading, trailing):
                    continue
                candidates = shelf.get((parts[:leading], parts[len(parts) - trailing :]))
                if candidates:
                    matched[picture] = candidates.pop(0)
                    free.remove(matched[picture])
    return matched


def _stem(name: str) -> str:
    return os.path.splitext(name[name.rfind("/") + 1 :])[0]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_NEEDED = f"every picture needs a {CAPTION_SUFFIX} file of the same stem, one caption a line"


def _nothing_found(folder: Path, pictures: int, texts: int) -> str:
    looked_for = " ".join(IMAGE_SUFFIXES)
    if pictures:
        coco = "for COCO, process_captions.py writes them"
        return f"{folder}: {_count(pictures, 'picture')} but no {CAPTION_SUFFIX} caption file; {_NEEDED} ({coco})"
    if texts:
        captions = _count(texts, f"{CAPTION_SUFFIX} file")
        return f"{folder}: {captions} but no picture ({looked_for}) here or in any folder below; {_NEEDED}"
    return f"{folder}: no picture ({looked_for}) and no {CAPTION_SUFFIX} file here or in any folder below; {_NEEDED}"


def _nothing_usable(folder: Path, pictures: List[str], texts: List[str], skipped: Dict[str, List[str]]) -> str:
    found = f"{_count(len(pictures), 'picture')} and {_count(len(texts), f'{CAPTION_SUFFIX} file')}"
    reasons = ", ".join(f"{len(names):,} × {reason}" for reason, names in sorted(skipped.items()))
    examples = f"such as {printable(pictures[0])} and {printable(texts[0])}"
    return f"{folder}: {found}, {examples}, but no pair can be used ({reasons}); {_NEEDED}"
