"""The check of a folder: it reports what training skips, no more and no less."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from data import check as checks
from data import files
from data.dataset import TextImageDataset
from data.tokenizer import load_tokenizer
from tests.builders import one_line, png_of
from tests.conftest import YTTM


@pytest.fixture
def noise():
    random = np.random.default_rng(0)
    pixels = lambda *shape: random.integers(0, 256, shape, dtype=np.uint8).squeeze()  # noqa: E731
    return lambda height=40, width=40, bands=3: Image.fromarray(pixels(height, width, bands))


@pytest.fixture
def every_fault(tmp_path, noise):
    """A folder with two sound pairs and one or two of everything that is skipped."""
    folder = tmp_path / "faults"
    folder.mkdir()

    captions = {"good_1": "a dog\na cat\n", "good_2": "two dogs", "blank": "\n \n", "boxes": "0 0.5 0.5 0.25 0.125\n"}
    captions.update(dict.fromkeys(("latin", "cut_1", "cut_2", "no_bytes", "web_page", "huge", "gone", "bare"), "a dog"))
    for stem, caption in captions.items():
        (folder / f"{stem}.txt").write_text(caption)
    (folder / "latin.txt").write_bytes("ein grünes Herz".encode("latin-1"))
    for name in ("good_1", "good_2", "blank", "boxes", "latin", "uncaptioned_1", "uncaptioned_2"):
        noise().save(folder / f"{name}.png")
    noise().save(folder / "good_1.bmp")  # the first of the name, which has the captions
    whole = (folder / "good_1.png").read_bytes()
    broken = {"cut_1": whole[: len(whole) // 2], "cut_2": whole[: len(whole) - 900], "no_bytes": b""}
    broken.update(web_page=b"<html>not here</html>", huge=png_of(60000, 60000))
    for stem, content in broken.items():
        (folder / f"{stem}.png").write_bytes(content)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    return folder


REASONS = {
    "image without caption": "blank.png boxes.png latin.png uncaptioned_1.png uncaptioned_2.png",
    "caption without image": "bare.txt gone.txt huge.txt no_bytes.txt web_page.txt",
    "image whose caption file belongs to another image": "good_1.png",
    "label file": "boxes.txt",
    "empty caption": "blank.txt",
    "neither UTF-8 nor UTF-16": "latin.txt",
    "zero-byte image": "no_bytes.png",
    "not an image": "web_page.png",
    "image over PIL's pixel limit": "huge.png",
    "cannot be opened": "gone.png",
    "unreadable image": "cut_1.png cut_2.png",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_it_finds_what_training_skips(every_fault, workers, logged):
    tokenizer = load_tokenizer(YTTM)
    report = checks.check(every_fault, tokenizer, text_seq_len=16, image_size=32, workers=workers)
    dataset = TextImageDataset(every_fault, tokenizer, text_seq_len=16, image_size=32)
    for index in range(len(dataset)):
        dataset[index]
    skipped = {reason: sorted(path.name for path in paths) for reason, paths in dataset.source.skipped.items()}
    unreadable = sorted(dataset.images[index][0] for index in dataset._flags.nonzero().flatten())
    expected = {reason: names.split() for reason, names in REASONS.items()}
    assert {**skipped, "unreadable image": unreadable} == expected
    found = {**report.faults, files.LABEL_FILE: report.notes[files.LABEL_FILE]}
    assert {kind: sorted(names) for kind, names in found.items()} == expected
    files.report_skipped(dataset.source.skipped)
    lines = logged.records[-len(skipped) :]
    levels = {re.search(r"skipped \d+ files? \((.*?)\): .", line.getMessage())[1]: line.levelname for line in lines}
    assert levels.keys() == skipped.keys()
    assert levels["label file"] == "INFO" and levels["zero-byte image"] == "WARNING"
    with one_line("huge.png"):
        files.open_image(every_fault / "huge.png")
    assert report.pairs == len(dataset) - dataset.lost == 2 and len(report.counts.lengths) == 3


def test_what_is_worth_knowing(tmp_path, noise):
    pictures = {"small": noise(20, 60), "wide": noise(40, 121), "grey": noise(bands=1), "plain": noise()}
    pictures["one_colour"] = Image.new("RGB", (40, 40), "teal")
    for stem, picture in pictures.items():
        picture.save(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text(f"a {stem.replace('_', ' ')} picture")
    shutil.copy(tmp_path / "plain.png", tmp_path / "same.png")
    (tmp_path / "same.txt").write_text("something else\na plain picture")
    report = checks.check(tmp_path, load_tokenizer(YTTM), text_seq_len=80, image_size=32)
    assert not any(report.faults.values())
    assert {kind: names for kind, names in report.notes.items() if names} == {
        checks.SMALL.format(32): ["small.png"],
        checks.LONG: ["wide.png"],  # 121 × 40, but not 60 × 20
        checks.ONE_COLOR: ["one_colour.png"],
        checks.SAME_IMAGE: ["same.png as plain.png"],
    }


def test_the_command(every_fault, tmp_path, drawn_pictures, tiny_vqgan, command):
    small = ["--bpe-path", YTTM, "--image-size", 32, "--text-seq-len", 16, "--workers", 0]
    before = sorted(every_fault.rglob("*"))
    faulty = command(checks.main, every_fault, *small, "--all")
    assert faulty.status == 1 and faulty.err == ""
    assert "2 × unreadable image: cut_1.png, cut_2.png\n" in faulty.out
    assert "uncaptioned_1.png, uncaptioned_2.png" in faulty.out
    assert faulty.out.splitlines()[-1] == "training would skip or refuse 19 of these files"
    assert sorted(every_fault.rglob("*")) == before
    clean = command(checks.main, drawn_pictures, *small)
    assert clean.status == 0 and clean.out.splitlines()[-1] == "nothing would be skipped", clean
    assert "12 usable images with 24 captions" in clean.out
    # With the vocabulary, caption length and image size of a configuration.
    demo = command(checks.main, "--config", "demo", drawn_pictures, "--image-size", 32, "--workers", 0)
    assert demo.status == 0 and "0.000% are unknown" in demo.out
    small = command(checks.main, "--config", "vqgan_demo", drawn_pictures, "--workers", 0)
    assert "12 × image with fewer than 64 pixels per side" in small.out
    for config in {"vae_path": tiny_vqgan}, {"vae_path": tiny_vqgan / "vqgan.ckpt"}:
        assert checks.image_size_of(config) == 32
    assert checks.image_size_of({"vae_path": tmp_path / "not_yet_trained"}) == 256
    (tmp_path / "empty").mkdir()
    wrong = [[], ["chekc", drawn_pictures], [tmp_path / "nowhere"], [tmp_path / "empty"], ["--config", "nowhere"]]
    wrong += [[drawn_pictures, *flags] for flags in (["--bpe-path", tmp_path / "nowhere"], ["--text-seq-len", "0"])]
    for words in wrong:
        status = 1 if words == [tmp_path / "empty"] else 2
        ended = command(checks.main, *words)
        assert ended.status == status and len(ended.err.splitlines()) == 1, (words, ended)
        assert ended.err.startswith("python -m data.check: error: ")
