"""Check images and captions before a long run: report what training would skip or refuse, and what is worth knowing.

    python -m data.check FOLDER
    python -m data.check --config photos FOLDER

Every image is decoded as in training and every caption is tokenized, in several processes. Nothing is changed.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import yaml
from tqdm import tqdm

from data import files
from data.captions import TokenCounts, describe_set, describe_unknown, encode_caption
from data.files import StoredImage, printable
from data.images import ImagePath, WorkerImages, load_image
from data.sources import ImageSource, open_source
from data.tokenizer import Tokenizer, load_tokenizer
from utils.command_line import COUNT, NATURAL, Parser, exit_on_error

DEADLY = "image whose reading kills the process"
TOO_LONG = "caption file with more than {} tokens per caption"
SMALL = "image with fewer than {} pixels per side, which is enlarged"
LONG = "image more than three times as long as wide, of which the center square is used"
ONE_COLOR = "image of a single color"
SAME_IMAGE = "image with the same bytes as another"
UNKNOWN = "caption file with characters that the vocabulary lacks"

_BATCH = 16  # samples that a worker hands over together


class Findings(NamedTuple):
    """What is found about one pair."""

    traits: Tuple[str, ...]  # the kinds of image above that apply
    digest: Optional[bytes]  # of the image's bytes; None if it cannot be read
    lengths: Tuple[int, ...]  # tokens of each caption
    unknown: int  # unknown tokens in all captions
    unread: int  # captions that the vocabulary cannot read


class _Samples(WorkerImages):
    """Item i is what is found about sample i, None if it killed a worker."""

    def __init__(self, source: ImageSource, tokenizer: Tokenizer, image_size: int):
        super().__init__([source.image(name) for name, _, _ in source.images])
        self.source, self.tokenizer, self.image_size = source, tokenizer, image_size

    def __getitem__(self, index: int) -> Optional[Findings]:
        if index in self.deadly:
            return None
        traits: Tuple[str, ...] = ()
        digest = None
        self.tracker.mark(index)
        with contextlib.suppress(ValueError, OSError):
            traits, digest = self.look_at(self.paths[index])
        self.tracker.mark(-1)
        unknown = self.tokenizer.unknown
        ids = [encode_caption(self.tokenizer, text) for text in self.source.captions(self.source.texts[index][0])]
        count = sum(token == unknown for tokens in ids for token in tokens)
        unread = ids.count([unknown]) if unknown is not None else 0
        return Findings(traits, digest, tuple(map(len, ids)), count, unread)

    def look_at(self, path: ImagePath) -> Tuple[Tuple[str, ...], bytes]:
        """Return the kinds of image that this one is, and a digest of its bytes; raise what load_image raises."""
        pixels = load_image(path, self.image_size)
        with files.open_image(path) as image:
            short, long = sorted(image.size)
        kinds = {
            SMALL.format(self.image_size): short < self.image_size,
            LONG: long > 3 * short,
            ONE_COLOR: bool((pixels == pixels[0, 0]).all()),
        }
        content = path.read() if isinstance(path, StoredImage) else Path(path).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return tuple(kind for kind, applies in kinds.items() if applies), digest


def _examine(samples: _Samples, workers: int) -> List[Optional[Findings]]:
    """Return the findings about each sample, None if it killed a worker; SamplesLost if an idle worker is killed."""
    results: List[Optional[Findings]] = []
    order = range(len(samples))
    batches = (order[start : start + _BATCH] for start in order[::_BATCH])
    with tqdm(total=len(samples), desc="checking images", unit="image", disable=None, leave=False) as bar:
        for batch in samples.read(batches, min(workers, len(samples)), list):
            results += batch
            bar.update(len(batch))
    return results


class Report(NamedTuple):
    """What is found in a folder; names are relative to it."""

    form: str  # how images and captions are kept
    pairs: int  # usable ones
    faults: Dict[str, List[str]]  # kind -> names of what training would skip or refuse
    notes: Dict[str, List[str]]  # kind -> names of what is worth knowing
    counts: TokenCounts  # of the captions of usable pairs
    others: Sequence[str]  # files of other kinds


def check(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    text_seq_len: int,
    image_size: int,
    truncate_captions: bool = False,
    workers: int = 0,
) -> Report:
    """Examine all images and captions of a folder or file; raise the errors of open_source if it has none."""
    source = open_source(folder)
    faults = {
        reason: [printable(os.path.relpath(path, source.folder)) for path in paths]
        for reason, paths in source.skipped.items()
    }
    harmless = files.LABEL_FILE, files.NOT_LISTED, files.OTHER_SPLIT
    notes: Dict[str, List[str]] = {kind: faults.pop(kind, []) for kind in harmless}
    first: Dict[bytes, str] = {}  # digest of an image -> the first file that has it
    lengths: List[int] = []
    unknown = usable = 0
    all_findings = _examine(_Samples(source, tokenizer, image_size), workers)
    for (image, _, _), (text, _, _), found in zip(source.images, source.texts, all_findings):
        image_name, text_name = printable(image), printable(text)
        if found is None or found.digest is None:
            faults.setdefault(DEADLY if found is None else files.UNREADABLE, []).append(image_name)
            continue
        lengths += found.lengths
        unknown += found.unknown
        if found.unread:
            faults.setdefault(files.UNREAD, []).append(text_name)
        if found.unread == len(found.lengths):
            continue
        usable += 1
        for kind in found.traits:
            notes.setdefault(kind, []).append(image_name)
        if first.setdefault(found.digest, image_name) != image_name:
            notes.setdefault(SAME_IMAGE, []).append(f"{image_name} as {first[found.digest]}")
        if found.unknown:
            notes.setdefault(UNKNOWN, []).append(text_name)
        if max(found.lengths) > text_seq_len:
            too_long = notes if truncate_captions else faults
            too_long.setdefault(TOO_LONG.format(text_seq_len), []).append(text_name)
    counts = TokenCounts(np.array(lengths, dtype=np.int64), unknown)
    return Report(source.form, usable, faults, notes, counts, source.others)


def describe(folder: Path, report: Report, examples: Optional[int]) -> str:
    """Return a report as text, naming `examples` files of each kind (None: all)."""
    lines = [describe_set(folder, report.form, report.pairs, report.counts)]
    warning = describe_unknown(report.counts)
    lines += [f"warning: {warning}"] if warning else []
    for title, kinds in (("skipped or refused in training", report.faults), ("worth knowing", report.notes)):
        kinds = {kind: names for kind, names in sorted(kinds.items()) if names}
        lines += [f"{title}:"] if kinds else []
        for kind, names in kinds.items():
            rest = ", …" if examples is not None and len(names) > examples else ""
            lines.append(f"{len(names):9,} × {kind}: {', '.join(names[:examples])}{rest}")
    lines += [f"not used: {files.describe_others(report.others)}"] if report.others else []
    count = sum(map(len, report.faults.values()))
    lines.append(f"training would skip or refuse {count:,} of these files" if count else "nothing would be skipped")
    return "\n".join(lines)


def image_size_of(config: Dict[str, Any]) -> int:
    """Return the side of a configuration's images: its own, or that of its VQGAN's yaml, or the official VQGAN's."""
    for path in map(Path, filter(None, (config.get("vqgan_config_path"), config.get("vae_path")))):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            file = path / "vqgan.yaml" if path.is_dir() else path.with_suffix(".yaml")
            params = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["params"]
            return int(params["ddconfig"]["resolution"]) * int(params.get("patch_size", 1))
    return config.get("image_size", 256)


@exit_on_error()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; exit with 0: clean, 1: training would skip or refuse something, 2: bad arguments."""
    parser = Parser("Check images and captions before a long run.")
    parser.prog = "python -m data.check"
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", help="what train.py's --input-folder takes; none: that of --config")
    add("--config", help="entry of configs.yaml whose folder, vocabulary, VQGAN and caption length are used")
    add("--bpe-path", "--bpe_path", help="YouTokenToMe vocabulary; CLIP's if not given")
    add("--text-seq-len", "--text_seq_len", type=COUNT, help="most text tokens of a caption [80]")
    add("--truncate-captions", "--truncate_captions", action="store_true", help="cut longer captions in training")
    add("--image-size", "--image_size", type=COUNT, help="side of the VQGAN's images in pixels [256]")
    add("--workers", type=NATURAL, default=os.cpu_count() or 1, help="processes")
    add("--all", action="store_true", help="name every file, not three of each kind")
    settings = parser.parse_args(argv)
    config = parser.read_entry(settings.config) if settings.config else {}
    folder = Path(settings.folder or config.get("input_folder") or "")
    try:
        if not (settings.folder or config.get("input_folder")):
            raise ValueError("give a FOLDER, or a --config that has an input_folder")
        if not folder.exists():
            raise ValueError(f"{printable(folder)}: no such folder")
        tokenizer = load_tokenizer(settings.bpe_path or config.get("bpe_path"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        report = check(
            folder,
            tokenizer,
            text_seq_len=settings.text_seq_len or config.get("text_seq_len", 80),
            image_size=settings.image_size or image_size_of(config),
            truncate_captions=settings.truncate_captions or config.get("truncate_captions", False),
            workers=settings.workers,
        )
    except (ValueError, OSError, RuntimeError) as error:  # no pair, or workers that are killed
        print(f"{parser.prog}: error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        raise SystemExit(1) from None
    print(describe(folder, report, None if settings.all else 3))
    raise SystemExit(1 if any(report.faults.values()) else 0)


if __name__ == "__main__":
    main()
