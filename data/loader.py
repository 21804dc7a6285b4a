"""Captioned pictures as training samples: one picture to pixels, a folder to a dataset.

Everything random here is a function of numbers that name it: a caption draw of (seed, epoch, index), a generated sample
of (seed, index). So workers, processes and resumed runs need share no state, and keys carry the epoch: the batch order
(data/order.py) yields (epoch, index), and `dataset[(epoch, index)]` answers it.

Nothing here knows a model: codes come as an array (data/codes.py makes it), the tokenizer from the caller.
"""

import copy
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Container, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data.array_cache import pickled_by_name, unpickled
from data.captions import open_caption_cache, tokenized
from data.images import load_image
from data.order import Key, epoch_and_index, random_bits
from data.pairs import UNREADABLE, File, Skipped, find_pairs, printable, read_captions, report_skipped

logger = logging.getLogger("minidalle")

_SLOTS = 256  # workers of one DataLoader; more share slots, and the latest to begin is remembered
_NAMED_IN_LOG = 20  # unreadable pictures told one by one; a disk that goes away would fill the log
_NEVER_AGAIN = 2  # the flag of a picture over which a worker was killed; 1: could not be read, and is tried again
# What a random number is for, so that no two uses share one; 2 is the order's, in data/order.py.
_CAPTION, _DROPOUT, _GENERATED, _HELD_OUT = 0, 1, 3, 4


class WorkerTracker:
    """One place a worker in memory that outlives it. Make it before the workers are started."""

    def __init__(self) -> None:
        self._slots = torch.full((_SLOTS, 2), -1, dtype=torch.int64).share_memory_()  # process, index or -1

    def mark(self, index: int) -> None:
        """Note what this worker reads from now on; -1: nothing. Outside of workers nothing is noted."""
        worker = get_worker_info()
        if worker is not None:
            self._slots[worker.id % _SLOTS] = torch.tensor([os.getpid(), index])

    def of_dead(self, said: str) -> List[int]:
        """What the workers were reading that torch's error names: "DataLoader worker (pid 12) is killed by …"."""
        named = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", said)
        processes = {int(number) for number in named[1].split(",")} if named else set()
        return [index for process, index in self._slots.tolist() if process in processes and index >= 0]


class TextImageDataset(Dataset):
    """The pairs of a folder: `dataset[index]`, or `dataset[(epoch, index)]`, is (text, image).

    text   int64 (text_seq_len,): one caption of the picture, drawn anew each epoch, zero-padded. All zeros with
           probability `caption_dropout`.
    image  float32 (3, image_size, image_size) in [0, 1]; uint8 in [0, 255] with `byteio`; int64 (image_seq_len,) when
           codes are attached.

    tokenizer: as captions.py wants it; `tokenize(texts, length)` raises ValueError when a text is longer. Every caption
    is tokenized once, here, or taken from `cache_dir` where it is given and has it. Caption files that it has, and
    pictures that are among `encoded`, are known to be sound and not opened.

    A picture that turns out unreadable while training is replaced by the next one that can be read; it is told in the
    log once and counted in `skipped` and `lost`, also when a worker process found it.

    Raises what find_pairs raises, and ValueError naming the caption file that is too long.
    """

    def __init__(
        self,
        folder: Union[str, Path],
        tokenizer,
        *,
        text_seq_len: int = 80,
        image_size: int = 256,
        truncate_captions: bool = False,
        byteio: bool = False,
        caption_dropout: float = 0.0,
        seed: int = 42,
        cache_dir: Union[str, Path, None] = None,
        encoded: Container[File] = (),
    ):
        self.folder = Path(folder)
        self.text_seq_len = text_seq_len
        self.image_size = image_size
        self.byteio = byteio
        self.caption_dropout = caption_dropout
        self.seed = seed
        cache = None if cache_dir is None else open_caption_cache(folder, cache_dir, tokenizer)
        tokenized_before = () if cache is None else cache
        pairs, self._skipped = find_pairs(folder, lambda file: file in encoded or file in tokenized_before)
        report_skipped(self._skipped)
        self.images: List[File] = [picture for picture, _ in pairs]
        captions = [caption for _, caption in pairs]
        self._captions = tokenized(captions, self.folder, tokenizer, cache)
        if not truncate_captions:
            self._refuse_long_captions(captions, tokenizer)
        self._codes: Optional[np.ndarray] = None
        # One flag a picture, in memory that worker processes share with their parent.
        self._unreadable = torch.zeros(len(self.images), dtype=torch.uint8).share_memory_()
        self._tracker = WorkerTracker()

    def _refuse_long_captions(self, files: List[File], tokenizer) -> None:
        place = self._captions.first_longer_than(self.text_seq_len)
        if place is None:
            return
        path = self.folder / files[place][0]
        try:
            tokenizer.tokenize(read_captions(path), self.text_seq_len)
        except ValueError as error:
            raise ValueError(f"{printable(path)}: {error}") from None
        raise ValueError(f"{printable(path)}: changed while it was read")

    def attach_codes(self, codes: np.ndarray, bad: Optional[Mapping[int, str]] = None) -> None:
        """From now on give codes in place of pixels. Call it before workers are started.

        codes: integers (pictures, image_seq_len), in the order of `pictures` without those that are in bad. bad:
        index → reason for those that could not be encoded (`load_codes` returns both); they leave the dataset and are
        counted in `skipped`.
        """
        bad = bad or {}
        good = np.ones(len(self), dtype=bool)
        good[list(bad)] = False
        if codes.ndim != 2 or len(codes) != good.sum():
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, {good.sum()} pictures need ({good.sum()}, codes each)"
            )
        if not good.any():
            raise ValueError(f"{printable(self.folder)}: none of its {len(self)} pictures could be encoded")
        if not good.all():
            lost = {UNREADABLE: [self.folder / self.images[index][0] for index in sorted(bad)]}
            report_skipped(lost)
            self._skipped[UNREADABLE] = sorted(set(self._skipped.get(UNREADABLE, []) + lost[UNREADABLE]))
            self._keep(np.flatnonzero(good))
        self._codes = codes

    def _keep(self, rows: np.ndarray) -> None:
        self.images = [self.images[row] for row in rows]
        self._captions = self._captions.only(rows)
        self._unreadable = self._unreadable[torch.from_numpy(rows)].share_memory_()
        self._tracker = WorkerTracker()  # of its own, where a copy keeps other rows
        if self._codes is not None:
            self._codes = self._codes[rows]

    def split_off(self, share: float) -> "TextImageDataset":
        """Take this share of the pairs out, at least one, and return them as a dataset of their own, without caption
        dropout. A hash of a picture's name decides, so that the same pictures are held out whatever the seed, and
        nearly the same ones of a folder that has grown. ValueError where nothing would be left to train on.
        """
        names = [os.fsencode(name) for name, _, _ in self.images]
        order = sorted(range(len(names)), key=lambda row: hashlib.sha256(names[row]).digest())
        count = max(1, round(share * len(order)))
        if count >= len(order):
            raise ValueError(f"{printable(self.folder)}: {len(order)} pairs are too few to hold {share:g} of them out")
        held_out = copy.copy(self)
        held_out.caption_dropout, held_out._skipped = 0.0, {}
        held_out._keep(np.sort(order[:count]))
        self._keep(np.sort(order[count:]))
        return held_out

    def fingerprint(self) -> str:
        """Names what there is to learn: pictures by name, captions by their tokens."""
        digest = hashlib.sha256()
        captions = self._captions
        for (name, _, _), start, stop in zip(self.images, captions.starts, captions.stops):
            digest.update(os.fsencode(name) + b"\0" + captions.tokens[start:stop].tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {**vars(self), "_codes": pickled_by_name(self._codes)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _codes=unpickled(state["_codes"]))

    @property
    def skipped(self) -> Skipped:
        """Reason → files left out, those that went bad since the scan included."""
        found = [self.folder / self.images[i][0] for i in self._unreadable.nonzero().flatten().tolist()]
        if not found:
            return dict(self._skipped)
        return {**self._skipped, UNREADABLE: sorted(set(self._skipped.get(UNREADABLE, []) + found))}

    @property
    def lost(self) -> int:
        """How many pictures went bad since the scan."""
        return int((self._unreadable > 0).sum())

    def exclude_images_of(self, said: str) -> List[str]:
        """The pictures that the workers were reading whose end torch's error `said` tells; they are not read again."""
        places = self._tracker.of_dead(said)
        self._unreadable[places] = _NEVER_AGAIN
        return [printable(self.folder / self.images[place][0]) for place in places]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Tuple[torch.Tensor, torch.Tensor]:
        epoch, index = epoch_and_index(key, len(self))
        if self._codes is not None:
            return self._text(epoch, index), torch.from_numpy(self._codes[index].astype(np.int64))
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self._unreadable[place] == _NEVER_AGAIN:
                continue
            self._tracker.mark(place)
            try:
                pixels = load_image(self.folder / self.images[place][0], self.image_size)
            except (ValueError, OSError) as error:
                self._note_unreadable(place, error)
                continue
            finally:
                self._tracker.mark(-1)
            image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (size, size, 3) -> (3, size, size)
            return self._text(epoch, place), image if self.byteio else image.float().div_(255)
        raise ValueError(f"{printable(self.folder)}: none of its {len(self)} pictures can be read any more")

    def iter_captions(self, tokenizer, rows: Optional[Sequence[int]] = None) -> Iterator[str]:
        """Yield the text of every caption of all images, or the first caption of each image in `rows`."""
        for row in range(len(self)) if rows is None else rows:
            captions = self._captions[row]
            for tokens in captions if rows is None else captions[:1]:
                yield " ".join(tokenizer.decode(tokens).split())

    def first_caption(self, index: int) -> torch.Tensor:
        """int64 (text_seq_len,), zero-padded."""
        return self._padded(self._captions[index][0])

    def _text(self, epoch: int, index: int) -> torch.Tensor:
        if random_bits(self.seed, _DROPOUT, epoch, index) < self.caption_dropout * 2.0**64:
            return self._padded(())
        captions = self._captions[index]
        return self._padded(captions[random_bits(self.seed, _CAPTION, epoch, index) % len(captions)])

    def _padded(self, tokens: Sequence[int]) -> torch.Tensor:
        text = np.zeros(self.text_seq_len, dtype=np.int64)
        tokens = tokens[: self.text_seq_len]
        text[: len(tokens)] = tokens
        return torch.from_numpy(text)

    def _note_unreadable(self, index: int, error: Exception) -> None:
        if self._unreadable[index]:
            return
        self._unreadable[index] = 1
        told = self.lost
        if told <= _NAMED_IN_LOG:
            more = "; more will only be counted" if told == _NAMED_IN_LOG else ""
            logger.warning("%s; another picture takes its place%s", error, more)


class GeneratedDataset(Dataset):
    """Random samples for measuring speed without data: each depends on `seed` and its index alone.

    text   int64 (text_seq_len,), tokens from 1 to num_text_tokens - 1 (num_text_tokens: the tokenizer's vocabulary
    size).
    image  as in TextImageDataset: float32 or, with `byteio`, uint8 (3, image_size, image_size); with `num_image_codes`
           and `image_seq_len`, int64 (image_seq_len,) codes below num_image_codes.
    """

    def __init__(
        self,
        length: int,
        *,
        text_seq_len: int,
        num_text_tokens: int,
        image_size: int = 256,
        byteio: bool = False,
        seed: int = 42,
        num_image_codes: Optional[int] = None,
        image_seq_len: Optional[int] = None,
    ):
        if (num_image_codes is None) != (image_seq_len is None):
            raise ValueError("generated codes need both num_image_codes and image_seq_len")
        self.length = length
        self.lost = 0  # pictures that went bad, as TextImageDataset has it
        self.text_seq_len = text_seq_len
        self.num_text_tokens = num_text_tokens
        self.image_size = image_size
        self.byteio = byteio
        self.seed = seed
        self.num_image_codes = num_image_codes
        self.image_seq_len = image_seq_len

    def __len__(self) -> int:
        return self.length

    def split_off(self, share: float) -> "GeneratedDataset":
        """A further dataset of this share of the length, at least one sample, of another seed."""
        held_out = copy.copy(self)
        held_out.length, held_out.seed = max(1, round(share * self.length)), random_bits(self.seed, _HELD_OUT)
        return held_out

    def exclude_images_of(self, said: str) -> List[str]:
        """As TextImageDataset has it: no picture was read."""
        return []

    def fingerprint(self) -> str:
        return f"{self.length} generated samples of seed {self.seed}"

    def iter_captions(self, tokenizer, rows: Optional[Sequence[int]] = None) -> Iterator[str]:
        """Yield nothing: random tokens are no captions."""
        return iter(())

    def __getitem__(self, key: Key) -> Tuple[torch.Tensor, torch.Tensor]:
        _, index = epoch_and_index(key, self.length)
        random = np.random.Generator(np.random.Philox(key=random_bits(self.seed, _GENERATED, index)))
        text = torch.from_numpy(random.integers(1, self.num_text_tokens, self.text_seq_len, dtype=np.int64))
        if self.num_image_codes is not None:
            return text, torch.from_numpy(random.integers(0, self.num_image_codes, self.image_seq_len, dtype=np.int64))
        shape = (3, self.image_size, self.image_size)
        if self.byteio:
            return text, torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))
        return text, torch.from_numpy(random.random(shape, dtype=np.float32))
