"""COCO's training set in number: 118,287 pictures with 591,753 real captions. Its caches, and a second start."""

import json
import os
import random

import numpy as np
import pytest
import torch

from data.codes import load_codes, open_code_cache
from data.loader import TextImageDataset
from data.tokenizer import load_tokenizer

PICTURES, CAPTIONS = 118_287, 591_753


@pytest.mark.slow  # minutes
def test_a_hundred_megabytes_and_a_second_start_that_opens_nothing(shared_data, tmp_path, monkeypatch):
    draw = random.Random(0)
    annotations = json.loads((shared_data / "captions_val2017.json").read_text())["annotations"]
    texts = [text for text in (" ".join(entry["caption"].split()) for entry in annotations) if text]
    picture = next((shared_data / "coco_by_bysa" / "val2017").glob("*.jpg")).read_bytes()
    folder = tmp_path / "COCO"
    for name in ("train2017", "train2017_captions"):
        (folder / name).mkdir(parents=True)
    for number in range(PICTURES):
        name = f"{5 * number:012d}"
        original = tmp_path / f"{number // 30_000}.jpg"  # a file can have 65,000 names
        if not original.exists():
            original.write_bytes(picture)
        os.link(original, folder / "train2017" / f"{name}.jpg")
        count = 5 + (number < CAPTIONS - 5 * PICTURES)
        lines = "\n".join(draw.choice(texts) for _ in range(count))
        (folder / "train2017_captions" / f"{name}.txt").write_text(lines)

    def encode(pixels):
        return torch.randint(0, 1024, (len(pixels), 256))

    def start(encode):
        cache = open_code_cache(
            folder, tmp_path / "cache", image_size=256, image_seq_len=256, num_codes=1024, fingerprint="0123456789"
        )
        options = {"truncate_captions": True, "cache_dir": tmp_path / "cache", "encoded": cache}
        dataset = TextImageDataset(folder, load_tokenizer(), **options)
        dataset.attach_codes(*load_codes(dataset.images, encode, cache, batch_size=256))
        return dataset

    monkeypatch.setattr("data.images.load_image", lambda path, size: np.zeros((1, 1, 3), np.uint8))
    first = start(encode)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 5 and sum(path.stat().st_size for path in files) < 100e6
    for opening in ("data.images.load_image", "data.files._image_fault", "data.sources.folder._caption_fault"):
        monkeypatch.setattr(opening, None)
    monkeypatch.setattr("data.captions.read_captions", None)
    second = start(None)
    assert len(second) == PICTURES and sum(len(second._captions[i]) for i in range(PICTURES)) == CAPTIONS
    for index in range(0, PICTURES, 10_000):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(second[(1, index)], first[(1, index)]))
