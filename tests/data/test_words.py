"""The words of training captions, from the captions to the checkpoint's entry and back."""

import pytest

from data import words


def test_words_are_counted_without_case_and_punctuation():
    captions = ["A red circle, above a Square!", "the artist's well-known red-ish dog…", "año 中文 \u0301"]
    entry = words.summarize_captions(captions, ["", *captions, captions[0], "x" * 200])
    once = "red circle above square the artist's well-known red-ish dog año 中文"
    assert entry["words"] == {"a": 2, **dict.fromkeys(once.split(), 1)}
    assert entry["examples"] == captions
    assert words.read_summary(entry) == (entry["words"], captions)


def test_an_entry_is_bounded():
    entry = words.summarize_captions((f"word{i} often" for i in range(30_000)), (f"caption {i}" for i in range(50)))
    assert len(entry["words"]) == words.MAX_WORDS and entry["words"]["often"] == 30_000
    assert entry["examples"] == [f"caption {i}" for i in range(12)]


@pytest.mark.parametrize(
    "entry, expected",
    [
        (None, ({}, [])),
        ([], ({}, [])),
        ({"words": ["red"], "examples": "red"}, ({}, [])),
        ({"words": {"red": "often", 3: 1, "blue": 2}, "examples": [None, "a" * 500]}, ({"blue": 2}, ["a" * 120])),
    ],
)
def test_entries_of_others_are_read_with_care(entry, expected):
    assert words.read_summary(entry) == expected
