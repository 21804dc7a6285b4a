"""The code cache: what is encoded, with what, what is found again, and what a stop leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import codes as codes_module
from data.codes import load_codes, open_code_cache
from data.images import load_image
from models.vae import load_vqgan
from tests.conftest import ROOT

SIZE = 8


class MeanEncoder:
    """A stand-in for a VQGAN: four codes per image, the mean brightness of each quarter; counts what it is given."""

    seen = 0

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, SIZE, SIZE)
        assert images.min() >= 0 and images.max() <= 1
        self.seen += len(images)
        return (torch.nn.functional.avg_pool2d(images.mean(1), 4).flatten(1) * 255).round().long()


def draw(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 9), (value,) * 3).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        draw(tmp_path / "set" / "sub" / f"{i}.png", 20 * i)
    return tmp_path / "set"


def in_its_state(folder, path):
    status = path.stat()
    return path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns


def cached(folder, encode, pictures=None, *, cache_dir=None, workers=0, batch_size=3, **options):
    if pictures is None:
        pictures = [in_its_state(folder, path) for path in sorted(folder.rglob("*.png"))]
    options = {"image_size": SIZE, "image_seq_len": 4, "num_codes": 256, "fingerprint": "0123456789abcdef", **options}
    cache = open_code_cache(folder, cache_dir or folder / ".codes", **options)
    codes, rows = load_codes(pictures, encode, cache, batch_size=batch_size, workers=workers)
    return codes[rows[rows >= 0]], np.flatnonzero(rows < 0).tolist()


def expected(values):
    return [[value] * 4 for value in values]


def test_encoded_once_then_read(folder):
    encode = MeanEncoder()
    codes, bad = cached(folder, encode)
    assert encode.seen == 10 and bad == []
    assert codes.dtype == np.uint16 and codes.tolist() == expected(range(0, 200, 20))
    again = MeanEncoder()
    codes, bad = cached(folder, again)
    assert again.seen == 0 and bad == []
    assert codes.tolist() == expected(range(0, 200, 20))


def test_pixels_are_those_of_the_loader(tmp_path, shared_data):
    paths = sorted((shared_data / "coco_by_bysa" / "val2017").glob("*.jpg"))[:5]
    pictures = [in_its_state(shared_data, path) for path in paths]
    seen = []

    def encode(images):
        seen.extend(images)
        return torch.zeros(len(images), 1, dtype=torch.long)

    cached(
        shared_data,
        encode,
        pictures,
        cache_dir=tmp_path,
        image_size=64,
        image_seq_len=1,
        num_codes=4,
        workers=2,
        batch_size=2,
    )
    for path, image in zip(paths, seen):
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), load_image(path, 64))


def test_only_a_changed_or_new_picture_is_encoded_again(folder):
    cached(folder, MeanEncoder())
    stat = (folder / "sub" / "7.png").stat()
    draw(folder / "sub" / "3.png", 255)
    os.utime(folder / "sub" / "3.png", ns=(1, 1))  # the same size
    (folder / "sub" / "7.png").write_bytes((folder / "sub" / "7.png").read_bytes() + b"longer")
    os.utime(folder / "sub" / "7.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    draw(folder / "sub" / "00.png", 7)  # comes second in the order
    for seen in (3, 0):
        encode = MeanEncoder()
        codes, _ = cached(folder, encode)
        assert encode.seen == seen
        assert codes[:, 0].tolist() == [0, 7, 20, 40, 255, 80, 100, 120, 140, 160, 180]
    assert next((folder / ".codes").glob("*.rows")).stat().st_size == 11 * (4 + 2 * 4)  # without the old states


def test_another_vqgan_size_codebook_or_folder_has_codes_of_its_own(folder, tmp_path, monkeypatch):
    cached(folder, MeanEncoder())
    encode = MeanEncoder()
    cached(folder, encode, fingerprint="0123456789abcdeX")  # only the end differs, which the file names do not show
    assert encode.seen == 10
    cached(folder, encode, num_codes=300)
    assert encode.seen == 20
    cached(folder, encode)
    cached(folder, encode, fingerprint="0123456789abcdeX")
    assert encode.seen == 20
    monkeypatch.setattr(codes_module, "CROP", "another")
    cached(folder, encode)
    assert encode.seen == 30
    monkeypatch.undo()
    shutil.copytree(folder / "sub", tmp_path / "other" / "sub")  # same names, sizes and times
    draw(tmp_path / "other" / "sub" / "3.png", 61)
    stat = (folder / "sub" / "3.png").stat()
    os.utime(tmp_path / "other" / "sub" / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    codes, _ = cached(tmp_path / "other", encode, cache_dir=folder / ".codes")
    assert encode.seen == 40 and codes[3, 0] == 61


def test_a_folder_moved_with_its_cache_stays_valid(folder, tmp_path):
    cached(folder, MeanEncoder())
    folder.rename(tmp_path / "moved")
    encode = MeanEncoder()
    codes, _ = cached(tmp_path / "moved", encode)
    assert encode.seen == 0 and codes.tolist() == expected(range(0, 200, 20))


@pytest.mark.parametrize("num_codes, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_the_widest_code_fits(folder, num_codes, dtype):
    def encode(images):
        return torch.full((len(images), 2), num_codes - 1)

    for _ in range(2):
        codes, _ = cached(folder, encode, num_codes=num_codes, image_seq_len=2)
        assert codes.dtype == dtype and (codes == num_codes - 1).all()


def test_unreadable_pictures_are_told_and_never_cached(folder):
    whole = (folder / "sub" / "4.png").read_bytes()
    (folder / "sub" / "4.png").write_bytes(whole[:50])
    pictures = [in_its_state(folder, path) for path in sorted(folder.rglob("*.png"))]
    (folder / "sub" / "7.png").unlink()
    for expected_calls in (8, 0):
        encode = MeanEncoder()
        codes, bad = cached(folder, encode, pictures)
        assert encode.seen == expected_calls
        assert bad == [4, 7]
        assert codes[:, 0].tolist() == [0, 20, 40, 60, 100, 120, 160, 180]
    (folder / "sub" / "4.png").write_bytes(whole)
    encode = MeanEncoder()
    codes, bad = cached(folder, encode)
    assert encode.seen == 1 and bad == [] and codes[4, 0] == 80


def test_no_readable_picture_is_an_error(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="none of 10 images can be read") as error:
        cached(folder, MeanEncoder())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no image to encode"):
        cached(folder, MeanEncoder(), [])


@pytest.mark.parametrize(
    "result, words",
    [
        (lambda images: torch.zeros(len(images), 4), "float32"),
        (lambda images: torch.zeros(1, 4, dtype=torch.long), "integers"),
        (lambda images: torch.full((len(images), 4), 256), "the codebook has 256"),
        (lambda images: torch.full((len(images), 4), -1), "codes -1 to -1"),
    ],
)
def test_an_encoder_that_gives_something_else_is_refused(folder, result, words):
    with pytest.raises(ValueError, match=words):
        cached(folder, result)
    assert not any((folder / ".codes").rglob("*.rows")) or not any(
        path.stat().st_size for path in folder.rglob("*.rows")
    )


def test_file_names_that_are_not_utf8(folder):
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    draw(strange, 33)
    cached(folder, MeanEncoder())
    encode = MeanEncoder()
    codes, _ = cached(folder, encode, [in_its_state(folder, strange)])
    assert encode.seen == 0 and codes.tolist() == [[33] * 4]


ENCODE = """
import sys
from pathlib import Path
import torch
from data.codes import load_codes, open_code_cache
from models.vae import load_vqgan

torch.set_num_threads(1)
folder, vqgan, cache_dir, at_once = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
vae = load_vqgan(vqgan)
def encode(pixels):
    codes = vae.get_codebook_indices(pixels)
    print(len(pixels), flush=True)
    sys.stdin.readline()
    return codes
pictures = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.png"))]
options = {"image_seq_len": vae.image_seq_len, "num_codes": vae.num_tokens, "fingerprint": vae.fingerprint()}
cache = open_code_cache(folder, cache_dir, image_size=vae.image_size, **options)
load_codes(pictures, encode, cache, batch_size=at_once)
"""


def test_interrupted_twice_and_finished(picture_folder, tiny_vqgan, tmp_path):
    """A process with a real VQGAN is killed once between two batches and once while it works on one."""
    for number in range(12, 40):
        shutil.copy(picture_folder / f"{number % 12:02d}.png", picture_folder / f"{number}.png")
    encoded = []
    for batches in (3, 4, None):
        command = [sys.executable, "-c", ENCODE, picture_folder, tiny_vqgan, tmp_path / "codes", "3"]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        done = []
        for line in process.stdout:  # a batch that the process holds until it is told to go on
            if len(done) == batches:
                process.send_signal(signal.SIGKILL)
                break
            done.append(int(line))
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdin.close()
        assert process.wait(60) == (0 if batches is None else -signal.SIGKILL)
        encoded.append(sum(done))
    assert encoded == [9, 12, 19]  # all 40, none of them twice but what was being encoded
    vae = load_vqgan(tiny_vqgan)
    pictures = [in_its_state(picture_folder, path) for path in sorted(picture_folder.glob("*.png"))]
    options = {"image_size": 32, "image_seq_len": 16, "num_codes": 64, "fingerprint": vae.fingerprint()}
    kept, whole = (open_code_cache(picture_folder, tmp_path / name, **options) for name in ("codes", "whole"))
    codes, rows = load_codes(pictures, None, kept)  # which encodes nothing
    uninterrupted, _ = load_codes(pictures, vae.get_codebook_indices, whole)
    assert rows.tolist() == list(range(40)) and np.array_equal(codes[:], uninterrupted[:])
    assert len(np.unique(codes[:])) > 10
    assert sorted(path.suffix for path in (tmp_path / "codes").iterdir()) == [".json", ".lock", ".rows"]
