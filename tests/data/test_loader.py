"""The loader: pictures to pixels, samples that depend on their key alone, and the order they come in."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.loader import GeneratedDataset, TextImageDataset, load_picture
from data.order import EpochBatches, epoch_order, random_bits
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 24


class Letters:
    """A token for each character, so that a test can read a row back."""

    vocab_size = 256

    def __init__(self):
        self.seen = []

    def tokenize(self, texts, context_length, truncate_text):
        self.seen += texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts):
            if len(text) > context_length and not truncate_text:
                raise ValueError(f'"{text}" is {len(text)} tokens long, the limit is {context_length}')
            text = text[:context_length]
            row[: len(text)] = torch.tensor([ord(letter) for letter in text])
        return rows


def read(row):
    return "".join(map(chr, row.tolist())).rstrip("\0")


def make_set(folder, count=6, captions=3, size=(20, 16)):
    """Pictures of one colour each, (10 i, 0, 0), with captions "picture i, way k"."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i, 0, 0)).save(folder / f"{i:03d}.png")
        lines = [f"picture {i}, way {k}" for k in range(captions)]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines))
    return folder


def dataset_of(folder, **options):
    options = {"text_seq_len": LENGTH, "image_size": 8, **options}
    return TextImageDataset(folder, Letters(), **options)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def told():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("minidalle").addHandler(handler)
    yield records
    logging.getLogger("minidalle").removeHandler(handler)


# --- one picture ------------------------------------------------------------------------------------------------------


def test_the_middle_square_is_cut(tmp_path):
    rows = np.arange(3 * 6 * 3, dtype=np.uint8).reshape(3, 6, 3)
    wide = saved(tmp_path / "wide.png", rows)
    assert np.array_equal(load_picture(wide, 3), rows[:, 1:4])  # (6 - 3) // 2 = 1
    tall = saved(tmp_path / "tall.png", rows.transpose(1, 0, 2).copy())
    assert np.array_equal(load_picture(tall, 3), rows.transpose(1, 0, 2)[1:4])


def test_resizing_is_bilinear_with_antialiasing(tmp_path):
    """Halving with a triangle filter of support 2: weights 1/8, 3/8, 3/8, 1/8, renormalised at the edge."""
    line = np.array([0, 80, 160, 240], dtype=np.uint8)
    path = saved(tmp_path / "ramp.png", np.repeat(np.tile(line, (4, 1))[..., None], 3, axis=2))
    left = (3 * 0 + 3 * 80 + 1 * 160) / 7
    right = (1 * 80 + 3 * 160 + 3 * 240) / 7
    expected = np.tile(np.array([left, right]), (2, 1))
    assert np.abs(load_picture(path, 2)[..., 1] - expected).max() <= 1


def test_pixels_outside_the_square_do_not_bleed_in(tmp_path):
    pixels = np.full((8, 16, 3), 255, dtype=np.uint8)
    pixels[:, 4:12] = 0
    path = saved(tmp_path / "frame.png", pixels)
    assert load_picture(path, 2).max() == 0


def test_small_pictures_are_enlarged(tmp_path):
    path = saved(tmp_path / "dot.png", np.full((1, 1, 3), 77, dtype=np.uint8))
    assert np.array_equal(load_picture(path, 5), np.full((5, 5, 3), 77))


# EXIF orientation: where the stored first row and first column lie in the upright picture (EXIF 2.3, table 6).
STORED_FROM_UPRIGHT = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED_FROM_UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    upright = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_FROM_UPRIGHT[orientation](upright))
    path = saved(tmp_path / "turned.png", stored, exif=exif)
    assert np.array_equal(load_picture(path, 4), upright[:, 1:5])


def test_exif_orientation_of_a_jpeg(tmp_path):
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 16))  # stored: the upper half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored first row is the upright right side
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = load_picture(tmp_path / "a.jpg", 32)
    assert upright[:, 20:].max() < 30 and upright[:, :12].min() > 225


def test_a_damaged_exif_block_costs_nothing_but_the_orientation(tmp_path):
    Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "a.jpg", exif=b"Exif\0\0XX broken", quality=95)
    assert abs(int(load_picture(tmp_path / "a.jpg", 8)[0, 0, 0]) - 200) < 5


def flat(path):
    """The one colour of a picture."""
    pixels = load_picture(path, 4)
    assert pixels.shape == (4, 4, 3) and pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(value) for value in pixels[0, 0])


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 93, (93, 93, 93)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 255, 51), (204, 224, 255)),  # 51/255 = 0.2 of the colour, 0.8 of white
    ],
)
def test_png_modes(tmp_path, mode, color, expected):
    Image.new(mode, (6, 4), color).save(tmp_path / "a.png")
    assert flat(tmp_path / "a.png") == expected


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image = image.resize((8, 4), Image.Resampling.NEAREST)
    image.save(tmp_path / "solid.png")
    assert load_picture(tmp_path / "solid.png", 4)[0].tolist() == [[10, 20, 30]] * 2 + [[200, 100, 50]] * 2
    image.save(tmp_path / "clear.png", transparency=1)
    assert load_picture(tmp_path / "clear.png", 4)[0].tolist() == [[10, 20, 30]] * 2 + [[255, 255, 255]] * 2
    image.save(tmp_path / "half.png", transparency=bytes([0, 51]))  # an opacity for each palette entry
    expected = [[255, 255, 255]] * 2 + [[244, 224, 214]] * 2
    assert np.abs(load_picture(tmp_path / "half.png", 4)[0].astype(int) - expected).max() <= 1


def test_a_transparent_colour_of_grey_and_rgb(tmp_path):
    Image.new("L", (4, 4), 40).save(tmp_path / "grey.png", transparency=40)
    assert flat(tmp_path / "grey.png") == (255, 255, 255)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert flat(tmp_path / "rgb.png") == (255, 255, 255)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "other.png", transparency=(9, 9, 9))
    assert flat(tmp_path / "other.png") == (1, 2, 3)


@pytest.mark.parametrize("value, expected", [(0, 0), (257, 1), (300, 1), (32896, 128), (65535, 255)])
def test_sixteen_bits_are_scaled(tmp_path, value, expected):
    path = saved(tmp_path / "deep.png", np.full((4, 4), value, dtype=np.uint16))
    assert flat(path) == (expected,) * 3


def test_cmyk_and_grey_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = flat(tmp_path / "cmyk.jpg")
    assert red[0] > 250 and max(red[1:]) < 5
    Image.new("L", (16, 16), 120).save(tmp_path / "grey.jpg", quality=100)
    assert flat(tmp_path / "grey.jpg") == (120, 120, 120)


def test_bmp_and_files_under_a_wrong_suffix(tmp_path):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.bmp")
    assert flat(tmp_path / "a.bmp") == (9, 8, 7)
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.jpg", "WEBP", lossless=True)
    assert flat(tmp_path / "a.jpg") == (9, 8, 7)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_unreadable_pictures_name_the_file(tmp_path, suffix):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = saved(tmp_path / f"whole.{suffix}", noise).read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 100):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"cut.{suffix}") as error:
            load_picture(path, 16)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        load_picture(tmp_path / "gone.png", 16)


def test_flipped_bytes_are_pixels_or_a_value_error(tmp_path):
    random = np.random.RandomState(1)
    noise = random.randint(0, 256, (24, 24, 3)).astype(np.uint8)
    refused = 0
    for suffix in ("png", "jpg"):
        whole = np.frombuffer(saved(tmp_path / f"whole.{suffix}", noise).read_bytes(), dtype=np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = random.randint(0, min(len(whole), 200), 4)
            damaged[places] = random.randint(0, 256, 4)
            (tmp_path / f"x.{suffix}").write_bytes(damaged.tobytes())
            try:
                assert load_picture(tmp_path / f"x.{suffix}", 8).shape == (8, 8, 3)
            except ValueError as error:
                refused += 1
                assert f"x.{suffix}" in str(error)
    assert refused > 20


def test_real_photographs_equal_a_plain_crop_and_resize(shared_data):
    for path in sorted((shared_data / "coco_by_bysa" / "val2017").glob("*.jpg"))[:5]:
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        middle = Image.fromarray(np.asarray(image)[top : top + side, left : left + side])
        assert np.array_equal(load_picture(path, 256), np.asarray(middle.resize((256, 256), Image.BILINEAR)))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample(tmp_path):
    dataset = dataset_of(make_set(tmp_path))
    assert len(dataset) == 6
    text, image = dataset[3]
    assert text.dtype == torch.int64 and text.shape == (LENGTH,)
    assert read(text) in {f"picture 3, way {k}" for k in range(3)}
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8) and image.is_contiguous()
    assert torch.allclose(image[0], torch.tensor(30 / 255)) and (image[1:] == 0).all()
    with pytest.raises(IndexError):
        dataset[6]
    assert len(list(dataset)) == 6


def test_byteio_gives_the_same_pixels_as_bytes(tmp_path):
    folder = make_set(tmp_path)
    as_bytes, as_floats = dataset_of(folder, byteio=True)[4][1], dataset_of(folder)[4][1]
    assert as_bytes.dtype == torch.uint8
    assert torch.equal(as_bytes.float() / 255, as_floats)


def test_every_caption_is_tokenized_once_and_comes_in_turn(tmp_path):
    tokenizer = Letters()
    dataset = TextImageDataset(make_set(tmp_path), tokenizer, text_seq_len=LENGTH, image_size=8)
    assert sorted(tokenizer.seen) == sorted(f"picture {i}, way {k}" for i in range(6) for k in range(3))
    drawn = [[read(dataset[(epoch, i)][0]) for i in range(6)] for epoch in range(60)]
    assert len(tokenizer.seen) == 18
    for i in range(6):
        counts = {k: sum(row[i] == f"picture {i}, way {k}" for row in drawn) for k in range(3)}
        assert sum(counts.values()) == 60 and min(counts.values()) >= 8  # 20 expected, deviation 3.7


def test_draws_depend_on_seed_epoch_and_index_alone(tmp_path):
    folder = make_set(tmp_path)

    def draws(seed, epoch, order=range(6)):
        dataset = dataset_of(folder, seed=seed)
        rows = {i: read(dataset[(epoch, i)][0]) for i in order}
        return [rows[i] for i in range(6)]

    torch.manual_seed(1)
    first = [draws(1, epoch) for epoch in range(5)]
    torch.manual_seed(2)
    np.random.seed(3)
    assert [draws(1, epoch, reversed(range(6))) for epoch in range(5)] == first
    assert len({tuple(row) for row in first}) > 1
    assert [draws(2, epoch) for epoch in range(5)] != first


def test_draws_are_these_on_every_machine(tmp_path):
    """Written down once: a change here would break the exact resume of runs that are under way."""
    dataset = dataset_of(make_set(tmp_path), seed=42)
    ways = [[int(read(dataset[(epoch, i)][0])[-1]) for i in range(6)] for epoch in range(3)]
    assert ways == [[0, 1, 0, 0, 0, 1], [0, 1, 2, 0, 2, 0], [2, 2, 0, 0, 1, 0]]
    assert epoch_order(8, 42, 0).tolist() == [3, 4, 5, 2, 7, 0, 1, 6]
    assert random_bits(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from seed 0, as published


def test_caption_dropout(tmp_path):
    folder = make_set(tmp_path)
    plain, dropping = dataset_of(folder), dataset_of(folder, caption_dropout=0.25)
    empty = 0
    for epoch in range(200):
        for i in range(6):
            text = dropping[(epoch, i)][0]
            empty += not text.any()
            assert not text.any() or torch.equal(text, plain[(epoch, i)][0])  # the draws beside it stay the same
    assert 240 <= empty <= 360  # 300 expected, deviation 15
    assert not any(dataset_of(folder, caption_dropout=1.0)[i][0].any() for i in range(6))


def test_an_overlong_caption_names_its_file(tmp_path):
    folder = make_set(tmp_path)
    (folder / "004.txt").write_text("short\n" + "long " * 10)
    with pytest.raises(ValueError, match="004.txt.*tokens long") as error:
        dataset_of(folder)
    assert "\n" not in str(error.value)
    rows = {read(dataset_of(folder, truncate_captions=True)[(epoch, 4)][0]) for epoch in range(20)}
    assert rows == {"short", ("long " * 10)[:LENGTH]}


def test_captions_of_full_length_and_of_no_token(tmp_path):
    folder = make_set(tmp_path, count=3, captions=1)
    (folder / "000.txt").write_text("x" * LENGTH)
    (folder / "001.txt").write_text("\0")  # a caption that the tokenizer makes nothing of
    dataset = dataset_of(folder)
    assert [read(dataset[i][0]) for i in range(3)] == ["x" * LENGTH, "", "picture 2, way 0"]


def test_with_the_real_tokenizer_and_batches_of_captions(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader._TOKENIZE_AT_ONCE", 4)
    tokenizer = load_tokenizer()
    dataset = TextImageDataset(make_set(tmp_path), tokenizer, image_size=8)
    for i in range(6):
        text = dataset[i][0]
        assert text.shape == (80,)
        options = tokenizer.tokenize([f"picture {i}, way {k}" for k in range(3)], 80)
        assert any(torch.equal(text, row) for row in options)


def test_scan_faults_are_reported_and_kept(tmp_path, told):
    folder = make_set(tmp_path)
    (folder / "002.png").write_bytes(b"")
    dataset = dataset_of(folder)
    assert len(dataset) == 5
    assert dataset.skipped["zero-byte picture"] == [folder / "002.png"]
    assert sum("002.png" in record.getMessage() for record in told) == 1


def test_a_picture_that_goes_bad_is_replaced_counted_and_told_once(tmp_path, told):
    folder = make_set(tmp_path)
    dataset = dataset_of(folder)
    whole = (folder / "005.png").read_bytes()
    (folder / "005.png").write_bytes(whole[:60])
    (folder / "000.png").unlink()
    for _ in range(3):
        text, image = dataset[(7, 5)]
        assert read(text).startswith("picture 1,") and torch.allclose(image[0], torch.tensor(10 / 255))
    assert torch.equal(text, dataset[(7, 1)][0])
    assert dataset.skipped == {"unreadable picture": [folder / "000.png", folder / "005.png"]}
    assert len(told) == 2 and "005.png" in told[0].getMessage() and "000.png" in told[1].getMessage()


def test_many_pictures_that_go_bad_do_not_fill_the_log(tmp_path, told):
    folder = make_set(tmp_path, count=40, captions=1)
    dataset = dataset_of(folder)
    for path in sorted(folder.glob("*.png"))[:-1]:
        path.unlink()
    assert read(dataset[0][0]) == "picture 39, way 0"
    assert len(dataset.skipped["unreadable picture"]) == 39
    assert len(told) == 20 and "only be counted" in told[-1].getMessage()


def test_when_no_picture_is_left_it_ends(tmp_path):
    folder = make_set(tmp_path)
    dataset = dataset_of(folder)
    for path in folder.glob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(ValueError, match="none of its 6 pictures can be read") as error:
        dataset[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_give_the_same_samples_and_share_the_count(tmp_path, method):
    folder = make_set(tmp_path, count=8)
    dataset = TextImageDataset(folder, load_tokenizer(), image_size=8, byteio=True, caption_dropout=0.2)
    (folder / "003.png").unlink()
    batches = EpochBatches(len(dataset), 2, seed=5)
    here = list(DataLoader(dataset, batch_sampler=batches))
    dataset._unreadable.zero_()
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    for _ in range(2):
        for (text, image), (other_text, other_image) in zip(here, loader):
            assert torch.equal(text, other_text) and torch.equal(image, other_image)
    assert dataset.skipped == {"unreadable picture": [folder / "003.png"]}
    batches.set_epoch(1)  # persistent workers learn of the epoch from the keys
    later = list(loader)
    assert all(
        torch.equal(text, other) for (text, _), (other, _) in zip(DataLoader(dataset, batch_sampler=batches), later)
    )
    assert not all(torch.equal(text, other) for (text, _), (other, _) in zip(here, later))


def test_a_dataset_can_be_pickled(tmp_path):
    dataset = dataset_of(make_set(tmp_path), seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(dataset[(2, 1)], copy[(2, 1)]))


def test_samples_do_not_depend_on_the_process(tmp_path):
    folder = make_set(tmp_path)
    program = (
        "import sys; from data.loader import *; from data.order import *; from data.tokenizer import load_tokenizer\n"
        "d = TextImageDataset(sys.argv[1], load_tokenizer(), image_size=8)\n"
        "b = EpochBatches(len(d), 2, epoch=3)\n"
        "print([(k, d[k][0].tolist(), d[k][1].sum().item()) for batch in b for k in batch])"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, str(folder)]
        outputs.add(subprocess.run(command, env=environment, capture_output=True, check=True, cwd=ROOT).stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


# --- codes ------------------------------------------------------------------------------------------------------------


def test_codes_take_the_place_of_pixels(tmp_path):
    folder = make_set(tmp_path)
    codes = np.arange(24, dtype=np.uint16).reshape(6, 4) + 65000
    dataset = dataset_of(folder, codes=codes)
    plain = dataset_of(folder)
    for i in range(6):
        text, image = dataset[(1, i)]
        assert image.dtype == torch.int64 and image.tolist() == codes[i].tolist()
        assert torch.equal(text, plain[(1, i)][0])


def test_pictures_that_could_not_be_encoded_leave(tmp_path, told):
    folder = make_set(tmp_path)
    dataset = dataset_of(folder)
    codes = np.arange(6, dtype=np.uint16).reshape(6, 1)
    dataset.attach_codes(codes, bad={folder / "000.png": "truncated", folder / "004.png": "gone"})
    assert [path.name for path in dataset.pictures] == ["001.png", "002.png", "003.png", "005.png"]
    assert [read(dataset[i][0])[:9] for i in range(4)] == [f"picture {i}" for i in (1, 2, 3, 5)]
    assert [dataset[i][1].item() for i in range(4)] == [1, 2, 3, 5]
    assert dataset.skipped == {"unreadable picture": [folder / "000.png", folder / "004.png"]}
    assert len(told) == 1 and "2 files" in told[0].getMessage()


def test_codes_that_do_not_fit_are_refused(tmp_path):
    dataset = dataset_of(make_set(tmp_path))
    with pytest.raises(ValueError, match=r"\(5, 4\).*6 pictures"):
        dataset.attach_codes(np.zeros((5, 4), dtype=np.uint16))
    with pytest.raises(ValueError, match="none of its 6 pictures could be encoded"):
        dataset.attach_codes(np.zeros((6, 4), dtype=np.uint16), bad=dict.fromkeys(dataset.pictures, "bad"))


# --- generated data ---------------------------------------------------------------------------------------------------


def test_generated_pixels():
    options = {"text_seq_len": 12, "num_text_tokens": 50, "image_size": 6, "seed": 1}
    dataset = GeneratedDataset(40, **options)
    text, image = dataset[7]
    assert text.dtype == torch.int64 and text.shape == (12,)
    assert image.dtype == torch.float32 and image.shape == (3, 6, 6)
    assert all(torch.equal(a, b) for a, b in zip(dataset[7], GeneratedDataset(40, **options)[(9, 7)]))
    texts = torch.stack([dataset[i][0] for i in range(40)])
    assert texts.min() == 1 and texts.max() == 49 and len(texts.unique(dim=0)) == 40
    images = torch.stack([dataset[i][1] for i in range(40)])
    assert 0 <= images.min() < 0.01 and 0.99 < images.max() < 1
    assert not torch.equal(GeneratedDataset(40, **{**options, "seed": 2})[7][1], image)
    pixels = GeneratedDataset(40, **options, byteio=True)[3][1]
    assert pixels.dtype == torch.uint8 and pixels.max() > 200
    assert len(list(dataset)) == 40


def test_generated_codes():
    dataset = GeneratedDataset(9, text_seq_len=5, num_text_tokens=9, num_image_codes=16, image_seq_len=64)
    codes = torch.stack([dataset[i][1] for i in range(9)])
    assert codes.dtype == torch.int64 and codes.shape == (9, 64) and codes.unique().tolist() == list(range(16))
    with pytest.raises(ValueError, match="image_seq_len"):
        GeneratedDataset(9, text_seq_len=5, num_text_tokens=9, num_image_codes=16)


# --- the order --------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_and_each_epoch_another():
    orders = [epoch_order(1000, 42, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15  # deviation 0.03
    assert (orders[0] == orders[1]).sum() < 10 and (orders[1] == orders[2]).sum() < 10
    assert np.array_equal(epoch_order(1000, 42, 1), orders[1])
    assert (epoch_order(1000, 43, 0) == orders[0]).sum() < 10


def test_every_place_is_equally_likely():
    places = np.array([epoch_order(4, 7, epoch).tolist().index(0) for epoch in range(2000)])
    assert np.bincount(places, minlength=4).min() > 430  # 500 expected, deviation 19


def test_batches_carry_the_epoch_and_cover_it_once():
    batches = EpochBatches(10, 3, seed=1, epoch=4)
    keys = [key for batch in batches for key in batch]
    assert len(batches) == 3 and [len(batch) for batch in batches] == [3, 3, 3]
    assert {epoch for epoch, _ in keys} == {4} and len({index for _, index in keys}) == 9
    assert [index for _, index in keys] == epoch_order(10, 1, 4)[:9].tolist()
    in_order = [[index for _, index in batch] for batch in EpochBatches(7, 3, shuffle=False, drop_last=False)]
    assert in_order == [[0, 1, 2], [3, 4, 5], [6]]


def test_entering_anywhere_continues_the_same_order():
    whole = list(EpochBatches(50, 4, seed=9, epoch=2))
    for start in range(len(whole) + 1):
        entered = EpochBatches(50, 4, seed=9, epoch=2, start_batch=start)
        assert list(entered) == whole[start:] and len(entered) == len(whole) - start
        assert entered.batches_per_epoch == 12
    entered.set_epoch(3)
    assert list(entered) == list(EpochBatches(50, 4, seed=9, epoch=3))
    with pytest.raises(ValueError, match="13"):
        entered.set_epoch(3, start_batch=13)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num_samples", [37, 48, 9])
def test_processes_share_the_common_order(num_samples, drop_last):
    alone = list(EpochBatches(num_samples, 8, seed=2, epoch=1, drop_last=drop_last))
    shares = [
        list(EpochBatches(num_samples, 2, seed=2, epoch=1, drop_last=drop_last, rank=rank, world_size=4))
        for rank in range(4)
    ]
    keys = [key for share in shares for batch in share for key in batch]
    assert len(keys) == len(set(keys)) == (num_samples if not drop_last else num_samples // 8 * 8)
    for step, batch in enumerate(alone):
        together = [key for share in shares if step < len(share) for key in share[step]]
        assert together == batch
    for rank, share in enumerate(shares):
        batches = EpochBatches(num_samples, 2, drop_last=drop_last, rank=rank, world_size=4)
        assert len(batches) == batches.batches_per_epoch == len(share)


def test_a_set_smaller_than_a_step_is_refused():
    with pytest.raises(ValueError, match="64 samples = 32 × 2 processes, but the set has 26") as error:
        EpochBatches(26, 32, rank=0, world_size=2)
    assert "\n" not in str(error.value)
    assert [len(batch) for batch in EpochBatches(5, 8, drop_last=False)] == [5]
    with pytest.raises(ValueError, match="the set has 0"):
        EpochBatches(0, 8, drop_last=False)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochBatches(9, 1, rank=2, world_size=2)
