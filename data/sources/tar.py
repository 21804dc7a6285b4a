"""Tar shards as img2dataset and WebDataset write them: `KEY.jpg` with `KEY.txt`, or with "caption" in `KEY.json`.

Each shard is indexed once: the places of its images and captions go into a small file, and every sample is then read in
place. Members whose names are equal up to the first dot of their last part belong together.
"""

import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Optional, Sequence, Tuple

from tqdm import tqdm

from data import files
from data.files import File, Skipped, StoredImage, printable
from data.sources.base import ImagePath, ImageSource
from utils.files import atomic_write

logger = logging.getLogger("minidalle")

TEXT_SUFFIXES = (".txt", ".caption", ".text", ".json")  # in the order of preference
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
INDEX_VERSION = 1
CUT_SHORT = "shard that is damaged or cut short; what lies before that is used"
_PROGRESS_FROM = 20  # shards

Member = Tuple[str, int, int]  # name, offset of its content, bytes


class TarImage(StoredImage):
    """An image in a shard."""

    def __init__(self, path: Path, name: str, offset: int, size: int):
        self.path, self.name, self.offset, self.size = path, name, offset, size

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    def read(self) -> bytes:
        return read_part(self.path, self.offset, self.size)


class TarShards(ImageSource):
    """The samples of all shards, in the order of the shards' names and of each shard's content."""

    form = "tar shards"

    def __init__(self, folder: Path, shards: Sequence[str], cache_dir: Optional[Path] = None):
        """Read the index in `cache_dir`, or index the shards; ValueError if none has an image with a caption."""
        self._samples: Dict[str, Tuple[str, Member, Member]] = {}  # name -> shard, places of image and captions
        images: List[File] = []
        texts: List[File] = []
        skipped: Dict[str, List[str]] = {}
        for shard, entry in index_shards(folder, shards, cache_dir).items():
            for image, text in entry["samples"]:
                name = f"{shard}/{image[0]}"
                if name not in self._samples:
                    self._samples[name] = shard, tuple(image), tuple(text)
                    images.append((name, image[2], entry["mtime"]))
                    texts.append((name, text[2], entry["mtime"]))
            for reason, names in entry["skipped"].items():
                skipped.setdefault(reason, []).extend(f"{shard}/{name}" if name else shard for name in names)
        paths: Skipped = {reason: [folder / name for name in names] for reason, names in skipped.items()}
        if not images:
            reasons = ", ".join(f"{len(names):,} × {reason}" for reason, names in sorted(skipped.items()))
            raise ValueError(
                f"{printable(folder)}: no image with a caption in {len(shards)} tar files"
                f"{reasons and f' ({reasons})'}; a sample is KEY.jpg with KEY.txt, or with KEY.json that has a caption"
            )
        super().__init__(folder, images, texts, paths)
        self.holders = shards

    def image(self, name: str) -> ImagePath:
        shard, image, _ = self._samples[name]
        return TarImage(self.folder / shard, *image)

    def captions(self, name: str) -> List[str]:
        shard, _, text = self._samples[name]
        return files.parse_captions(text[0], read_part(self.folder / shard, *text[1:]))


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return a part of a file; OSError if the file has become shorter."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(size)
    if content is None or len(content) != size:
        raise OSError(f"{printable(path)}: has become shorter since it was indexed")
    return content


def index_shards(folder: Path, shards: Sequence[str], cache_dir: Optional[Path]) -> Dict[str, Dict[str, Any]]:
    """Return the content of each shard, indexing those that are new or have changed, and keep it in `cache_dir`."""
    path = None if cache_dir is None else cache_dir / "tar-index.json"
    inside = path is not None and path.parent.resolve() == folder.resolve()
    place = "" if inside else f"{folder.resolve()}/"  # other folders may have shards of the same names
    known: Dict[str, Dict[str, Any]] = {}
    try:
        saved = json.loads(path.read_bytes()) if path else {}
        known = dict(saved["shards"]) if saved.get("version") == INDEX_VERSION else {}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: damaged, indexing again (%s)", path, error)
    found: Dict[str, Dict[str, Any]] = {}
    changed = False
    hidden = None if logger.isEnabledFor(logging.INFO) and len(shards) >= _PROGRESS_FROM else True
    for shard in tqdm(sorted(shards), desc="indexing shards", unit="shard", disable=hidden, leave=False):
        status = os.stat(folder / shard)
        entry = known.get(place + shard)
        if entry is None or (entry.get("size"), entry.get("mtime")) != (status.st_size, status.st_mtime_ns):
            entry = {"size": status.st_size, "mtime": status.st_mtime_ns, **index_shard(folder / shard)}
            known[place + shard], changed = entry, True
        found[shard] = entry
    if changed and path:
        try:
            with atomic_write(path, text=True) as file:
                json.dump({"version": INDEX_VERSION, "shards": known}, file)
        except OSError as error:
            logger.warning("shards are indexed again in every run: %s", error)
    return found


def index_shard(path: Path) -> Dict[str, Any]:
    """Return {"samples": [[image, text]], "skipped": {reason: [member name]}} of a shard, each place a Member."""
    skipped: Dict[str, List[str]] = {}
    samples = []
    with open(path, "rb") as content:
        members, whole = list_members(content)
        if not whole:
            skipped[CUT_SHORT] = [""]
        for group in members.values():
            image = next((member for member in group if _suffix(member[0]) in files.IMAGE_SUFFIXES), None)
            texts = {_suffix(member[0]): member for member in group}
            text = next((texts[suffix] for suffix in TEXT_SUFFIXES if suffix in texts), None)
            fault = None
            if image is None or text is None:
                fault = files.NO_CAPTION if image else files.NO_IMAGE
            elif not image[2]:
                fault = files.ZERO_BYTES
            else:
                content.seek(text[1])
                try:
                    fault = None if files.parse_captions(text[0], content.read(text[2])) else files.EMPTY_CAPTION
                except ValueError:
                    fault = files.NOT_JSON if text[0].lower().endswith(".json") else files.NOT_UTF8
            if fault is None:
                samples.append([image, text])
            elif image or text:
                skipped.setdefault(fault, []).append((image or text or group[0])[0])
    return {"samples": samples, "skipped": skipped}


def list_members(content: BinaryIO) -> Tuple[Dict[str, List[Member]], bool]:
    """Return the files of a tar archive by the key of their sample, and whether the archive is whole."""
    found: Dict[str, Member] = {}  # by name: `tar -r` and `tar -u` append newer versions of a file
    end = content.seek(0, os.SEEK_END)
    content.seek(0)
    try:
        with tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    if member.offset_data + member.size > end:
                        raise EOFError
                    found[member.name] = (member.name, member.offset_data, member.size)
            # tarfile stops at a damaged header without an error; a whole archive has zeros there.
            content.seek(archive.offset)
            whole = not content.read(tarfile.BLOCKSIZE).strip(b"\0")
    except (tarfile.TarError, OSError, EOFError):
        whole = False
    members: Dict[str, List[Member]] = {}
    for place in found.values():
        members.setdefault(_key(place[0]), []).append(place)
    return members, whole


def _key(name: str) -> str:
    """Return a member's name up to the first dot of its last part, as WebDataset splits it."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _suffix(name: str) -> str:
    return "." + name.rpartition("/")[2].partition(".")[2].lower()
