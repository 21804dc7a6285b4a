"""Captions as tokens: the same from the cache as without one, and a file is tokenized again only if it changed."""

import contextlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.captions import CaptionCache, encode_caption
from data.dataset import TextImageDataset
from data.files import UNREAD, read_captions
from data.tokenizer import load_tokenizer
from generation.images import encode_prompt
from tests.builders import states_of
from tests.conftest import YTTM

KINDS = {"clip": None, "yttm": YTTM}
TEXTS = [["a red square", "Two green circles, side by side!"], ["one"]]
TEXTS += [["caf\u00e9 &amp; a caf\u00e9", "\u65e5\u672c", "x" * 40, "!", "a red square"]]
TEXTS += [["a blue triangle below a red circle below a green square"]]


tokenizer = pytest.fixture(lambda request: load_tokenizer(KINDS[request.param]), params=KINDS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "words").mkdir(parents=True)
    for number, texts in enumerate(TEXTS):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / "set" / f"{number}.png")
        (tmp_path / "set" / "words" / f"{number}.txt").write_text("\r\n".join(texts) + "\n\n", encoding="utf-8-sig")
    return tmp_path / "set"


def load_captions(files, folder, tokenizer, cache=None, read=None):
    cache = CaptionCache(folder, None, tokenizer) if cache is None else cache
    return cache.load(files, read or (lambda name: read_captions(folder / name)))


def as_lists(captions):
    return [[tokens.tolist() for tokens in captions[i]] for i in range(len(captions))]


def test_the_tokens_are_those_of_the_tokenizer(folder, tokenizer, tmp_path):
    expected = [[encode_caption(tokenizer, text) for text in texts] for texts in TEXTS]
    assert as_lists(load_captions(states_of(folder, "*.txt"), folder, tokenizer)) == expected
    for _ in range(2):
        cache = CaptionCache(folder, tmp_path / "at", tokenizer)
        captions = load_captions(states_of(folder, "*.txt"), folder, tokenizer, cache)
        assert as_lists(captions) == expected
    assert as_lists(captions.select(np.array([False, True, True, False]))) == expected[1:3]
    assert as_lists(pickle.loads(pickle.dumps(captions))) == expected


def test_a_changed_file_is_tokenized_again_and_nothing_else(folder, tokenizer, tmp_path, monkeypatch):
    def cached():
        return load_captions(states_of(folder, "*.txt"), folder, tokenizer, CaptionCache(folder, tmp_path, tokenizer))

    cached()
    seen, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: seen.append(text) or encode(text))
    cached()
    assert seen == []
    (folder / "words" / "1.txt").write_text("quite another one")
    (folder / "words" / "10.txt").write_text("new")
    captions = cached()
    assert seen == ["quite another one", "new"]
    assert [len(captions[i]) for i in range(5)] == [2, 1, 1, 5, 1]
    assert len(captions.tokens) == captions.stops[-1] == sum(len(c) + 1 for i in range(5) for c in captions[i])
    (folder / "words" / "0.txt").unlink()
    assert len(cached()) == 4 and len(seen) == 2


def test_two_tables_of_the_same_images_keep_their_tokens(folder, tmp_path, monkeypatch):
    tokenizer, seen = load_tokenizer(KINDS["yttm"]), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: seen.append(text) or encode(text))
    for name in ("one", "two", "one", "two"):
        (folder / f"{name}.csv").write_text(f"image,caption\n0.png,{name}\n")
        TextImageDataset(folder / f"{name}.csv", tokenizer, text_seq_len=16, image_size=8, cache_dir=tmp_path)
    assert seen == ["one", "two"]


def test_an_interrupted_reading_continues(folder, tokenizer, tmp_path):
    files, seen = states_of(folder, "*.txt"), []

    def read(name):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return TEXTS[[file[0] for file in files].index(name)]

    for error in (pytest.raises(KeyboardInterrupt), contextlib.nullcontext()):
        with error:
            captions = load_captions(files, folder, tokenizer, CaptionCache(folder, tmp_path, tokenizer), read)
    assert seen == [name for name, _, _ in [*files[:3], *files[2:]]]
    assert as_lists(captions) == as_lists(load_captions(files, folder, tokenizer))


@pytest.mark.parametrize("damage", [b"", b"no zip", "cut", "flipped"])
def test_a_damaged_cache_is_made_again(folder, tokenizer, tmp_path, logged, damage):
    files = states_of(folder, "*.txt")
    expected = as_lists(load_captions(files, folder, tokenizer, CaptionCache(folder, tmp_path, tokenizer)))
    (path,) = tmp_path.glob("captions-*.npz")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-40:]
    elif damage == "flipped":
        content[content.index(b"\x93NUMPY", 300) + 140] ^= 1
    path.write_bytes(content if isinstance(damage, str) else damage)
    cache = CaptionCache(folder, tmp_path, tokenizer)
    assert "damaged" in logged.text and files[0] not in cache
    assert as_lists(load_captions(files, folder, tokenizer, cache)) == expected
    assert files[0] in CaptionCache(folder, tmp_path, tokenizer)


def test_captions_are_read_as_prompts_are(tmp_path, logged):
    """L16's vocabulary has no capitals; a prompt with some is encoded in lower case, and so is a caption."""
    tokenizer = load_tokenizer(KINDS["yttm"])
    texts = ["A Dog and a Cat", "\u4e00\u53ea\u72d7\u3002\na dog", "\u4e00\u53ea\u72d7 2", "a \u72d7"]
    for number, text in enumerate(texts):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    loaded = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(text_seq_len=16))
    for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset = TextImageDataset(tmp_path, tokenizer, text_seq_len=16, image_size=8, cache_dir=cache_dir)
        assert [name for name, _, _ in dataset.images] == ["0.png", "1.png", "3.png"]
        for index, prompt in enumerate(["A Dog and a Cat", "a dog", "a \u72d7"]):
            assert torch.equal(dataset[(3, index)][0], encode_prompt(loaded, prompt))
        assert f"skipped 1 file ({UNREAD}): {tmp_path / '2.png'}" in logged.text
        assert "skipped 2 captions (caption that the vocabulary cannot read)" in logged.text
        assert "the vocabulary lacks 3 of 1" in logged.text
    (tmp_path / "1.txt").write_text("\u72d7\n\u732b", encoding="utf-8")
    with pytest.raises(ValueError, match="the vocabulary reads only 2 of 5 captions; use a --bpe-path"):
        TextImageDataset(tmp_path, tokenizer, text_seq_len=16, image_size=8)
    assert len(TextImageDataset(tmp_path, load_tokenizer(), text_seq_len=16, image_size=8)) == 4  # CLIP's reads all
    for number in (1, 2, 3):  # what the cache still has of them does not count
        (tmp_path / f"{number}.png").unlink()
        (tmp_path / f"{number}.txt").unlink()
    assert len(TextImageDataset(tmp_path, tokenizer, text_seq_len=16, image_size=8, cache_dir=tmp_path / "cache")) == 1
