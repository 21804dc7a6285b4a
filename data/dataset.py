"""Captioned images as training samples: those of a source (data/sources), as pixels or as codes of the VQGAN."""

import copy
import hashlib
import logging
import os
from pathlib import Path
from typing import Container, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from data.captions import OTHER_VOCABULARY, CaptionCache, describe_set, describe_unknown
from data.codes import MappedRows
from data.files import UNREAD, UNREADABLE, File, describe_others, printable, report_skipped
from data.images import WorkerTracker, load_image
from data.loader import CAPTION, DROPOUT, Key, count_validation, random_bits
from data.sources import ImagePath, folder_of, open_source
from data.tokenizer import Tokenizer, encode_text

logger = logging.getLogger("minidalle")

_LOGGED_UNREADABLE = 20  # images reported one by one; a disk that goes away would fill the log
# Flags of images: an unreadable one is tried again; one whose reading killed a worker is not.
_READABLE, _UNREADABLE, _DEADLY = 0, 1, 2


class TextImageDataset(Dataset):
    """The pairs of a folder or file: `dataset[index]` or `dataset[(epoch, index)]` is (text, image).

    text   int64 (text_seq_len,): the zero-padded tokens of one of the image's captions, another one in each epoch; all
           zeros with probability `caption_dropout`
    image  float32 (3, image_size, image_size) in [0, 1]; uint8 in [0, 255] if `byteio`; int64 (image_seq_len,) if codes
           are attached

    An image that cannot be read during training is replaced by the next one that can. It is logged once, and counted in
    `lost`, in whichever process it was found.
    """

    to_encode = 0  # images without codes, if a dry run attached zeros in their place

    def __init__(
        self,
        folder: Union[str, Path],
        tokenizer: Tokenizer,
        *,
        text_seq_len: int = 80,
        image_size: int = 256,
        truncate_captions: bool = False,
        byteio: bool = False,
        caption_dropout: float = 0.0,
        seed: int = 42,
        cache_dir: Union[str, Path, None] = None,
        encoded: Container[File] = (),
        validation: bool = False,
    ):
        """Find the pairs and tokenize all captions.

        Args:
            folder: what --input-folder names; data/sources lists the forms.
            cache_dir: where tokens are cached. Caption files in the cache are known to be good and not opened.
            encoded: images that are known to be good and not opened.
            validation: of a form with splits, read those to validate on.

        Raises:
            FileNotFoundError, PermissionError, ValueError: the folder has no pair, a caption is too long, or the
                vocabulary cannot read most of the captions.
        """
        self.path, self.folder = Path(folder), folder_of(folder)
        self.text_seq_len = text_seq_len
        self.image_size = image_size
        self.byteio = byteio
        self.caption_dropout = caption_dropout
        self.seed = seed
        cache = CaptionCache(self.path, cache_dir, tokenizer)
        self.source = open_source(
            folder,
            lambda file: file in encoded or file in cache,
            None if cache_dir is None else Path(cache_dir),
            validation,
        )
        captions = cache.load(self.source.texts, self.source.captions)
        self.counts = captions.counts(tokenizer.unknown)
        self._captions = captions.without_unread(tokenizer.unknown)
        good = self._captions.stops > self._captions.starts
        unread = len(self.counts.lengths) - len(self._captions.counts(tokenizer.unknown).lengths)
        texts = [text for text, keep in zip(self.source.texts, good) if keep]
        no_captions = [self.folder / file[0] for file, keep in zip(self.source.images, good) if not keep]
        self.images: List[File] = [file for file, keep in zip(self.source.images, good) if keep]
        self._captions = self._captions.select(good)
        self._report(unread, no_captions)
        if not truncate_captions:
            self._refuse_long_captions(texts, tokenizer)
        self._codes: Union[np.ndarray, MappedRows, None] = None
        self._code_rows = np.zeros(0, dtype=np.int64)  # of each image
        # One flag per image, in memory that worker processes share with their parent.
        self._flags = torch.zeros(len(self.images), dtype=torch.uint8).share_memory_()
        self._tracker = WorkerTracker()

    def _report(self, unread: int, no_captions: List[Path]) -> None:
        """Log what the set holds and what is skipped; ValueError if the vocabulary cannot read most captions."""
        number, path = len(self.counts.lengths), printable(self.path)
        if 2 * unread > number:
            share = f"{number - unread:,} of {number:,}"
            raise ValueError(f"{path}: the vocabulary reads only {share} captions; {OTHER_VOCABULARY}")
        logger.info("%s", describe_set(self.path, self.source.form, len(self), self.counts))
        if unread:
            logger.warning("skipped %s captions (%s)", f"{unread:,}", UNREAD)
        warning = describe_unknown(self.counts)
        if warning:
            logger.warning("%s", warning)
        report_skipped({**self.source.skipped, UNREAD: no_captions})
        if self.source.others:
            logger.info("not used: %s", describe_others(self.source.others))

    def _refuse_long_captions(self, texts: List[File], tokenizer: Tokenizer) -> None:
        index = self._captions.first_longer_than(self.text_seq_len)
        if index is None:
            return
        name = texts[index][0]
        for text in self.source.captions(name):
            count = len(encode_text(tokenizer, text))
            if count > self.text_seq_len:
                raise ValueError(
                    f'{printable(self.folder / name)}: "{text[:60]}" is {count} tokens long, and the limit is '
                    f"{self.text_seq_len}: shorten it, or cut such texts with --truncate-captions"
                )

    def attach_codes(self, codes: Union[np.ndarray, MappedRows], rows: Optional[np.ndarray] = None) -> None:
        """Return codes instead of pixels from now on; call this before workers start.

        Args:
            codes: integers (N, image_seq_len).
            rows: the row of each image in `codes` (default: in order). Images with row -1 leave the dataset.
        """
        rows = np.arange(len(self)) if rows is None else rows
        good = rows >= 0
        report_skipped({UNREADABLE: [self.folder / self.images[index][0] for index in np.flatnonzero(~good)]})
        self._codes, self._code_rows = codes, rows
        self._keep(np.flatnonzero(good))

    def _keep(self, indices: np.ndarray) -> None:
        self.images = [self.images[index] for index in indices]
        self._captions = self._captions.select(indices)
        self._flags = self._flags[torch.from_numpy(indices)].share_memory_()
        self._tracker = WorkerTracker()  # a new one, because a copy of this dataset keeps other images
        if self._codes is not None:
            self._code_rows = self._code_rows[indices]

    def split_off(self, share: float) -> "TextImageDataset":
        """Remove a share of the pairs, at least one, and return them as a dataset without caption dropout.

        A hash of the image's name selects them: the same images with every seed, and mostly the same after the folder
        has grown. ValueError if nothing would be left.
        """
        names = [os.fsencode(name) for name, _, _ in self.images]
        order = sorted(range(len(names)), key=lambda index: hashlib.sha256(names[index]).digest())
        count = count_validation(len(order), share)
        if count >= len(order):
            raise ValueError(f"{printable(self.folder)}: {len(order)} pairs are too few to split off {share:g} of them")
        validation_set = copy.copy(self)
        validation_set.caption_dropout = 0.0
        validation_set._keep(np.sort(order[:count]))
        self._keep(np.sort(order[count:]))
        return validation_set

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, (name, _, _) in enumerate(self.images):
            digest.update(os.fsencode(name) + b"\0" + self._captions.file_tokens(index).tobytes())
        return digest.hexdigest()

    @property
    def lost(self) -> int:
        """Number of images that became unreadable after the scan."""
        return int((self._flags != _READABLE).sum())

    def exclude_images_of(self, message: str) -> List[str]:
        """Never read again what the dead workers of torch's error message were reading; return the names."""
        indices = self._tracker.of_dead(message)
        self._flags[indices] = _DEADLY
        return [printable(self.folder / self.images[index][0]) for index in indices]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> ImagePath:
        return self.source.image(self.images[index][0])

    def image_paths(self) -> List[ImagePath]:
        return [self.image(index) for index in range(len(self))]

    def __getitem__(self, key: Key) -> Tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        if self._codes is not None:
            codes = self._codes[self._code_rows[index]]
            return self.text(epoch, index), torch.from_numpy(codes.astype(np.int64))
        for candidate in [*range(index, len(self)), *range(index)]:
            if self._flags[candidate] == _DEADLY:
                continue
            self._tracker.mark(candidate)
            try:
                pixels = load_image(self.image(candidate), self.image_size)
            except (ValueError, OSError) as error:
                self._note_unreadable(candidate, error)
                continue
            finally:
                self._tracker.mark(-1)
            image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (size, size, 3) -> (3, size, size)
            return self.text(epoch, candidate), image if self.byteio else image.float().div_(255)
        raise ValueError(f"{printable(self.folder)}: none of its {len(self)} images can be read any more")

    def captions(self, index: int) -> List[np.ndarray]:
        return self._captions[index]

    def text(self, epoch: int, index: int) -> torch.Tensor:
        """Return the tokens of an image's caption in an epoch, int64 (text_seq_len,), zero-padded."""
        captions = self._captions[index]
        number = self._choose_caption(epoch, index, len(captions))
        return self._pad(() if number is None else captions[number])

    def _choose_caption(self, epoch: int, index: int, count: int) -> Optional[int]:
        """Return which of an image's captions an epoch uses; None: none of them."""
        if random_bits(self.seed, DROPOUT, epoch, index) < self.caption_dropout * 2.0**64:
            return None
        return random_bits(self.seed, CAPTION, epoch, index) % count

    def tables(self, max_bytes: float) -> Optional[Tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """Return all captions and codes, to upload to a GPU, where the indices that `rows` returns select samples.

        Returns:
            None if codes are not attached or the tables take more than max_bytes; else
            texts int32 (1 + captions, text_seq_len), first an empty one; codes int32 (N, image_seq_len); and int64
            (N + 1,), the number of captions before each image.
        """
        if self._codes is None:
            return None
        counts = [0, *(len(self._captions[index]) for index in range(len(self)))]
        before = np.cumsum(counts, dtype=np.int64)
        if 4 * ((1 + before[-1]) * self.text_seq_len + len(self) * self._codes.shape[1]) > max_bytes:
            return None
        texts = np.zeros((1 + before[-1], self.text_seq_len), dtype=np.int32)
        captions = (caption for index in range(len(self)) for caption in self._captions[index])
        for row, caption in zip(texts[1:], captions):
            row[: len(caption)] = caption[: self.text_seq_len]
        codes = self._codes[self._code_rows].astype(np.int32)
        return torch.from_numpy(texts), torch.from_numpy(codes), before

    def rows(self, keys: Sequence[Key], before: np.ndarray) -> torch.Tensor:
        """Return the indices int64 (2, B) of samples' texts and codes in `tables`, which returned `before`, too."""
        found = []
        for epoch, index in (key if isinstance(key, tuple) else (0, key) for key in keys):
            index = range(len(self))[index]
            number = self._choose_caption(epoch, index, int(before[index + 1] - before[index]))
            found.append((0 if number is None else 1 + int(before[index]) + number, index))
        return torch.tensor(found).T.contiguous()

    def first_caption(self, index: int) -> torch.Tensor:
        """Return the first caption of an image, int64 (text_seq_len,), zero-padded."""
        return self._pad(self._captions[index][0])

    def _pad(self, tokens: Union[Sequence[int], np.ndarray]) -> torch.Tensor:
        text = np.zeros(self.text_seq_len, dtype=np.int64)
        tokens = tokens[: self.text_seq_len]
        text[: len(tokens)] = tokens
        return torch.from_numpy(text)

    def _note_unreadable(self, index: int, error: Exception) -> None:
        if self._flags[index] != _READABLE:
            return
        self._flags[index] = _UNREADABLE
        if self.lost <= _LOGGED_UNREADABLE:
            more = "; further ones are only counted" if self.lost == _LOGGED_UNREADABLE else ""
            logger.warning("%s; using another image instead%s", error, more)
