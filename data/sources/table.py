"""Captions in one file for many images: the base of the forms that list file names and captions."""

import os
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Sequence

from data.files import IMAGE_SUFFIXES, NOT_LISTED, File, Skipped, check_images, printable, same_name
from data.sources.base import ImageSource, text_state

NO_SUCH_IMAGE = "listed image that is missing"
AMBIGUOUS = "listed image whose name several files have"
NO_TEXT = "listed image without caption"


class Entry(NamedTuple):
    """One image of a list: its name, relative to `place`, and its captions; empty ones are already dropped."""

    name: str
    captions: List[str]
    place: str = ""  # the list's own folder, relative to that of the images, "" or ending with "/"
    hint: str = ""  # a name such as train2017, which a folder of the image may have, too


class Table(ImageSource):
    """Images whose captions one or several files list."""

    def __init__(
        self,
        form: str,
        folder: Path,
        entries: Iterable[Entry],
        images: Sequence[str],
        known_good: Callable[[File], bool],
    ):
        """Find the images of all entries among the files `images` of the folder.

        Raises:
            ValueError: no entry has an image and a caption.
        """
        self.form = form
        skipped: Dict[str, List[str]] = {}
        self._captions: Dict[str, List[str]] = {}
        find, count = _Finder(images), 0
        for entry in entries:
            count += 1
            found = find(entry)
            if not entry.captions or len(found) != 1:
                reason = NO_TEXT if not entry.captions else AMBIGUOUS if found else NO_SUCH_IMAGE
                skipped.setdefault(reason, []).append(entry.name)
            else:
                captions = self._captions.setdefault(found[0], [])
                captions += [caption for caption in entry.captions if caption not in captions]
        usable = check_images(folder, sorted(self._captions), known_good, skipped)
        unlisted = set(images).difference(self._captions, *skipped.values())
        if unlisted:
            skipped[NOT_LISTED] = list(unlisted)
        paths: Skipped = {reason: [folder / name for name in sorted(set(names))] for reason, names in skipped.items()}
        if not usable:
            reasons = ", ".join(f"{len(names):,} × {reason}" for reason, names in sorted(paths.items()))
            raise ValueError(
                f"{printable(folder)}: none of {count:,} listed images can be used ({form}; {reasons or 'it is empty'})"
            )
        super().__init__(
            folder, list(usable.values()), [text_state(name, self._captions[name]) for name in usable], paths
        )

    def captions(self, name: str) -> List[str]:
        """Return the captions that the files list for an image."""
        return self._captions[name]


class _Finder:
    """Find listed images among files: by their path, else by their name alone."""

    def __init__(self, images: Sequence[str]):
        self.by_path: Dict[str, List[str]] = {}
        self.by_name: Dict[str, List[str]] = {}
        for image in images:
            key = _key(image)
            self.by_path.setdefault(key, []).append(image)
            self.by_name.setdefault(key[key.rfind("/") + 1 :], []).append(image)

    def __call__(self, entry: Entry) -> List[str]:
        """Return the files that an entry may mean; exactly one if it is clear."""
        key = _key(os.path.normpath(entry.name.replace("\\", "/")).replace(os.sep, "/"))
        paths = self.by_path.get(_key(os.path.normpath(entry.place + key).replace(os.sep, "/")))
        if paths:
            exact = [path for path in paths if path == entry.place + entry.name]
            return exact or paths
        found = (
            self.by_name.get(key[key.rfind("/") + 1 :]) or self.by_name.get(key[key.rfind("/") + 1 :] + ".jpg") or []
        )
        if len(found) > 1:  # the folders that the list names come last in the path, or the list is named like a folder
            for part in ([f"/{key}"] if "/" in key else []) + [f"/{entry.hint}/"] * bool(entry.hint):
                chosen = [name for name in found if part in f"/{_key(name)}"]
                if chosen:
                    return chosen
        return found


def _key(name: str) -> str:
    """Return a name in one form of Unicode, its suffix in lower case."""
    stem, suffix = os.path.splitext(name)
    return same_name(stem + suffix.lower() if suffix.lower() in IMAGE_SUFFIXES else name)


def clean_captions(values: Iterable[object]) -> List[str]:
    """Return the texts among some values, each in one line, without empty ones."""
    texts = (" ".join(value.split()) for value in values if isinstance(value, str))
    return [text for text in texts if text]
