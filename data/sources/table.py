"""Captions in one file for many images: the base of the forms that list file names and captions."""

import os
import re
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Sequence

from data import files
from data.files import File, Skipped, printable
from data.sources.base import ImageSource, choose_splits, text_state

NO_SUCH_IMAGE = "listed image that is missing"
AMBIGUOUS = "listed image whose name several files have"
NO_TEXT = "listed image without caption"
_COCO_2014 = re.compile(r"^COCO_(train|val|test)2014_(?=\d{12}$)")


class Entry(NamedTuple):
    """One image of a list: its name, relative to `place`, and its captions; empty ones are already dropped."""

    name: str
    captions: List[str]
    place: str = ""  # the list's own folder, relative to that of the images, "" or ending with "/"
    hint: str = ""  # a name such as train2017, which a folder of the image may have, too
    split: str = ""


class Table(ImageSource):
    """Images whose captions one or several files list."""

    def __init__(
        self,
        form: str,
        folder: Path,
        entries: Iterable[Entry],
        images: Sequence[str],
        known_good: Callable[[File], bool],
        validation: bool = False,
    ):
        """Find the images of all entries among the files `images` of the folder; ValueError if no entry can be used."""
        self.form = form
        skipped: Dict[str, List[str]] = {}
        self._captions: Dict[str, List[str]] = {}
        find, entries = _Finder(images), list(entries)
        splits = choose_splits({entry.split for entry in entries}, validation, folder)
        for entry in entries:
            found = find(entry)
            if len(found) != 1:
                skipped.setdefault(AMBIGUOUS if found else NO_SUCH_IMAGE, []).append(entry.name)
            elif entry.split not in splits:
                skipped.setdefault(files.OTHER_SPLIT, []).append(found[0])
            elif not entry.captions:
                skipped.setdefault(NO_TEXT, []).append(found[0])
            else:
                captions = self._captions.setdefault(found[0], [])
                captions += [caption for caption in entry.captions if caption not in captions]
        for reason in (files.OTHER_SPLIT, NO_TEXT):  # another entry may have captions
            skipped[reason] = [name for name in skipped.get(reason, []) if name not in self._captions]
        usable = files.check_files(sorted(self._captions), folder, known_good, files.image_fault, skipped)
        unlisted = set(images).difference(self._captions, *skipped.values())
        if unlisted:
            skipped[files.NOT_LISTED] = list(unlisted)
        names = {reason: sorted(set(names)) for reason, names in sorted(skipped.items()) if names}
        if not usable:
            reasons = ", ".join(f"{len(found):,} × {reason}" for reason, found in names.items()) or "it is empty"
            problem = f"none of {len(entries):,} listed images can be used ({form}; {reasons})"
            raise ValueError(f"{printable(folder)}: {problem}")
        paths: Skipped = {reason: [folder / name for name in found] for reason, found in names.items()}
        texts = [text_state(name, self._captions[name]) for name in usable]
        super().__init__(folder, list(usable.values()), texts, paths)

    def captions(self, name: str) -> List[str]:
        return self._captions[name]


class _Finder:
    """Find listed images among files: by their path, else by their name, else by their name without its suffix."""

    def __init__(self, images: Sequence[str]):
        self.by_path: Dict[str, List[str]] = {}
        self.by_name: Dict[str, List[str]] = {}
        self.by_stem: Dict[str, List[str]] = {}
        for image in images:
            key = _key(image)
            self.by_path.setdefault(key, []).append(image)
            name = key[key.rfind("/") + 1 :]
            self.by_name.setdefault(name, []).append(image)
            self.by_stem.setdefault(_stem(name), []).append(image)

    def __call__(self, entry: Entry) -> List[str]:
        """Return the files that an entry may mean; exactly one if it is clear."""
        key = _key(os.path.normpath(entry.name.replace("\\", "/")).replace(os.sep, "/"))
        paths = self.by_path.get(_key(os.path.normpath(entry.place + key).replace(os.sep, "/")))
        if paths:
            exact = [path for path in paths if path == entry.place + entry.name]
            return exact or paths
        name = key[key.rfind("/") + 1 :]
        found = self.by_name.get(name) or self.by_stem.get(_stem(name)) or self.by_stem.get(name.zfill(12)) or []
        if len(found) > 1:  # the folders that the list names come last in the path, or the list is named like a folder
            for part in ([f"/{key}"] if "/" in key else []) + [f"/{entry.hint}/"] * bool(entry.hint):
                chosen = [name for name in found if part in f"/{_key(name)}"]
                if chosen:
                    return chosen
        return found


def _stem(name: str) -> str:
    """Return a name without its suffix, and without what COCO 2014 has before the number of an image."""
    stem, suffix = os.path.splitext(name)
    return _COCO_2014.sub("", stem if suffix in files.IMAGE_SUFFIXES else name)


def _key(name: str) -> str:
    """Return a name in one form of Unicode, its suffix in lower case."""
    stem, suffix = os.path.splitext(name)
    return files.same_name(stem + suffix.lower() if suffix.lower() in files.IMAGE_SUFFIXES else name)
