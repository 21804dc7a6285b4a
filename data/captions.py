"""Tokenize the captions of a folder once, and keep the ids on disk if a place for them is given.

The ids are those of whole captions: a sample cuts or refuses what is too long, so one cache serves every length. A
caption that the vocabulary cannot read is kept as its unknown id alone.
"""

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

import numpy as np
from tqdm import tqdm

from data.codes import cache_path
from data.files import File, printable
from data.sources import folder_of
from data.tokenizer import Tokenizer, encode_text
from utils.files import atomic_write, hold_lock

logger = logging.getLogger("minidalle")

MOST_UNKNOWN = 0.01  # share of unknown tokens above which a warning is logged
MOST_UNREAD = 0.5  # share of a caption's characters that the vocabulary may lack
_PROGRESS_FROM = 2000  # files
OTHER_VOCABULARY = "use a --bpe-path for their language, or none: CLIP's reads every character"

ReadCaptions = Callable[[str], List[str]]  # from the name of a file to its captions


class TokenCounts(NamedTuple):
    """What is known about the captions of a set."""

    lengths: np.ndarray  # int64 (captions,), tokens of each
    unknown: int  # unknown tokens in all of them

    def describe(self) -> str:
        """Return number and lengths of the captions, and the share of unknown tokens, in one line."""
        if not len(self.lengths):
            return "no captions"
        low, middle, high, top = np.percentile(self.lengths, [0, 50, 95, 100], method="lower").tolist()
        share = self.unknown / max(int(self.lengths.sum()), 1)
        return (
            f"{len(self.lengths):,} captions; tokens per caption: minimum {low}, median {middle}, 95th percentile "
            f"{high}, maximum {top}; {share:.3%} are unknown"
        )


def describe_set(path: Union[str, Path], form: str, images: int, counts: TokenCounts) -> str:
    return f"{printable(path)}: {form}, {images:,} usable images with {counts.describe()}"


def describe_unknown(counts: TokenCounts) -> Optional[str]:
    """Return a warning if a vocabulary lacks more than MOST_UNKNOWN of a set's tokens."""
    total = int(counts.lengths.sum())
    if counts.unknown <= MOST_UNKNOWN * total:
        return None
    return f"the vocabulary lacks {counts.unknown:,} of {total:,} caption tokens; {OTHER_VOCABULARY}"


class Captions:
    """captions[i]: the token ids of each caption of file i, a list of arrays.

    File i has tokens[starts[i] : stops[i]]. Each caption ends with the largest number of the dtype, which is no id.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray):
        self.tokens, self.starts, self.stops = tokens, starts, stops

    @classmethod
    def join(cls, parts: Sequence[np.ndarray], dtype: np.dtype) -> "Captions":
        """Return the captions of several files, given the tokens of each."""
        stops = np.cumsum([len(part) for part in parts], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, dtype), *parts])
        return cls(tokens, np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(parts)], stops)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> List[np.ndarray]:
        tokens = self.file_tokens(index)
        ends = np.flatnonzero(tokens == _end(tokens.dtype)).tolist()
        return [tokens[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends)]

    def file_tokens(self, index: int) -> np.ndarray:
        """Return the tokens of all captions of a file, with their ends."""
        return self.tokens[self.starts[index] : self.stops[index]]

    def select(self, rows: np.ndarray) -> "Captions":
        """Return the captions of the files that a mask or an array of indices selects."""
        return Captions(self.tokens, self.starts[rows], self.stops[rows])

    def counts(self, unknown: Optional[int]) -> TokenCounts:
        """Count the tokens of all captions; `unknown` is the vocabulary's id for characters that it lacks."""
        parts = [self.file_tokens(index) for index in range(len(self))]
        tokens = np.concatenate([np.zeros(0, self.tokens.dtype), *parts])
        ends = np.flatnonzero(tokens == _end(tokens.dtype))
        return TokenCounts(np.diff(ends, prepend=-1) - 1, 0 if unknown is None else int((tokens == unknown).sum()))

    def without_unread(self, unknown: Optional[int]) -> "Captions":
        """Return the captions without those that the vocabulary cannot read; a file may have none then."""
        ends = np.concatenate([[True], self.tokens == _end(self.tokens.dtype), [False]])  # also before the first token
        alone = (self.tokens == (-1 if unknown is None else unknown)) & ends[:-2] & ends[2:]
        if not alone.any():
            return self
        dropped = alone | np.concatenate([[False], alone[:-1]])  # with their ends
        kept_before = np.concatenate([[0], np.cumsum(~dropped)])
        return Captions(self.tokens[~dropped], kept_before[self.starts], kept_before[self.stops])

    def first_longer_than(self, length: int) -> Optional[int]:
        """Return the index of the first file that has a caption of more than `length` tokens."""
        ends = np.flatnonzero(self.tokens == _end(self.tokens.dtype))
        too_long = ends[np.diff(ends, prepend=-1) - 1 > length]
        # `tokens` may hold those of other files too, so a file counts only if a long caption ends within it.
        found = np.searchsorted(too_long, self.starts) != np.searchsorted(too_long, self.stops)
        return int(np.argmax(found)) if found.any() else None


class CaptionCache:
    """The tokens of the captions of a folder or file, kept in one .npz, or in memory alone.

    `file in cache` tells whether a file, in its present state, is there.
    """

    def __init__(self, path: Union[str, Path], cache_dir: Union[None, str, Path], tokenizer: Tokenizer):
        """Open the cache in `cache_dir`, which may not exist yet; OSError if that cannot be read. None: no file.

        Args:
            path: what --input-folder names; two tables that list the same images have a cache each.
        """
        self.folder, self.tokenizer = folder_of(path), tokenizer
        self.path: Optional[Path] = None
        if cache_dir is not None:
            name = "captions-" + re.sub("[^A-Za-z0-9]", "", tokenizer.fingerprint)[:12]
            self.path = cache_path(cache_dir, name, path, {"version": 3, "tokenizer": tokenizer.fingerprint}, ".npz")
        self.refresh()

    def __contains__(self, file: Any) -> bool:
        return file in self._rows

    def refresh(self) -> None:
        self._rows: Dict[File, int] = {}
        self._captions = Captions.join([], _dtype(self.tokenizer))
        if self.path is None:
            return
        try:
            with np.load(self.path, allow_pickle=False) as content:
                index = json.loads(content["index"].tobytes())
                files = list(zip(index["names"], index["sizes"], index["mtimes"]))
                captions = Captions(content["tokens"], content["starts"], content["stops"])
        except FileNotFoundError:
            return
        except Exception as error:  # damage makes zipfile, numpy and json raise many types of errors
            logger.warning("%s: damaged, tokenizing again (%s)", printable(self.path), error)
            return
        self._rows, self._captions = {file: row for row, file in enumerate(files)}, captions

    def load(self, files: Sequence[File], read: ReadCaptions) -> Captions:
        """Return the captions of these files, after reading and tokenizing those that the cache lacks.

        If several processes call this at once, one tokenizes and the others wait. A cache that cannot be written is
        reported in the log. ValueError or OSError if a file cannot be read or tokenized.
        """
        if not all(file in self for file in files):
            with contextlib.ExitStack() as stack:
                if self.path is not None:
                    stack.enter_context(hold_lock(self.path.with_suffix(".lock")))
                self.refresh()
                missing = [file for file in files if file not in self]
                new: Dict[File, np.ndarray] = {}
                try:
                    for file, tokens in zip(missing, self._tokenize(missing, read)):
                        new[file] = tokens
                finally:  # what was read before an interruption is not read again
                    if new:
                        self._save(files, new)
        return self._captions.select(np.array([self._rows[file] for file in files]))

    def _tokenize(self, files: Sequence[File], read: ReadCaptions) -> Iterator[np.ndarray]:
        """Yield the tokens of each file, with an end after each caption."""
        dtype = _dtype(self.tokenizer)
        hidden = None if logger.isEnabledFor(logging.INFO) and len(files) > _PROGRESS_FROM else True
        for name, _, _ in tqdm(files, desc="tokenizing captions", unit="file", disable=hidden):
            tokens: List[int] = []
            try:
                for text in read(name):
                    tokens += [*encode_caption(self.tokenizer, text), _end(dtype)]
            except ValueError as error:
                raise ValueError(f"{printable(self.folder / name)}: {error}") from None
            yield np.array(tokens, dtype)

    def _save(self, files: Sequence[File], new: Dict[File, np.ndarray]) -> None:
        """Write the cache again with `new`: first `files`, in their order, then what is known of others."""
        names = {name for name, _, _ in files}
        kept = [file for file in files if file in new or file in self]
        kept += [file for file in self._rows if file[0] not in names]
        parts = [new[file] if file in new else self._captions.file_tokens(self._rows[file]) for file in kept]
        self._captions = captions = Captions.join(parts, _dtype(self.tokenizer))
        self._rows = {file: row for row, file in enumerate(kept)}
        if self.path is None:
            return
        index = json.dumps(dict(zip(("names", "sizes", "mtimes"), zip(*kept)))).encode("ascii")
        try:
            with atomic_write(self.path, sync=True) as content:
                arrays = {"tokens": captions.tokens, "starts": captions.starts, "stops": captions.stops}
                np.savez(content, index=np.frombuffer(index, np.uint8), **arrays)  # type: ignore[arg-type]
        except OSError as error:
            logger.warning("captions are tokenized again in every run: %s", error)


def encode_caption(tokenizer: Tokenizer, text: str) -> List[int]:
    """Return what encode_text does, or the unknown id alone if the vocabulary lacks most of the text's characters."""
    tokens = encode_text(tokenizer, text)
    if tokenizer.unknown in tokens:
        known = tokenizer.decode([token for token in tokens if token != tokenizer.unknown])
        if len("".join(known.split())) < (1 - MOST_UNREAD) * len("".join(text.split())):
            return [tokenizer.unknown]
    return tokens


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65535 else np.uint32)  # the largest number is no id


def _end(dtype: np.dtype) -> int:
    return int(np.iinfo(dtype).max)
