"""The captions of a folder's pictures as token ids, each tokenized once: kept on disk where a place is given.

The ids are those of whole captions; what does not fit into a sample is cut, or refused, when they are read, so one
cache serves every length. How they lie on disk, and how processes share the work, is arrays.py's.
"""

import logging
import os
import re
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Union

import numpy as np

from data.array_cache import ArrayCache, Made, pickled_by_name, unpickled
from data.pairs import File, printable, read_captions

logger = logging.getLogger("minidalle")

_FILES_AT_ONCE = 512  # claimed together, so that several processes share the work


class Captions:
    """captions[i]: the token ids of each caption of file i, as arrays; len(captions) files.

    tokens holds them all end to end, and after each caption, to tell where it ends, the largest number of its dtype.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray):
        """File i has tokens[starts[i] : stops[i]]."""
        self.tokens, self.starts, self.stops = tokens, starts, stops

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> List[np.ndarray]:
        own = self.tokens[self.starts[index] : self.stops[index]]
        ends = np.flatnonzero(own == _end(own.dtype)).tolist()
        return [own[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends)]

    def __getstate__(self) -> dict:
        return {**vars(self), "tokens": pickled_by_name(self.tokens)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, tokens=unpickled(state["tokens"]))

    def only(self, kept: np.ndarray) -> "Captions":
        """Those of the files that a mask or an array of indices names."""
        return Captions(self.tokens, self.starts[kept], self.stops[kept])

    def first_longer_than(self, length: int) -> Optional[int]:
        """The first file with a caption of more than `length` tokens."""
        ends = np.flatnonzero(self.tokens == _end(self.tokens.dtype))
        too_long = ends[np.diff(ends, prepend=-1) - 1 > length]
        # The tokens may hold those of other files as well, so it is not enough that there are any.
        found = np.searchsorted(too_long, self.starts) != np.searchsorted(too_long, self.stops)
        return int(np.argmax(found)) if found.any() else None


def open_caption_cache(folder: Union[str, Path], cache_dir: Union[str, Path], tokenizer) -> ArrayCache:
    """The cache of tokens of `folder`'s caption files in `cache_dir`; it may be empty.

    Raises OSError when there is a `cache_dir` that cannot be read.
    """
    key = {"version": 1, "tokenizer": tokenizer.fingerprint, "captions": "lines that are not blank, stripped"}
    name = re.sub("[^A-Za-z0-9]", "", tokenizer.fingerprint)[:12]
    return ArrayCache(cache_dir, f"captions-{name}", folder, _dtype(tokenizer), key)


def tokenized(
    files: Sequence[File], folder: Union[str, Path], tokenizer, cache: Optional[ArrayCache] = None
) -> Captions:
    """The captions of these files of `folder`, whole. What the cache has is taken from it, the rest is added to it.

    tokenizer: `encode(text)` gives a list of ids below `vocab_size`, `fingerprint` names its vocabulary.

    A file whose size in bytes or modification time changed is read again. Several processes that call this share the
    files. A cache that cannot be written is told in the log, and done without.

    Raises ValueError and OSError when a file cannot be read, or its captions cannot be tokenized.
    """

    def make(batches: Iterator[Sequence[int]]) -> Iterator[Made]:
        return _tokenize(files, batches, str(folder), tokenizer)

    if cache is not None:
        try:
            cache.fill(files, make, batch_size=_FILES_AT_ONCE, doing="tokenizing captions", unit="file")
            return Captions(*cache.load(files))
        except OSError as error:
            logger.warning("captions are tokenized anew in every run: %s", error)
    batches = (range(len(files))[start : start + _FILES_AT_ONCE] for start in range(0, len(files), _FILES_AT_ONCE))
    _, tokens, lengths = zip(*make(batches))
    lengths = np.concatenate(lengths)
    stops = np.cumsum(lengths)
    return Captions(np.concatenate(tokens), stops - lengths, stops)


def _tokenize(files: Sequence[File], batches: Iterator[Sequence[int]], folder: str, tokenizer) -> Iterator[Made]:
    dtype = _dtype(tokenizer)
    end = _end(dtype)
    for batch in batches:
        tokens: List[int] = []
        lengths = []
        for index in batch:
            before = len(tokens)
            path = os.path.join(folder, files[index][0])
            try:
                for text in read_captions(path):
                    tokens += tokenizer.encode(text)
                    tokens.append(end)
            except ValueError as error:
                raise ValueError(f"{printable(path)}: {error}") from None
            lengths.append(len(tokens) - before)
        yield batch, np.array(tokens, dtype), lengths


def _dtype(tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65535 else np.uint32)  # the largest number is no id


def _end(dtype: np.dtype) -> int:
    return int(np.iinfo(dtype).max)
