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
from pathlib import Path
from typing import Container, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.arrays import pickled_by_name, unpickled
from data.captions import open_captions, tokenized
from data.order import Key, epoch_and_index, random_bits
from data.pairs import UNREADABLE, File, Skipped, find_pairs, open_picture, printable, read_captions, report_skipped
from data.reading import Reading

logger = logging.getLogger("minidalle")

_ORIENTATION = 0x0112  # the EXIF tag
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NAMED_IN_LOG = 20  # unreadable pictures told one by one; a disk that goes away would fill the log
_NEVER_AGAIN = 2  # the flag of a picture over which a worker was killed; 1: could not be read, and is tried again
# What a random number is for, so that no two uses share one; 2 is the order's, in data/order.py.
_CAPTION, _DROPOUT, _GENERATED, _HELD_OUT = 0, 1, 3, 4


def load_picture(path: Union[str, Path], size: int) -> np.ndarray:
    """One picture as uint8 RGB (size, size, 3): turned upright by its EXIF tag, the middle square, resized bilinearly.

    The square is what torchvision's RandomResizedCrop cuts at scale 1 and ratio 1, and PIL's bilinear filter widens
    when it shrinks (antialiasing). Transparent parts show white; 16-bit grey is scaled, not cut off.

    Raises FileNotFoundError or PermissionError naming the file when it cannot be had, ValueError naming it for
    everything else: not a picture, truncated, damaged, over PIL's pixel limit.
    """
    try:
        with open_picture(path) as image:
            return middle_square(image, size)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes PIL raise OSError, SyntaxError, struct.error, zlib.error and more
        reason = str(error).replace("\n", " ")
        named = reason if printable(path) in reason else f"{printable(path)}: cannot be read as a picture ({reason})"
        raise ValueError(named) from error


def middle_square(image: Image.Image, size: int) -> np.ndarray:
    """load_picture of an opened picture. Raises whatever PIL does for a damaged one."""
    image.load()
    image = _upright(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:
        image = image.crop((left, top, left + side, top + side))
    image = _to_rgb(image)
    if side != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block raises many things, and the pixels are sound without it
        return image
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # PNG's 16-bit grey: "I;16", or "I" with an older PIL
        grey = np.clip(np.asarray(image), 0, 65535)
        white = grey == image.info["transparency"] if "transparency" in image.info else np.zeros_like(grey, dtype=bool)
        return Image.fromarray(np.where(white, 255, np.round(grey / 257)).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


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
        cache = None if cache_dir is None else open_captions(folder, cache_dir, tokenizer)
        tokenized_before = () if cache is None else cache
        pairs, self._skipped = find_pairs(folder, lambda file: file in encoded or file in tokenized_before)
        report_skipped(self._skipped)
        self.pictures: List[File] = [picture for picture, _ in pairs]
        captions = [caption for _, caption in pairs]
        self._captions = tokenized(captions, self.folder, tokenizer, cache)
        if not truncate_captions:
            self._refuse_long_captions(captions, tokenizer)
        self._codes: Optional[np.ndarray] = None
        # One flag a picture, in memory that worker processes share with their parent.
        self._unreadable = torch.zeros(len(self.pictures), dtype=torch.uint8).share_memory_()
        self._reading = Reading()

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
        index → reason for those that could not be encoded (`cached_codes` returns both); they leave the dataset and are
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
            lost = {UNREADABLE: [self.folder / self.pictures[index][0] for index in sorted(bad)]}
            report_skipped(lost)
            self._skipped[UNREADABLE] = sorted(set(self._skipped.get(UNREADABLE, []) + lost[UNREADABLE]))
            self._keep(np.flatnonzero(good))
        self._codes = codes

    def _keep(self, rows: np.ndarray) -> None:
        self.pictures = [self.pictures[row] for row in rows]
        self._captions = self._captions.only(rows)
        self._unreadable = self._unreadable[torch.from_numpy(rows)].share_memory_()
        self._reading = Reading()  # of its own, where a copy keeps other rows
        if self._codes is not None:
            self._codes = self._codes[rows]

    def hold_out(self, share: float) -> "TextImageDataset":
        """Take this share of the pairs out, at least one, and return them as a dataset of their own, without caption
        dropout. A hash of a picture's name decides, so that the same pictures are held out whatever the seed, and
        nearly the same ones of a folder that has grown. ValueError where nothing would be left to train on.
        """
        names = [os.fsencode(name) for name, _, _ in self.pictures]
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
        for (name, _, _), start, stop in zip(self.pictures, captions.starts, captions.stops):
            digest.update(os.fsencode(name) + b"\0" + captions.tokens[start:stop].tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {**vars(self), "_codes": pickled_by_name(self._codes)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _codes=unpickled(state["_codes"]))

    @property
    def skipped(self) -> Skipped:
        """Reason → files left out, those that went bad since the scan included."""
        found = [self.folder / self.pictures[i][0] for i in self._unreadable.nonzero().flatten().tolist()]
        if not found:
            return dict(self._skipped)
        return {**self._skipped, UNREADABLE: sorted(set(self._skipped.get(UNREADABLE, []) + found))}

    @property
    def lost(self) -> int:
        """How many pictures went bad since the scan."""
        return int((self._unreadable > 0).sum())

    def blame(self, said: str) -> List[str]:
        """The pictures that the workers were reading whose end torch's error `said` tells; they are not read again."""
        places = self._reading.of_ended(said)
        self._unreadable[places] = _NEVER_AGAIN
        return [printable(self.folder / self.pictures[place][0]) for place in places]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> Tuple[torch.Tensor, torch.Tensor]:
        epoch, index = epoch_and_index(key, len(self))
        if self._codes is not None:
            return self._text(epoch, index), torch.from_numpy(self._codes[index].astype(np.int64))
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self._unreadable[place] == _NEVER_AGAIN:
                continue
            self._reading.now(place)
            try:
                pixels = load_picture(self.folder / self.pictures[place][0], self.image_size)
            except (ValueError, OSError) as error:
                self._note_unreadable(place, error)
                continue
            finally:
                self._reading.now(-1)
            image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (size, size, 3) -> (3, size, size)
            return self._text(epoch, place), image if self.byteio else image.float().div_(255)
        raise ValueError(f"{printable(self.folder)}: none of its {len(self)} pictures can be read any more")

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

    def hold_out(self, share: float) -> "GeneratedDataset":
        """A further dataset of this share of the length, at least one sample, of another seed."""
        held_out = copy.copy(self)
        held_out.length, held_out.seed = max(1, round(share * self.length)), random_bits(self.seed, _HELD_OUT)
        return held_out

    def blame(self, said: str) -> List[str]:
        """As TextImageDataset has it: no picture was read."""
        return []

    def fingerprint(self) -> str:
        return f"{self.length} generated samples of seed {self.seed}"

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


if __name__ == "__main__":  # python -m data.loader check FOLDER
    from data.check import main

    main()
