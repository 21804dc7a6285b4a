"""Arrays and codes of files on disk: computed once, shared by processes, and computed again if anything changed."""

import multiprocessing
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import codes as codes_module
from data.codes import CodeCache, load_codes
from tests.builders import states_of, until

FILES = [(f"{number:02d}", number, 1000 + number) for number in range(20)]


def opened(folder, by="this"):
    vae = SimpleNamespace(image_size=8, image_seq_len=2, num_tokens=256, fingerprint=lambda: by)
    return CodeCache(folder, folder / "cache", vae)


def values_of(file):
    return [file[1], file[2]]


def filled(folder, files=FILES, **options):
    """(what fill() asked for, the values of each file)."""
    seen, cache = [], opened(folder, **options)

    def compute(batches):
        for batch in batches:
            seen.extend(files[i] for i in batch)
            yield batch, np.array([values_of(files[i]) for i in batch], np.uint16)

    cache.fill(files, compute, 3)
    values, rows = cache.load(files)
    return seen, values[rows].tolist()


def expected(files=FILES):
    return [values_of(file) for file in files]


def test_rows_that_another_process_gave_to_other_files_do_not_count(tmp_path):
    """Without locks, two processes may add files at the same time."""
    cache = opened(tmp_path)

    def compute(batches):
        for batch in batches:
            index = next((tmp_path / "cache").glob("*.json"))
            index.write_text(index.read_text().replace('"03"', '"other"'))
            yield batch, np.array([values_of(FILES[i]) for i in batch], np.uint16)

    cache.fill(FILES, compute, 20)
    assert [file for file in FILES if file not in cache] == [FILES[3]]


def test_computed_once_in_any_order_and_state(tmp_path):
    assert filled(tmp_path) == (FILES, expected())  # also in the files' order
    assert filled(tmp_path) == ([], expected())
    assert filled(tmp_path, FILES[7:2:-1]) == ([], expected(FILES[7:2:-1]))
    changed = [*FILES[:3], ("03", 7, 1003), *FILES[4:9], ("09", 9, 5), ("new", 2, 2), *FILES[10:]]
    assert filled(tmp_path, changed) == ([("03", 7, 1003), ("09", 9, 5), ("new", 2, 2)], expected(changed))
    cache = opened(tmp_path)
    assert FILES[3] not in cache and FILES[9] not in cache  # the states before
    assert cache.load(changed)[0].shape == (21, 2)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".lock", ".rows"]
    assert next((tmp_path / "cache").glob("*.rows")).stat().st_size == 21 * (4 + 2 * 2)  # without the states before
    assert filled(tmp_path, changed[5:8])[0] == []


@pytest.mark.parametrize("damage", ["cut rows", "long rows", "no rows", "cut index", "no index", "other"])
def test_damage_is_computed_again(tmp_path, damage, logged):
    filled(tmp_path)
    index, rows = (next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("json", "rows"))
    path = index if "index" in damage or damage == "other" else rows
    content = path.read_bytes()
    if damage.startswith("no"):
        path.unlink()
    else:
        damaged = {"cut": content[:-5], "long": content + b"abc", "other": b'["no", "index"]'}
        path.write_bytes(damaged[damage.split()[0]])
    seen, values = filled(tmp_path)
    # After a lost index, files get the same rows again, in which their values are found.
    assert values == expected() and len(seen) == {"cut rows": 1, "no rows": 20}.get(damage, 0)
    assert ("damaged" in logged.text) == (path == index and damage != "no index")
    assert filled(tmp_path) == ([], expected())


def test_every_flipped_bit_is_noticed(tmp_path):
    filled(tmp_path)
    rows = next((tmp_path / "cache").glob("*.rows"))
    content = rows.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        rows.write_bytes(damaged)
        assert [file in opened(tmp_path) for file in FILES].count(False) == 1
    names = next((tmp_path / "cache").glob("*.json"))
    names.write_text(names.read_text().replace('"03"', '"x"').replace('"05"', "[5]"))
    assert not any(file in opened(tmp_path) for file in FILES) and filled(tmp_path)[1] == expected()


def work(folder, log, pause):
    """Fill the cache in another process, one file at a time, and pause (s) after the first; log what was computed."""

    def compute(batches):
        for number, batch in enumerate(batches):
            time.sleep(pause if number == 1 else 0)
            yield batch, np.array([values_of(FILES[i]) for i in batch], np.uint16)
            with open(log, "a") as file:
                file.write("".join(f"{FILES[i][0]}\n" for i in batch))

    opened(folder).fill(FILES, compute, 1)


def test_what_a_dead_process_was_computing_another_computes(tmp_path):
    def start(name, pause):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(tmp_path, tmp_path / name, pause))
        process.start()
        return process

    def lines(name):
        return (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []

    first = start("first.log", 600)
    until(lambda: lines("first.log"))
    second = start("second.log", 0)
    until(lambda: len(lines("second.log")) >= 10)
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and first.exitcode != 0
    assert sorted(lines("first.log") + lines("second.log")) == [file[0] for file in FILES]  # each once
    with open(next((tmp_path / "cache").glob("*.rows")), "ab") as rows:
        rows.write(os.urandom(5))  # half a record
    assert filled(tmp_path) == ([], expected())


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


def codes_of(folder, encode, images=None, *, cache_dir=None, codebook=256, fingerprint="0123456789abcdef"):
    """(codes of the images that can be read, indices of the others)."""
    vae = SimpleNamespace(image_size=SIZE, image_seq_len=4, num_tokens=codebook, fingerprint=lambda: fingerprint)
    cache = CodeCache(folder, cache_dir or folder / ".codes", vae)
    images = states_of(folder, "*.png") if images is None else images
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
    images = states_of(folder, "*.png")
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
