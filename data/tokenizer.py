"""Convert text to token ids and back, with one of two kinds of vocabulary files.

- CLIP's byte-level BPE with 49,408 tokens (Radford et al., 2021), the default, in bpe/. As in CLIP, text is first
  repaired, unescaped and lower-cased.
- YouTokenToMe models (text files of numbers). Only white space in a text is changed.

Hugging Face `tokenizers` runs both; the ids equal those of the original programs. Id 0 is the model's padding,
whatever the vocabulary says. So CLIP's token 0, an exclamation mark that does not end its run of signs ("!€"), is not
decoded.
"""

import gzip
import hashlib
import html
import io
import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Set, Tuple, Union

import ftfy
import torch
from tokenizers import Regex
from tokenizers import Tokenizer as BPEModel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split

logger = logging.getLogger("minidalle")
CLIP_PATH = Path(__file__).resolve().parent.parent / "bpe" / "bpe_simple_vocab_16e6.txt.gz"
CLIP_FINGERPRINT = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# SHA-256 of the text inside: a copy that was compressed again, or not at all, is still CLIP's vocabulary.
CLIP_TEXT_SHA256 = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"
CLIP_SPECIAL_TOKENS = 2  # start and end of text, the last two ids
CLIP_MERGES = 49408 - 2 * 256 - CLIP_SPECIAL_TOKENS  # the file lists more; CLIP uses the first ones
CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

WORD_START = "\u2581"  # YouTokenToMe's sign for the beginning of a word
# What YouTokenToMe treats as white space; a no-break space, for one, is a character like any other.
YTTM_SPACES = re.compile("[\t-\r " + WORD_START + "]+")
# No subword contains a space, so this name is in no vocabulary.
YTTM_UNKNOWN = " unknown"

LARGEST_FILE = 64 << 20  # bytes; a model of a million tokens is a third of this


class Vocabulary(NamedTuple):
    """The content of a vocabulary file, ready for use."""

    kind: str  # "clip" or "yttm"
    model: BPEModel
    clean: Callable[[str], str]
    pieces: List[bytes]  # UTF-8 of each id; empty for special tokens


class Tokenizer:
    """A vocabulary of either kind, as returned by load_tokenizer.

    kind         "clip" or "yttm"
    vocab_size   number of ids, including special tokens
    unknown      id of characters that the vocabulary lacks; None for CLIP's, which lacks none
    fingerprint  SHA-256 (hex) of the vocabulary file; equal if two runs use the same ids
    vocabulary   bytes of a YouTokenToMe file, for the checkpoint; None for CLIP's, which is part of this program
    path         of the file; None if it was given as bytes
    """

    def __init__(self, entries: Vocabulary, data: bytes, path: Optional[str]) -> None:
        self.kind = entries.kind
        self.vocab_size = len(entries.pieces)
        self.unknown = entries.model.token_to_id(YTTM_UNKNOWN)
        self.fingerprint = CLIP_FINGERPRINT if self.kind == "clip" else hashlib.sha256(data).hexdigest()
        self.vocabulary = None if self.kind == "clip" else data
        self.path = path
        self._model = entries.model
        self._clean = entries.clean
        self._pieces = entries.pieces

    def encode(self, text: str) -> List[int]:
        """Return the ids of a text without special tokens; [] for white space.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        text = self._clean(text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, of which `tokenizers` would say that it is not a string
            raise ValueError(f"{ascii(_shorten(text))} is not valid Unicode text") from None
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Any) -> str:
        """Return the text of one sequence of ids: a list, or a tensor or array with one dimension.

        Padding (0), special tokens and ids past the vocabulary (the model's padding for each position) are skipped.
        Bytes that are not UTF-8, which a model may generate, become U+FFFD. Spaces at both ends are removed.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if any(isinstance(i, list) for i in ids):
            raise ValueError("decode takes one sequence of ids at a time, not a batch")
        text = b"".join(self._pieces[i] for i in ids if 0 < i < self.vocab_size)
        return text.decode("utf-8", errors="replace").strip(" ")

    def tokenize(
        self, texts: Union[str, List[str]], context_length: int = 256, truncate_text: bool = False
    ) -> torch.Tensor:
        """Return int64 (B, context_length), each row the ids of one text followed by zeros.

        Raises:
            ValueError: a text has more than `context_length` ids; with `truncate_text` it is cut instead.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = self.encode(text)
            if len(ids) > context_length and not truncate_text:
                raise ValueError(
                    f'"{_shorten(text)}" is {len(ids)} tokens long, and the limit is {context_length}: '
                    "shorten it, or cut such texts with --truncate-captions"
                )
            ids = ids[:context_length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return rows


def load_tokenizer(
    bpe_path: Union[str, "os.PathLike[str]", None] = None, vocabulary: Optional[bytes] = None
) -> Tokenizer:
    """Return the tokenizer of the file `bpe_path` or of its content `vocabulary`; CLIP's by default.

    If there is no such file, but one of its name in bpe/, that one is used: Graphcore's application, whose commands
    people paste, has the vocabularies in models/bpe/.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither a YouTokenToMe model nor CLIP's vocabulary.
    """
    if vocabulary is not None and bpe_path is not None:
        raise ValueError("give a vocabulary file or its bytes, not both")
    if vocabulary is not None:
        name, path, data = "the vocabulary given as bytes", None, vocabulary
    else:
        path = _find_file(os.fspath(CLIP_PATH if bpe_path is None else bpe_path))
        name, data = path, _read_file(path)
    try:
        return Tokenizer(_parse(data), data, path)
    except ValueError as error:
        raise ValueError(f"{name} is neither a YouTokenToMe model nor CLIP's vocabulary: {error}") from None


def _find_file(path: str) -> str:
    bundled = CLIP_PATH.parent / os.path.basename(path)
    if os.path.exists(path) or not bundled.is_file():
        return path
    logger.info("%s: no such file; using %s", path, bundled)
    return str(bundled)


def _read_file(path: str) -> bytes:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such vocabulary file")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; a YouTokenToMe model or CLIP's vocabulary is needed")
    if os.path.getsize(path) > LARGEST_FILE:  # perhaps a checkpoint of some gigabytes
        raise ValueError(f"{path} is too large for a vocabulary file ({os.path.getsize(path):,} bytes)")
    with open(path, "rb") as file:
        return file.read()


def _parse(data: bytes) -> Vocabulary:
    """Return the vocabulary in a file of either kind; errors do not name the file."""
    if not data:
        raise ValueError("it is empty")
    text = data
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                text = file.read(LARGEST_FILE)
        except (OSError, EOFError, zlib.error):
            raise ValueError("it is a damaged gzip file") from None
    if hashlib.sha256(text).hexdigest() == CLIP_TEXT_SHA256:
        return _parse_clip(text)
    if text is not data:
        raise ValueError("it is a gzip file of something else")
    return _parse_yttm(data)


def _parse_clip(text: bytes) -> Vocabulary:
    """Build CLIP's ids: 256 bytes, the same bytes as ends of words, one per merge, start and end of text."""
    # The file writes each byte as a printable character: itself if it is one, else the next one from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    symbols += [symbol + "</w>" for symbol in symbols]
    pieces = [bytes([byte]) for byte in printable + others]
    pieces += [piece + b" " for piece in pieces]

    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges: List[Tuple[str, str]] = []
    for line in text.decode("utf-8").split("\n")[1 : 1 + CLIP_MERGES]:  # the first line is a title
        left, right = line.split()
        merges.append((left, right))
        pieces.append(pieces[ids[left]] + pieces[ids[right]])
        ids[left + right] = len(ids)

    model = BPEModel(BPE(ids, merges, end_of_word_suffix="</w>"))
    model.pre_tokenizer = Sequence(
        [
            Split(Regex(CLIP_WORDS), "removed", invert=True),  # keeps the matches and drops what is between them
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Vocabulary("clip", model, _clean_clip, pieces + [b""] * CLIP_SPECIAL_TOKENS)


def _parse_yttm(data: bytes) -> Vocabulary:
    """Parse a YouTokenToMe model file, which consists of whole numbers in decimal.

    First come the numbers of characters and merges; then for each character its code point and id; for each merge, in
    order of precedence, the ids left, right and joined; at the end the ids unknown, padding, start and end (-1: none).
    """
    try:
        numbers = [int(field) for field in data.split()]
    except ValueError:
        raise ValueError("it does not consist of whole numbers") from None
    n_characters, n_merges = numbers[:2] if len(numbers) > 1 else (0, 0)
    length = 2 + 2 * n_characters + 3 * n_merges + 4
    if n_characters < 1 or n_merges < 0 or len(numbers) != length:
        raise ValueError(
            f"its first line announces {n_characters:,} characters and {n_merges:,} merges, "
            f"which makes {length:,} numbers in all, but it holds {len(numbers):,} (is it cut short?)"
        )
    merges_start = 2 + 2 * n_characters
    special_ids = [i for i in numbers[-4:] if i != -1]
    subwords = [""] * (n_characters + n_merges + len(special_ids))
    defined: Set[int] = set()

    def define(token: int, subword: str) -> None:
        if not 0 <= token < len(subwords) or token in defined:
            raise ValueError(f"its id {token} is given twice or is not below the number of tokens, {len(subwords):,}")
        subwords[token] = subword
        defined.add(token)

    for token in special_ids:
        define(token, "")
    for code_point, token in zip(numbers[2:merges_start:2], numbers[3:merges_start:2]):
        if not 0 <= code_point < 0x110000 or 0xD800 <= code_point < 0xE000:
            raise ValueError(f"{code_point} is not a Unicode character")
        define(token, chr(code_point))
    merges: List[Tuple[str, str]] = []
    for start in range(merges_start, len(numbers) - 4, 3):
        left, right, token = numbers[start : start + 3]
        if not all(0 <= part < len(subwords) and subwords[part] for part in (left, right)):
            raise ValueError(f"its merge {left} {right} {token} joins an id that no earlier line defines")
        merges.append((subwords[left], subwords[right]))
        define(token, subwords[left] + subwords[right])

    unknown = numbers[-4]
    ids = {subword: i for i, subword in enumerate(subwords) if subword}
    if len(ids) + len(special_ids) != len(subwords):
        raise ValueError("it gives two ids to one subword")
    if unknown == -1 or WORD_START not in ids:
        raise ValueError(f"it has no unknown token or no {WORD_START}")
    if subwords[0]:
        raise ValueError(f'its id 0 is "{subwords[0]}", and 0 must be padding: train it with pad_id 0')

    ids[YTTM_UNKNOWN] = unknown
    model = BPEModel(BPE(ids, merges, unk_token=YTTM_UNKNOWN, fuse_unk=True))
    model.pre_tokenizer = Metaspace(replacement=WORD_START, prepend_scheme="always")
    pieces = [subword.replace(WORD_START, " ").encode("utf-8") for subword in subwords]
    return Vocabulary("yttm", model, _clean_yttm, pieces)


def _clean_clip(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _clean_yttm(text: str) -> str:
    return YTTM_SPACES.sub(" ", text).strip(" ")


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
