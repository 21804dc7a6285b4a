"""Convert text to token ids and back, with one of four kinds of vocabulary files.

- CLIP's byte-level BPE with 49,408 tokens (Radford et al., 2021), the default, in bpe/. As in CLIP, text is first
  repaired, unescaped and lower-cased.
- YouTokenToMe models (text files of numbers). Only white space in a text is changed.
- tokenizer.json of Hugging Face tokenizers, such as `python -m data.vocabulary train` writes.
- sentencepiece's .model, if its package is installed.

Hugging Face `tokenizers` runs the first three; the ids equal those of the original programs. Id 0 is the model's
padding, whatever the vocabulary says. If text may contain token 0 of a .json or .model file, that token gets the id of
the file's padding or, if it has none, a new id at the end. CLIP's token 0, an exclamation mark that does not end its
run of signs ("!€"), keeps its id and is not decoded.
"""

import functools
import gzip
import hashlib
import html
import io
import json
import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any, Callable, Container, Dict, List, NamedTuple, Optional, Tuple, Union

import ftfy
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

SENTENCEPIECE_START = b"\n"  # of its protocol buffer: the tag of the first token
MOST_TOKENS = 1 << 20
LARGEST_FILE = 64 << 20  # bytes; a model of a million tokens is a third of this


class Vocabulary(NamedTuple):
    """The content of a vocabulary file, ready for use."""

    kind: str  # "clip", "yttm", "json" or "sentencepiece"
    size: int  # number of ids
    unknown: Optional[int]  # see Tokenizer
    clean: Callable[[str], str]  # prepares a text
    encode: Callable[[str], List[int]]  # of a prepared text
    decode: Callable[[List[int]], str]  # of ids without padding


class Tokenizer:
    """A vocabulary of any kind, as returned by load_tokenizer.

    kind         see Vocabulary
    vocab_size   number of ids, including special tokens
    unknown      id of characters that the vocabulary lacks; None if it lacks none, as CLIP's
    fingerprint  SHA-256 (hex) of the vocabulary file; equal if two runs use the same ids
    vocabulary   bytes of the file, for the checkpoint; None for CLIP's, which is part of this program
    path         of the file; None if it was given as bytes
    keeps_ids    see load_tokenizer
    """

    def __init__(self, entries: Vocabulary, data: bytes, path: Optional[str], keeps_ids: bool = False) -> None:
        self.kind, self.vocab_size, self.unknown = entries.kind, entries.size, entries.unknown
        self.keeps_ids = keeps_ids and entries.kind in ("json", "sentencepiece")
        digest = hashlib.sha256(data + b"ids as in the file" * self.keeps_ids).hexdigest()
        self.fingerprint = CLIP_FINGERPRINT if self.kind == "clip" else digest
        self.vocabulary = None if self.kind == "clip" else data
        self.path = path
        self._entries = entries

    def encode(self, text: str) -> List[int]:
        """Return the ids of a text without special tokens, [] for white space; ValueError if it is not Unicode."""
        text = self._entries.clean(text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, of which `tokenizers` would say that it is not a string
            raise ValueError(f"{ascii(_shorten(text))} is not valid Unicode text") from None
        return self._entries.encode(text)

    def decode(self, ids: Any) -> str:
        """Return the text of one sequence of ids: a list, or a tensor or array with one dimension.

        Padding (0), special tokens and ids past the vocabulary (the model's padding for each position) are skipped.
        Bytes that are not UTF-8, which a model may generate, become U+FFFD. Spaces at both ends are removed.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        return self._entries.decode([i for i in ids if 0 < i < self.vocab_size]).strip(" ")


def encode_text(tokenizer: Tokenizer, text: str) -> List[int]:
    """Return a text's ids; if the vocabulary lacks some of its characters, those of the text in lower case."""
    tokens, lower = tokenizer.encode(text), text.lower()
    return tokenizer.encode(lower) if tokenizer.unknown in tokens and lower != text else tokens


def load_tokenizer(
    bpe_path: Union[str, "os.PathLike[str]", None] = None, vocabulary: Optional[bytes] = None, keep_ids: bool = False
) -> Tokenizer:
    """Return the tokenizer of the file `bpe_path` or of its content `vocabulary`; CLIP's by default.

    If there is no such file, but one of its name in bpe/, that one is used: Graphcore's application, whose commands
    people paste, has the vocabularies in models/bpe/.

    Args:
        keep_ids: leave all ids as the file has them, as DALLE-pytorch does, though one of text may be the padding's.

    Raises:
        ValueError, OSError: there is no such file, or it is no vocabulary that can be read here.
    """
    if vocabulary is not None:
        name, path, data = "the vocabulary given as bytes", None, vocabulary
    else:
        path = _find_file(os.fspath(CLIP_PATH if bpe_path is None else bpe_path))
        name, data = path, _read_file(path)
    try:
        return Tokenizer(_parse(data, keep_ids), data, path, keep_ids)
    except ValueError as error:
        raise ValueError(f"{name} is not a vocabulary that can be used: {error}") from None


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
        raise ValueError(f"{path} is not a file; a vocabulary file is needed")
    if os.path.getsize(path) > LARGEST_FILE:  # perhaps a checkpoint of some gigabytes
        raise ValueError(f"{path} is too large for a vocabulary file ({os.path.getsize(path):,} bytes)")
    with open(path, "rb") as file:
        return file.read()


def _parse(data: bytes, keep_ids: bool) -> Vocabulary:
    """Return the vocabulary in a file of any kind; errors do not name the file."""
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
    if data.lstrip()[:1] == b"{":
        return _parse_json(data, keep_ids)
    if data[:1] == SENTENCEPIECE_START:
        return _parse_sentencepiece(data, keep_ids)
    return _parse_yttm(data)


def _parse_json(data: bytes, keep_ids: bool) -> Vocabulary:
    """Parse a tokenizer.json of Hugging Face tokenizers."""
    try:
        model = BPEModel.from_str(data.decode("utf-8"))
    except Exception as error:  # the package's own, without a class
        raise ValueError(f"it is not a tokenizer.json ({error})") from None
    model.no_truncation()
    padding = model.padding["pad_id"] if model.padding else None
    for name in ("<pad>", "[PAD]", "<|pad|>", "<PAD>"):
        padding = model.token_to_id(name) if padding is None else padding
    model.no_padding()
    settings = json.loads(data)
    tokens = model.get_vocab(with_added_tokens=True)
    if not tokens or max(tokens.values()) >= MOST_TOKENS:
        raise ValueError(f"it has no tokens, or ids of more than {MOST_TOKENS:,}")
    unknown = settings["model"].get("unk_id")
    if settings["model"].get("unk_token") is not None:
        unknown = tokens.get(settings["model"]["unk_token"])
    special = {token["id"] for token in settings.get("added_tokens") or [] if token["special"]} - {unknown}
    ids = _renumber(max(tokens.values()) + 1, padding, 0 in special or keep_ids)
    encode = functools.partial(_encode, model, ids)
    decode = functools.partial(_decode, model, ids, special | {unknown})
    return Vocabulary("json", ids.size, ids.to_ours.get(unknown, unknown), str.strip, encode, decode)


def _parse_sentencepiece(data: bytes, keep_ids: bool) -> Vocabulary:
    """Parse a .model of sentencepiece."""
    try:
        import sentencepiece
    except ImportError:
        raise ValueError("it is a model of sentencepiece, which is not installed: pip install sentencepiece") from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise ValueError("it is not a sentencepiece model") from None
    padding = model.pad_id() if model.pad_id() >= 0 else None
    unknown = model.unk_id()
    ids = _renumber(model.vocab_size(), padding, model.is_control(0) or keep_ids)
    dropped = {i for i in range(model.vocab_size()) if model.is_control(i) or model.is_unused(i) or i == unknown}
    encode = functools.partial(_encode, model, ids)
    decode = functools.partial(_decode, model, ids, dropped)
    return Vocabulary("sentencepiece", ids.size, ids.to_ours.get(unknown, unknown), str.strip, encode, decode)


class Numbers(NamedTuple):
    """Ids that differ from a file's, from the file's to ours and back, and the number of ours."""

    to_ours: Dict[Optional[int], int]
    to_theirs: Dict[int, int]
    size: int


def _encode(model: Any, numbers: Numbers, text: str) -> List[int]:
    """Return the ids of a text by a model of `tokenizers` or sentencepiece."""
    ids = model.encode(text, add_special_tokens=False).ids if isinstance(model, BPEModel) else model.encode(text)
    return [numbers.to_ours.get(i, i) for i in ids]


def _decode(model: Any, numbers: Numbers, dropped: Container[Optional[int]], ids: List[int]) -> str:
    """Return the text of ids without those that are `dropped` in the model's numbers."""
    theirs = (numbers.to_theirs.get(i, i) for i in ids)
    return model.decode([i for i in theirs if i not in dropped])


def _renumber(size: int, padding: Optional[int], zero_is_free: bool) -> Numbers:
    """Give id 0 to the padding, and its token the id of the file's padding or a new one."""
    if padding == 0 or zero_is_free:
        return Numbers({}, {}, size)
    if padding is None:
        return Numbers({0: size}, {size: 0}, size + 1)
    return Numbers({0: padding, padding: 0}, {padding: 0}, size)


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
    return _vocabulary_of("clip", model, _clean_clip, pieces + [b""] * CLIP_SPECIAL_TOKENS, None)


def _vocabulary_of(
    kind: str, model: BPEModel, clean: Callable[[str], str], pieces: List[bytes], unknown: Optional[int]
) -> Vocabulary:
    """Return the vocabulary of a model; `pieces` has the UTF-8 of each id, empty for special tokens."""
    encode = functools.partial(_encode, model, Numbers({}, {}, len(pieces)))
    return Vocabulary(kind, len(pieces), unknown, clean, encode, functools.partial(_join, pieces))


def _join(pieces: List[bytes], ids: List[int]) -> str:
    return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")


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
    characters = list(zip(numbers[2:merges_start:2], numbers[3:merges_start:2]))
    rules = [numbers[start : start + 3] for start in range(merges_start, length - 4, 3)]
    tokens = [*special_ids, *(token for _, token in characters), *(token for _, _, token in rules)]
    if sorted(tokens) != list(range(len(tokens))):
        raise ValueError(f"its ids are not the numbers from 0 to {len(tokens) - 1:,}, each once")
    subwords = [""] * len(tokens)
    for code_point, token in characters:
        if not 0 <= code_point < 0x110000 or 0xD800 <= code_point < 0xE000:
            raise ValueError(f"{code_point} is not a Unicode character")
        subwords[token] = chr(code_point)
    merges: List[Tuple[str, str]] = []
    for left, right, token in rules:
        if not all(0 <= part < len(subwords) and subwords[part] for part in (left, right)):
            raise ValueError(f"its merge {left} {right} {token} joins an id that no earlier line defines")
        merges.append((subwords[left], subwords[right]))
        subwords[token] = subwords[left] + subwords[right]

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
    return _vocabulary_of("yttm", model, _clean_yttm, pieces, unknown)


def _clean_clip(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _clean_yttm(text: str) -> str:
    return YTTM_SPACES.sub(" ", text).strip(" ")


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
