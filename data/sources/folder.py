"""A folder of images, each with a .txt file, or a .json file with "caption", of the same stem."""

import os
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from data import files
from data.files import File, Listing, Skipped, count, printable, read_captions, same_name
from data.sources.base import ImageSource


class PairedFolder(ImageSource):
    """Images, each with a file of captions; NoPairs if no image has one."""

    form = "images and .txt files"

    def __init__(self, folder: Path, known_good: Callable[[File], bool], listing: Listing):
        pairs, skipped = find_pairs(folder, known_good, listing)
        super().__init__(folder, [image for image, _ in pairs], [text for _, text in pairs], skipped)

    def captions(self, name: str) -> List[str]:
        return read_captions(self.folder / name)


def find_pairs(
    folder: Path, known_good: Callable[[File], bool], listing: Listing
) -> Tuple[List[Tuple[File, File]], Skipped]:
    """Find the images in `folder` and below that have a caption file of the same stem.

    A caption file in the image's own folder comes first. Otherwise the nearest by path is taken: the one with the most
    leading folders in common, then the most trailing folders (images/val/1.jpg goes with captions/val/1.txt), then the
    first in sorted order. A caption file belongs to one image. Stems may be spelled in different forms of Unicode, and
    1.jpg.txt belongs to 1.jpg if there is no 1.txt. Symbolic links are followed; no folder is entered twice.

    Args:
        known_good: whether a file is known to be an image or to hold captions; such files are not opened.
        listing: what files.list_files(folder) returns.

    Returns:
        The pairs (image, caption file), sorted by the image's path, each file in its state before it was opened; and
        every other file with one of the suffixes, by reason.

    Raises:
        NoPairs: it has no pair.
    """
    skipped: Dict[str, List[str]] = {}
    images, texts, _ = listing
    caption_names, image_names = possible_pairs(images, texts)
    captions = files.check_files(caption_names, folder, known_good, _caption_fault, skipped)
    _, image_names = possible_pairs(image_names, list(captions))
    usable = files.check_files(image_names, folder, known_good, files.image_fault, skipped)

    matched = _match(list(usable), list(captions))
    taken = set(matched.values())
    refused = {name for names in skipped.values() for name in names}
    named_by_caption = set(image_names)
    for name in images:
        if name not in matched and name not in refused:
            skipped.setdefault(files.CAPTION_TAKEN if name in named_by_caption else files.NO_CAPTION, []).append(name)
    for name in texts:
        if name not in taken and name not in refused:
            skipped.setdefault(files.NO_IMAGE, []).append(name)
    if not matched:
        raise NoPairs(_no_pair(folder, images, texts, skipped))
    pairs = [(usable[name], captions[matched[name]]) for name in sorted(matched)]
    return pairs, {reason: [folder / name for name in sorted(names)] for reason, names in skipped.items()}


class NoPairs(ValueError):
    """A folder has no image with a caption file."""


def is_label_file(lines: Iterable[str]) -> bool:
    """Return whether every line is a YOLO label: a class number, then at least four numbers between 0 and 1."""
    lines = list(lines)
    return bool(lines) and all(map(_is_label, lines))


def _caption_fault(path: str) -> Optional[str]:
    if not os.path.isfile(path):  # a broken link, or a named pipe, which would never finish opening
        return files.CANNOT_OPEN
    try:
        lines = read_captions(path)
    except ValueError:
        return files.NOT_JSON if path.lower().endswith(".json") else files.NOT_UTF8
    except OSError:
        return files.CANNOT_OPEN
    if not lines:
        return files.EMPTY_CAPTION
    return files.LABEL_FILE if is_label_file(lines) else None


def _is_label(line: str) -> bool:
    fields = line.split()
    if len(fields) < 5 or not (fields[0].isascii() and fields[0].isdigit()):
        return False
    try:
        return all(0 <= float(field) <= 1 for field in fields[1:])
    except ValueError:
        return False


def _name_keys(image: str) -> Tuple[str, str]:
    """Return what a caption file of this image may be called, without its suffix, in one form of Unicode."""
    name = same_name(_last_part(image))
    return _without_suffix(name), name


def possible_pairs(images: Sequence[str], texts: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the caption files that are named like an image, and the images that are named by a caption file."""
    wanted = {key for image in images for key in _name_keys(image)}
    captions = [text for text in texts if same_name(_stem(text)) in wanted]
    stems = {same_name(_stem(text)) for text in captions}
    return captions, [image for image in images if not stems.isdisjoint(_name_keys(image))]


def _match(images: Sequence[str], captions: Sequence[str]) -> Dict[str, str]:
    """Match images to caption files, both sorted relative paths, by the rule of find_pairs."""
    # In the order of precedence: the same stem, the same in another form of Unicode, 1.jpg.txt for 1.jpg. The first
    # suffixes come first: an animated preview does not take a photograph's captions.
    images = sorted(images, key=lambda name: not name.lower().endswith(files.IMAGE_SUFFIXES[:4]))
    matched: Dict[str, str] = {}
    taken: Set[str] = set()
    for key_of_image, key_of_caption in (
        (_without_suffix, _without_suffix),
        (lambda name: same_name(_without_suffix(name)), lambda name: same_name(_without_suffix(name))),
        (same_name, lambda name: same_name(_without_suffix(name))),
    ):
        left = [image for image in images if image not in matched]
        free = [caption for caption in captions if caption not in taken]
        if not left or not free:
            break
        matched.update(_match_by(left, free, key_of_image, key_of_caption))
        taken = set(matched.values())
    return matched


def _match_by(
    images: Sequence[str],
    captions: Sequence[str],
    key_of_image: Callable[[str], str],
    key_of_caption: Callable[[str], str],
) -> Dict[str, str]:
    """Match names whose keys are equal or, in another folder, have the same last part."""
    places = [key_of_caption(name) for name in captions]
    by_place = dict(zip(places, captions))
    matched: Dict[str, str] = {}
    for image in images:
        caption = by_place.pop(key_of_image(image), None)
        if caption is not None:
            matched[image] = caption

    # The rest lies in separate folders. Group it by stem; most groups are one image and one caption file.
    groups: Dict[str, Tuple[List[str], List[str]]] = {}
    for place, caption in zip(places, captions):
        if place in by_place:
            groups.setdefault(_last_part(place), ([], []))[1].append(caption)
    for image in images if groups else ():
        stem = _last_part(key_of_image(image))
        if image not in matched and stem in groups:
            groups[stem][0].append(image)
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


def _without_suffix(name: str) -> str:
    return os.path.splitext(name)[0]


def _last_part(name: str) -> str:
    return name[name.rfind("/") + 1 :]


def _stem(name: str) -> str:
    return _without_suffix(_last_part(name))


def _no_pair(folder: Path, images: List[str], texts: List[str], skipped: Dict[str, List[str]]) -> str:
    found = f"{count(len(images), 'image')} and {count(len(texts), f'{files.CAPTION_SUFFIX} file')} in it or below"
    if images and texts:
        found += f", such as {printable(images[0])} and {printable(texts[0])}"
    reasons = ", ".join(f"{len(names):,} × {reason}" for reason, names in sorted(skipped.items()))
    needed = f"every image needs a {files.CAPTION_SUFFIX} file of the same stem, one caption per line"
    return f"{printable(folder)}: no pair in {found}{reasons and f' ({reasons})'}; {needed}"
