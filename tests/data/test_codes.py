"""The code cache: what is encoded, with what, and what is found again. How files survive is test_code_cache.py's."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import codes as codes_module
from data.codes import load_codes, open_code_cache

SIZE = 8


class MeanEncoder:
    """A stand-in for a VQGAN: four codes per image, the mean brightness of each quarter; counts what it is given."""

    seen = 0

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, SIZE, SIZE)
        assert images.min() >= 0 and images.max() <= 1
        self.seen += len(images)
        return (torch.nn.functional.avg_pool2d(images.mean(1), 4).flatten(1) * 255).round().long()


def gray(value):
    return Image.new("RGB", (10, 9), (value,) * 3)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for i in range(10):
        gray(20 * i).save(tmp_path / "set" / "sub" / f"{i}.png")
    return tmp_path / "set"


def files_of(folder):
    paths = sorted(folder.rglob("*.png"))
    return [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def codes_of(folder, encode, images=None, *, cache_dir=None, codebook=256, fingerprint="0123456789abcdef"):
    """(codes of the images that can be read, indices of the others)."""
    vae = SimpleNamespace(image_size=SIZE, image_seq_len=4, num_tokens=codebook, fingerprint=lambda: fingerprint)
    cache = open_code_cache(folder, cache_dir or folder / ".codes", vae)
    images = files_of(folder) if images is None else images
    codes, rows = load_codes(images, encode, cache, batch_size=3)
    return codes[rows[rows >= 0]], np.flatnonzero(rows < 0).tolist()


def test_encoded_once_then_read_even_after_the_folder_moved(folder, tmp_path):
    for place, seen in ((folder, 10), (folder, 0), (tmp_path / "moved", 0)):
        if not place.exists():
            folder.rename(place)
        encode = MeanEncoder()
        codes, bad = codes_of(place, encode)
        assert encode.seen == seen and bad == []
        assert codes.dtype == np.uint16 and codes.tolist() == [[value] * 4 for value in range(0, 200, 20)]


def test_another_vqgan_codebook_crop_or_folder_has_codes_of_its_own(folder, tmp_path, monkeypatch):
    codes_of(folder, MeanEncoder())
    encode = MeanEncoder()
    for options, seen in (
        ({"fingerprint": "0123456789abcdeX"}, 10),  # only the end differs, which the file names do not show
        ({"codebook": 300}, 20),
        ({}, 20),
        ({"fingerprint": "0123456789abcdeX"}, 20),
    ):
        codes_of(folder, encode, **options)
        assert encode.seen == seen
    with monkeypatch.context() as patch:
        patch.setattr(codes_module, "CROP", "another")
        codes_of(folder, encode)
    assert encode.seen == 30
    shutil.copytree(folder / "sub", tmp_path / "other" / "sub")  # same names, sizes and times
    gray(61).save(tmp_path / "other" / "sub" / "3.png")
    stat = (folder / "sub" / "3.png").stat()
    os.utime(tmp_path / "other" / "sub" / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    codes, _ = codes_of(tmp_path / "other", encode, cache_dir=folder / ".codes")
    assert encode.seen == 40 and codes[3, 0] == 61


def test_unreadable_images_are_reported_and_never_cached(folder):
    whole = (folder / "sub" / "4.png").read_bytes()
    (folder / "sub" / "4.png").write_bytes(whole[:50])
    images = files_of(folder)
    (folder / "sub" / "7.png").unlink()
    for seen in (8, 0):
        encode = MeanEncoder()
        codes, bad = codes_of(folder, encode, images)
        assert encode.seen == seen and bad == [4, 7]
        assert codes[:, 0].tolist() == [0, 20, 40, 60, 100, 120, 160, 180]
    (folder / "sub" / "4.png").write_bytes(whole)
    encode = MeanEncoder()
    codes, bad = codes_of(folder, encode)
    assert encode.seen == 1 and bad == [] and codes[4, 0] == 80


def test_an_encoder_that_returns_something_else_is_refused(folder):
    for result, words in (
        (lambda images: torch.zeros(len(images), 4), "float32"),
        (lambda images: torch.zeros(1, 4, dtype=torch.long), "integers"),
        (lambda images: torch.full((len(images), 4), 256), "the codebook has 256"),
        (lambda images: torch.full((len(images), 4), -1), "codes -1 to -1"),
    ):
        with pytest.raises(ValueError, match=words):
            codes_of(folder, result)
        assert not any(path.stat().st_size for path in folder.rglob("*.rows"))
