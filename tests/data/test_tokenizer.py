"""The tokenizers against the programs whose vocabularies they read, and against bad files."""

import gzip
import hashlib
import importlib.util
import pickle
import random
from pathlib import Path

import pytest

from data.tokenizer import CLIP_PATH, load_tokenizer
from tests.builders import one_line
from tests.conftest import ROOT, YTTM

AWKWARD = [
    *("", " ", "\t\r\n\v\f", "a", "  two   spaces\tand\na break "),
    *("\u2581 a\u2581b \u2581\u2581", "nul\x00l \x7f \u200b"),
    *("no\u00a0break\u3000wide\u2028line\x1cseparator\x85", "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m"),
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a",
    *("\U0001f600\U0001f600 a dog \U0001f436!\U0001f3f3\ufe0f\u200d\U0001f308", "a\u2603\u2603b \u2603 c\u2603"),
    *("\ufb01ne &amp;amp; <b>bold</b> &lt;3 \u201cquotes\u201d \u2026", "<UNK> <PAD> <BOS> </w> <|startoftext|>"),
    *("\u0130stanbul stra\u00dfe 'S 'LL '\u017f it's WE'LL", "!!! !\u20ac ?! ... $1,234.56 3rd 20%"),
    *("bike . A dog .22 ,, -- /", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa " + "\u00e1" * 40, "x" * 3000),
]


def many_texts(number: int):
    rnd = random.Random(0)
    parts = [*"abcdeTHE .,!?'\t\n\x0b\x1f\xa0\u3000\u2581\xe9\u2603\u65e50\xbd#-\u20ac"]
    parts += ["\U0001f600", "the ", " a", "&amp;", "'s"]
    prose = [line for page in sorted((ROOT / "docs").glob("*.md")) for line in page.read_text("utf-8").splitlines()]
    return prose + AWKWARD + ["".join(rnd.choice(parts) for _ in range(rnd.randrange(25))) for _ in range(number)]


clip = pytest.fixture(lambda: load_tokenizer(), scope="module")
yttm = pytest.fixture(lambda: load_tokenizer(YTTM), scope="module")


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's own tokenizer. Its package imports torchvision, so the one file is loaded by itself."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("open_clip_torch is not installed")
    file = Path(found.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_alone", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_ids_that_are_known(clip, yttm):
    assert clip.vocab_size == 49408 and clip.encode("A photo\nof a CAT") == [320, 1125, 539, 320, 2368]
    assert clip.decode([49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]) == "a photo of a cat"
    assert yttm.vocab_size == 8192
    numbers = [int(field) for field in YTTM.read_text().split()]
    characters = {chr(code): i for code, i in zip(numbers[2 : 2 + 2 * numbers[0] : 2], numbers[3::2])}
    assert yttm.encode("]") == [characters["\u2581"], characters["]"]]  # too rare in captions to be merged
    assert yttm.encode("\u2603") == [characters["\u2581"], 1]
    assert yttm.encode("A dog") == [90, 273] and yttm.encode("a dog") != [90, 273]
    assert yttm.decode([2, 90, 1, 273, 3, 0, 0]) == "A dog"


def test_clip_equals_open_clip(clip, open_clip):
    for text in many_texts(2000):
        assert clip.encode(text) == open_clip.encode(text), text


def test_yttm_equals_youtokentome(yttm):
    original = pytest.importorskip("youtokentome").BPE(str(YTTM), n_threads=1)
    texts = many_texts(3000)
    for text, expected in zip(texts, original.encode(texts)):
        assert yttm.encode(text) == expected, text
    rnd = random.Random(0)
    for _ in range(1000):
        ids = [rnd.randrange(8192) for _ in range(rnd.randrange(12))]
        assert yttm.decode(ids) == original.decode([ids], ignore_ids=[0, 1, 2, 3])[0].strip(" "), ids


def test_identity_and_the_bytes_in_a_checkpoint(clip, yttm, logged):
    assert (clip.kind, clip.vocabulary, clip.path) == ("clip", None, str(CLIP_PATH))
    assert clip.fingerprint == hashlib.sha256(CLIP_PATH.read_bytes()).hexdigest()
    assert (yttm.kind, yttm.vocabulary, yttm.path) == ("yttm", YTTM.read_bytes(), str(YTTM))
    assert yttm.fingerprint == hashlib.sha256(YTTM.read_bytes()).hexdigest()

    embedded = load_tokenizer(vocabulary=yttm.vocabulary)
    assert embedded.path is None and embedded.fingerprint == yttm.fingerprint
    assert embedded.encode("A dog") == yttm.encode("A dog")
    copied = pickle.loads(pickle.dumps(yttm))  # as a data loader's worker processes may get it
    assert copied.encode("A dog") == yttm.encode("A dog")
    bundled = load_tokenizer("models/bpe/bpe_yttm_vocab.txt")  # the path in Graphcore's README
    assert bundled.path == str(YTTM) and bundled.fingerprint == yttm.fingerprint
    assert f"models/bpe/bpe_yttm_vocab.txt: no such file; using {YTTM}" in logged.text
    with pytest.raises(FileNotFoundError, match="^models/bpe/other.txt: no such vocabulary file$"):
        load_tokenizer("models/bpe/other.txt")


MODEL, CLIP_FILE = YTTM.read_bytes(), CLIP_PATH.read_bytes()
LINES = MODEL.splitlines(keepends=True)
MERGE = 1 + int(LINES[0].split()[0])  # line of the first merge


def test_bad_files(tmp_path):
    path = tmp_path / "vocab.file"
    for content, reason in (
        (b"", "empty"),
        (bytes(range(256)), "whole numbers"),
        (b"999999999 999999999\n1 2\n", "cut short"),
        (MODEL.rstrip()[:-1], "cut short"),
        (b"".join([*LINES[:MERGE], b"6 8191 82\n", *LINES[MERGE + 1 :]]), "6 8191 82"),  # a merge of an unknown id
        (b"2 0\n9601 1\n97 1\n0 2 -1 -1\n", "from 0 to 3, each once"),
        (b"2 0\n9601 4\n55296 5\n1 0 2 3\n", "55296"),  # no character
        (b"2 0\n9601 1\n97 2\n-1 0 -1 -1\n", "unknown"),
        (gzip.compress(MODEL), "something else"),
        (CLIP_FILE[: len(CLIP_FILE) // 2], "damaged"),
        (b'{"a": 1}', "tokenizer.json"),
        (b"{", "tokenizer.json"),
        (b"\n\xff\xff", "sentencepiece"),
    ):
        path.write_bytes(content)
        with one_line(f"{path}.*{reason}"):
            load_tokenizer(path)
