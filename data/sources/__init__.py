"""Captioned images in all forms that the program reads; open_source finds out which form a path has.

Images with .txt files of their names come before any other form, and images with .json files of their names second.
"""

import re
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple, Union

from data.files import IMAGE_SUFFIXES, File, Listing, describe_others, list_files, printable
from data.sources import captions_lists, tar
from data.sources.base import SPLIT_NAME, ImagePath, ImageSource, files_of_split
from data.sources.folder import NoPairs, PairedFolder, possible_pairs
from data.sources.rows import ROW_SUFFIXES, Rows
from data.sources.table import Entry, Table

__all__ = ["ImagePath", "ImageSource", "find_images", "folder_of", "open_source"]
COCO = "captions in COCO's JSON"
OTHER_LISTS = ("instances_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")  # large, without captions
NEVER_COUNTED = ("captions-", "codes-", "tar-index.")  # how the program's own caches begin


def folder_of(path: Union[str, Path]) -> Path:
    """Return the folder that the images of an --input-folder are in: itself, or that of a file.

    COCO keeps its lists in `annotations`, next to the folders of images.
    """
    path = Path(path)
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def open_source(
    path: Union[str, Path],
    known_good: Callable[[File], bool] = lambda file: False,
    cache_dir: Optional[Path] = None,
    validation: bool = False,
) -> ImageSource:
    """Return the captioned images of a folder or file.

    Args:
        known_good: whether a file is known to be an image or to hold captions; such files are not opened.
        cache_dir: where tar shards keep their index; None: nowhere.
        validation: of a form with splits, read those to validate on instead of those to train on.

    Raises:
        ValueError, OSError: the path cannot be read, has none of the forms, or no captioned image.
    """
    path = Path(path)
    folder = folder_of(path)
    if not path.exists():
        raise FileNotFoundError(f"{printable(path)}: no such folder")
    if not path.is_dir():
        return _open_file(path, folder, known_good, cache_dir, validation)
    skipped: Dict[str, List[str]] = {}
    listing = list_files(path, skipped)
    others = [name for name in listing.others if not name.rpartition("/")[2].startswith(NEVER_COUNTED)]
    source: Optional[ImageSource] = None
    try:
        source = PairedFolder(path, known_good, listing)
    except NoPairs as error:
        source = _open_sidecars(folder, listing, known_good) or _open_lists(folder, listing, known_good, validation)
        shards = [name for name in others if name.lower().endswith(".tar")]
        files = [name for name in others if name.lower().endswith(ROW_SUFFIXES)]
        if source is None and shards:
            source = tar.TarShards(folder, files_of_split(folder, shards, validation), cache_dir)
        elif source is None and files:
            source = Rows(folder, files, validation)
        if source is None:
            more = f"; other files: {describe_others(others)}" if others else ""
            forms = "docs/training.md lists other forms that can be read"
            raise NoPairs(f"{error}; {forms}{more}{_hint(folder, others)}") from None
    for reason, names in skipped.items():
        source.skipped[reason] = [*source.skipped.get(reason, []), *(folder / name for name in names)]
    source.others = sorted(set(others).difference(source.holders))
    return source


def find_images(path: Union[str, Path]) -> List[ImagePath]:
    """Return where to read all images of a folder, by path, or of a file; ValueError or OSError without any."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{printable(path)}: no such folder; a folder of images is needed")
    loose: List[ImagePath] = []
    if path.is_dir():
        listing = list_files(path, {})
        loose = [path / name for name in sorted(map(Path, listing.images))]
        if not any(name.lower().endswith((".tar", *ROW_SUFFIXES)) for name in listing.others):
            if not loose:
                more = f"; other files: {describe_others(listing.others)}" if listing.others else ""
                raise ValueError(f"{printable(path)}: no images in it or below ({' '.join(IMAGE_SUFFIXES)}){more}")
            return loose
    try:
        source = open_source(path)
    except ValueError:
        if loose:
            return loose
        raise
    # A few images next to files with many, such as those of a README, are not the data.
    return loose if len(loose) > len(source.images) else [source.image(name) for name, _, _ in source.images]


def _open_file(
    path: Path, folder: Path, known_good: Callable[[File], bool], cache_dir: Optional[Path], validation: bool
) -> ImageSource:
    name = path.name.lower()
    if name.endswith(".tar"):
        return tar.TarShards(folder, [path.relative_to(folder).as_posix()], cache_dir)
    if name.endswith(tar.COMPRESSED):
        raise ValueError(f"{printable(path)}: is compressed; unpack it first, to a .tar or a folder")
    listing = list_files(folder, {})
    source = _open_lists(folder, listing, known_good, validation, [path.relative_to(folder).as_posix()])
    if source is None and name.endswith(ROW_SUFFIXES):
        return Rows(folder, [path.relative_to(folder).as_posix()], validation)
    if source is None:
        raise ValueError(
            f"{printable(path)}: is no list of images and captions; a folder, COCO's captions_*.json, a table such as "
            "metadata.jsonl or captions.csv, or a .tar is needed"
        )
    return source


def _open_sidecars(folder: Path, listing: Listing, known_good: Callable[[File], bool]) -> Optional[ImageSource]:
    """Return the images that have a .json file of the same stem with captions, or None if no image has one."""
    files, _ = possible_pairs(listing.images, [name for name in listing.others if name.lower().endswith(".json")])
    try:
        source = PairedFolder(folder, known_good, Listing(listing.images, files, []))
    except NoPairs:
        return None
    source.form, source.holders = "images and .json files", files
    return source


def _open_lists(
    folder: Path,
    listing: Listing,
    known_good: Callable[[File], bool],
    validation: bool,
    names: Optional[List[str]] = None,
) -> Optional[ImageSource]:
    """Return the images that captions in files `names`, or in any files, list; None if there is no such file."""
    if not listing.images:
        return None
    candidates = [*listing.texts, *listing.others] if names is None else names
    forms: Dict[str, List[Tuple[str, Iterator[Entry]]]] = {}  # lists of several splits are one
    faults: Dict[str, ValueError] = {}
    for name in candidates:
        try:
            found = _read_list(folder, name, chosen=names is not None)
        except ValueError as error:  # perhaps a file for something else
            faults[name] = error
            continue
        if found is not None:
            forms.setdefault(found[0], []).append((name, found[1]))
    for name, fault in faults.items():  # another split of a list would replace it, and train on what is for validation
        if not forms or _form_of(name) in forms:
            raise fault
    if not forms:
        return None
    form = COCO if COCO in forms else next(iter(forms))
    entries = (entry for _, part in forms[form] for entry in part)
    source = Table(form, folder, entries, listing.images, known_good, validation)
    source.holders = [name for name, _ in forms[form]]
    return source


def _read_list(folder: Path, name: str, chosen: bool) -> Optional[Tuple[str, Iterator[Entry]]]:
    """Return the form and entries of a file, or None if it lists no captions; ValueError if it is damaged."""
    path, place = folder / name, name[: name.rfind("/") + 1]
    suffix = path.suffix.lower()
    if not chosen and (
        suffix not in (".json", ".txt", *captions_lists.TABLE_SUFFIXES) or path.name.startswith(OTHER_LISTS)
    ):
        return None
    if suffix == ".json":
        content = captions_lists.read_json(path)
        if captions_lists.is_captions(content):
            return COCO, captions_lists.coco_entries(content, path, place)
    rows = captions_lists.read_entries(path, place)
    return None if rows is None else (_form_of(name), rows)


def _form_of(name: str) -> str:
    """Return the form that a list has according to its name, which files of several splits share."""
    last = name.rpartition("/")[2]
    return COCO if re.match(r"captions_.*\.json$", last) else f"captions in {SPLIT_NAME.sub('*', last)}"


def _hint(folder: Path, others: List[str]) -> str:
    """Return what else to try for a folder of COCO's images, whose captions lie next to it."""
    lists = sorted((folder.resolve().parent / "annotations").glob(f"captions_*{folder.resolve().name}*.json"))
    packed = [name for name in others if name.lower().endswith(tar.COMPRESSED)]
    if lists:
        return f"; give {printable(lists[0])} instead"
    return f"; {packed[0]} is compressed; unpack it first" if packed else ""
