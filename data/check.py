"""A folder looked through before a long run: what training would skip or refuse, and what is worth knowing.

    python -m data.check FOLDER

Every picture is decoded as training decodes it, every caption tokenized, in several processes. Nothing is changed.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.images import load_image
from data.loader import WorkerTracker
from data.pairs import LABEL_FILE, UNREADABLE, find_pairs, open_image, printable, read_captions
from data.tokenizer import load_tokenizer
from utils.interrupts import ignore_interrupts_in_worker

ENDS_A_PROCESS = "picture over which the process that reads it is killed"
TOO_LONG = "caption file with more than {} tokens a caption"
SMALL = "picture of fewer than {} pixels a side, which is enlarged"
LONG = "picture more than three times as long as wide, of which the middle square is used"
CMYK = "picture in CMYK"
DEEP = "picture of 16 bits a channel"
TRANSPARENT = "picture with transparent parts, which become white"
ANIMATED = "animated picture, of which the first is used"
ONE_COLOUR = "picture of one colour"
SAME_PICTURE = "picture of the same bytes as another"
SAME_CAPTION = "caption that another picture has as well"
SAME_STEM = "picture with its captions in another folder, where several have its stem"
UNKNOWN = "caption file with characters that the vocabulary lacks"
NO_TOKENS = "caption file with a caption of no tokens"

_AT_ONCE = 16  # pairs that a worker hands over together
_NAMELESS = 3  # workers killed over nothing that can be named, after which there is no point in going on


class Found(NamedTuple):
    """What there is to say of one pair."""

    fault: Optional[str]  # why the picture cannot be read
    traits: Tuple[str, ...]  # kinds of the list above
    digest: bytes  # of the picture's bytes; b"" where no other has as many
    tokens: Tuple[int, ...]  # of each caption
    unknown: int  # tokens, of all captions
    captions: Tuple[bytes, ...]  # a digest of each


class Pairs(Dataset):
    """Pair i as (i, Found)."""

    def __init__(self, pairs: Sequence[Tuple[Path, Path]], tokenizer, image_size: int):
        self.pairs, self.tokenizer, self.image_size = pairs, tokenizer, image_size
        self.bytes = [picture.stat().st_size if picture.exists() else -1 for picture, _ in pairs]
        self.shared = {size for size, count in Counter(self.bytes).items() if count > 1}
        self.tracker = WorkerTracker()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tuple[int, Found]:
        picture, caption_file = self.pairs[index]
        self.tracker.mark(index)
        fault, traits, digest = None, (), b""
        try:
            traits = picture_traits(picture, self.image_size)
            if self.bytes[index] in self.shared:
                digest = hashlib.blake2b(picture.read_bytes(), digest_size=16).digest()
        except (ValueError, OSError) as error:
            fault = str(error)
        self.tracker.mark(-1)
        captions = read_captions(caption_file)
        ids = [self.tokenizer.encode(caption) for caption in captions]
        unknown = sum(token == self.tokenizer.unknown for tokens in ids for token in tokens)
        digests = tuple(hashlib.blake2b(caption.encode("utf-8"), digest_size=8).digest() for caption in captions)
        return index, Found(fault, traits, digest, tuple(map(len, ids)), unknown, digests)


def picture_traits(path: Path, image_size: int) -> Tuple[str, ...]:
    """The kinds that a picture is of; raises what load_image raises."""
    pixels = load_image(path, image_size)
    with open_image(path) as image:
        width, height = image.size
        kinds = {
            SMALL: min(width, height) < image_size,
            LONG: max(width, height) > 3 * min(width, height),
            CMYK: image.mode == "CMYK",
            DEEP: image.mode.startswith("I"),
            TRANSPARENT: image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info,
            ANIMATED: getattr(image, "is_animated", False),
            ONE_COLOUR: bool((pixels == pixels[0, 0]).all()),
        }
    return tuple(kind for kind, holds in kinds.items() if holds)


def look_at_all(pairs: Pairs, workers: int) -> List[Optional[Found]]:
    """Found of every pair; None where the process that read it was killed. RuntimeError where they go on being killed
    over nothing in particular.
    """
    results: List[Optional[Found]] = [None] * len(pairs)
    killers, nameless = set(), 0
    with tqdm(total=len(pairs), desc="looking at pictures", unit="picture", disable=None, leave=False) as bar:
        while True:
            left = [index for index, found in enumerate(results) if found is None and index not in killers]
            loader = DataLoader(
                pairs,
                _AT_ONCE,
                sampler=left,
                num_workers=min(workers, len(left)),
                collate_fn=list,
                worker_init_fn=ignore_interrupts_in_worker,
            )
            try:
                for part in loader:
                    for index, found in part:
                        results[index] = found
                    bar.update(len(part))
                return results
            except RuntimeError as error:  # which may come at any place above: what is noted is noted
                if not str(error).startswith("DataLoader worker"):
                    raise
                named = pairs.tracker.of_dead(str(error))
            killers.update(named)
            nameless += not named
            if nameless > _NAMELESS:
                raise RuntimeError("processes that read pictures are killed; if memory ran out, use fewer --workers")


class Report(NamedTuple):
    """faults, notes: kind → names relative to the folder, of what training skips or refuses and of what is worth
    knowing. tokens: int (captions,), of the pairs that can be used. unknown: how many of them all are unknown.
    """

    pairs: int  # usable
    faults: Dict[str, List[str]]
    notes: Dict[str, List[str]]
    tokens: np.ndarray
    unknown: int


def check(
    folder: Path, tokenizer, *, text_seq_len: int, image_size: int, truncate_captions: bool = False, workers: int = 0
) -> Report:
    """Raises what find_pairs raises where there is no pair at all."""
    found_pairs, skipped = find_pairs(folder)
    pairs = [(folder / picture[0], folder / captions[0]) for picture, captions in found_pairs]

    def name(path: Path) -> str:
        return printable(os.path.relpath(path, folder))

    faults = {reason: [name(path) for path in paths] for reason, paths in skipped.items()}
    notes: Dict[str, List[str]] = {LABEL_FILE: faults.pop(LABEL_FILE, [])}
    results = look_at_all(Pairs(pairs, tokenizer, image_size), workers)
    first: Dict[bytes, str] = {}  # digest of a picture or caption → where it was met
    tokens: List[int] = []
    unknown = 0
    stems = Counter(picture.stem for picture, _ in pairs)
    usable = 0
    for (picture, captions), found in zip(pairs, results):
        if found is None or found.fault is not None:
            faults.setdefault(ENDS_A_PROCESS if found is None else UNREADABLE, []).append(name(picture))
            continue
        usable += 1
        kinds = [(kind.format(image_size), name(picture)) for kind in found.traits]
        if found.digest:
            kinds += same(SAME_PICTURE, name(picture), first, found.digest)
        for digest in set(found.captions):
            kinds += same(SAME_CAPTION, name(captions), first, digest)
        if stems[picture.stem] > 1 and picture.parent != captions.parent:
            kinds.append((SAME_STEM, f"{name(picture)} with {name(captions)}"))
        if found.unknown:
            kinds.append((UNKNOWN, name(captions)))
        if min(found.tokens) == 0:
            kinds.append((NO_TOKENS, name(captions)))
        for kind, words in kinds:
            notes.setdefault(kind, []).append(words)
        if max(found.tokens) > text_seq_len:
            refused = notes if truncate_captions else faults
            refused.setdefault(TOO_LONG.format(text_seq_len), []).append(name(captions))
        tokens += found.tokens
        unknown += found.unknown
    return Report(usable, faults, notes, np.array(tokens, dtype=np.int64), unknown)


def same(kind: str, name: str, first: Dict[bytes, str], digest: bytes) -> List[Tuple[str, str]]:
    earlier = first.setdefault(digest, name)
    return [] if earlier == name else [(kind, f"{name} as {earlier}")]


def lines(folder: Path, report: Report, examples: Optional[int]) -> List[str]:
    """A report as text; of each kind `examples` are named, None: all."""
    said = [f"{printable(folder)}: {report.pairs:,} pairs can be used, with {len(report.tokens):,} captions"]
    if len(report.tokens):
        low, middle, high, top = np.percentile(report.tokens, [0, 50, 95, 100], method="lower").tolist()
        share = report.unknown / max(int(report.tokens.sum()), 1)
        said.append(
            f"tokens of a caption: {low} at least, median {middle}, 95 % have at most {high}, the longest {top}; "
            f"{share:.3%} are unknown"
        )
    for title, kinds in (("skipped or refused in training", report.faults), ("worth knowing", report.notes)):
        kinds = {kind: names for kind, names in sorted(kinds.items()) if names}
        said += [f"{title}:"] if kinds else []
        for kind, names in kinds.items():
            rest = ", …" if examples is not None and len(names) > examples else ""
            said.append(f"{len(names):9,} × {kind}: {', '.join(names[:examples])}{rest}")
    count = sum(map(len, report.faults.values()))
    said.append(f"training would skip or refuse {count:,} of these files" if count else "nothing would be skipped")
    return said


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, where argparse would print the usage too
        self.exit(2, f"{self.prog}: error: {message}\n")


def _count(low: int):
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {low}")
        return int(text)

    return parse


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Exit status 0: clean; 1: training would skip or refuse something; 2: bad arguments."""
    parser = _Parser(
        prog="python -m data.check",
        description="Looks through a folder before a long run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="pictures and .txt captions, as train.py's --input-folder")
    add("--bpe-path", "--bpe_path", help="YouTokenToMe vocabulary; none: CLIP's")
    add("--text-seq-len", "--text_seq_len", type=_count(1), default=80, help="text tokens a caption may have")
    add("--truncate-captions", "--truncate_captions", action="store_true", help="longer ones are cut, and no fault")
    add("--image-size", "--image_size", type=_count(1), default=256, help="side of the VQGAN's pictures in pixels")
    add("--workers", type=_count(0), default=os.cpu_count() or 1, help="processes")
    add("--all", action="store_true", help="name every file, not three of each kind")
    settings = parser.parse_args(argv)
    folder = Path(settings.folder)
    try:
        if not folder.is_dir():
            raise ValueError(f"{printable(folder)}: no such folder")
        tokenizer = load_tokenizer(settings.bpe_path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        report = check(
            folder,
            tokenizer,
            text_seq_len=settings.text_seq_len,
            image_size=settings.image_size,
            truncate_captions=settings.truncate_captions,
            workers=settings.workers,
        )
    except (ValueError, OSError, RuntimeError) as error:  # not one pair, or no process that lives
        print(f"{parser.prog}: error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    print("\n".join(lines(folder, report, None if settings.all else 3)))
    raise SystemExit(1 if any(report.faults.values()) else 0)


if __name__ == "__main__":
    main()
