"""One image to pixels: the crop, the filter, orientation, every kind of image, and files that are none."""

import base64
import os
import resource
import signal

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data import images as images_module
from data.images import load_image, load_images
from data.sources import find_images
from service import uploads
from tests.builders import one_line


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_the_middle_square_is_cut(tmp_path):
    rows = np.arange(3 * 6 * 3, dtype=np.uint8).reshape(3, 6, 3)
    wide = saved(tmp_path / "wide.png", rows)
    assert np.array_equal(load_image(wide, 3), rows[:, 1:4])  # (6 - 3) // 2 = 1
    tall = saved(tmp_path / "tall.png", rows.transpose(1, 0, 2).copy())
    assert np.array_equal(load_image(tall, 3), rows.transpose(1, 0, 2)[1:4])


def test_resizing_is_bilinear_with_antialiasing(tmp_path):
    """Halving with a triangle filter of support 2: weights 1/8, 3/8, 3/8, 1/8, renormalised at the edge."""
    line = np.array([0, 80, 160, 240], dtype=np.uint8)
    path = saved(tmp_path / "ramp.png", np.repeat(np.tile(line, (4, 1))[..., None], 3, axis=2))
    left = (3 * 0 + 3 * 80 + 1 * 160) / 7
    right = (1 * 80 + 3 * 160 + 3 * 240) / 7
    expected = np.tile(np.array([left, right]), (2, 1))
    assert np.abs(load_image(path, 2)[..., 1] - expected).max() <= 1


def test_exif_orientation(tmp_path):
    upright = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)
    stored, exif = np.ascontiguousarray(upright.transpose(1, 0, 2)[::-1]), Image.Exif()
    exif[0x0112] = 6  # the stored first row is the right side of the upright image (EXIF 2.3, table 6)
    assert np.array_equal(load_image(saved(tmp_path / "turned.png", stored, exif=exif), 4), upright[:, 1:5])


def test_every_mode_becomes_rgb(tmp_path):
    for mode, color, kind, expected in (
        ("1", 1, "png", (255, 255, 255)),
        ("LA", (100, 0), "png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 100, 255, 51), "png", (204, 224, 255)),  # 51/255 = 0.2 of the color, 0.8 of white
        *(("I;16", value, "png", (eight,) * 3) for value, eight in ((300, 1), (32896, 128), (65535, 255))),
        ("L", 120, "jpg", (120, 120, 120)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
    ):
        Image.new(mode, (16, 12), color).save(tmp_path / f"a.{kind}", **({"quality": 100} if kind == "jpg" else {}))
        pixels = load_image(tmp_path / f"a.{kind}", 12)
        assert pixels.shape == (12, 12, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels - np.array(expected)).max() <= (5 if mode == "CMYK" else 0), (mode, color)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image = image.resize((8, 4), Image.Resampling.NEAREST)
    image.save(tmp_path / "solid.png")
    assert load_image(tmp_path / "solid.png", 4)[0].tolist() == [[10, 20, 30]] * 2 + [[200, 100, 50]] * 2
    image.save(tmp_path / "clear.png", transparency=1)
    assert load_image(tmp_path / "clear.png", 4)[0].tolist() == [[10, 20, 30]] * 2 + [[255, 255, 255]] * 2
    image.save(tmp_path / "half.png", transparency=bytes([0, 51]))  # an opacity for each palette entry
    expected = [[255, 255, 255]] * 2 + [[244, 224, 214]] * 2
    assert np.abs(load_image(tmp_path / "half.png", 4)[0].astype(int) - expected).max() <= 1


def test_megabytes_of_text_and_color_profile_do_not_spoil_a_png(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "x" * 2 * 2**20, zip=True)
    picture = Image.new("RGB", (8, 8), "teal")
    picture.save(tmp_path / "1.png", pnginfo=notes, icc_profile=bytes(3 * 2**20))
    assert np.array_equal(load_image(tmp_path / "1.png", 8), np.array(picture))
    content = base64.b64encode((tmp_path / "1.png").read_bytes()).decode()
    assert uploads.decode(content, 8).tobytes() == picture.tobytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_unreadable_images_name_the_file(tmp_path, suffix):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = saved(tmp_path / f"whole.{suffix}", noise).read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 100):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[:kept])
        with one_line(f"cut.{suffix}"):
            load_image(path, 16)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        load_image(tmp_path / "gone.png", 16)


def test_unreadable_images_and_those_that_kill_workers_are_skipped(tmp_path, monkeypatch, logged):
    for i in range(80):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("no image")
    paths, bad, limits = find_images(tmp_path), (3, 30, 50), resource.getrlimit(resource.RLIMIT_NOFILE)
    paths[30].write_bytes(b"damaged")
    parent = os.getpid()

    def reading(path, size):
        if os.getpid() != parent and path in (paths[3], paths[50]):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_image(path, size)

    monkeypatch.setattr(images_module, "load_image", reading)
    monkeypatch.setattr(images_module, "_BATCH", 1)
    open_files = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 50, limits[1]))  # so no batch may keep one
    try:
        assert load_images(paths, 4, workers=2)[:, 0, 0, 0].tolist() == [i for i in range(80) if i not in bad]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert f"reading {paths[3]}; new workers continue without it" in logged.messages[0]
    assert "skipped 3 files (unreadable image)" in logged.messages[-1]
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        load_images(paths[30:31], 4)
    for place, error in (("notes.txt", ValueError), ("nowhere", FileNotFoundError)):
        with pytest.raises(error, match=place):
            find_images(tmp_path / place)
