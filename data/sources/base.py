"""What every form of captioned images offers to the rest of the program."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import List, Sequence

from data.files import File, Skipped
from data.images import ImagePath


class ImageSource(ABC):
    """Captioned images in a fixed order.

    Attributes:
        form: how they are kept, for humans.
        folder: what names are relative to.
        images: name and state of each image.
        texts: name and state of what holds each image's captions.
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
