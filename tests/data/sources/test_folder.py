"""Pairing: what is found, in which order, what is skipped and why."""

import logging
import os

import pytest
from PIL import Image

from data.files import IMAGE_FORMATS, open_image, read_captions, report_skipped
from data.images import load_image
from data.sources import open_source
from data.sources.folder import find_pairs, is_label_file
from tests.builders import png_of

BOX = "0 0.5 0.5 0.25 0.125\n17 1 0.0 0.3 0.4\n"


def picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"jpg": "jpeg", "tif": "tiff"}
    suffix = path.suffix[1:].lower()
    Image.new("RGB", size, "teal").save(path, kinds.get(suffix, suffix))
    return path


def text(path, content="a caption\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def names(folder, pairs):
    for name, size, mtime in (file for pair in pairs for file in pair):
        status = (folder / name).stat()
        assert (size, mtime) == (status.st_size, status.st_mtime_ns)
    return [(picture[0], caption[0]) for picture, caption in pairs]


def test_every_image_suffix_counts_in_any_case(tmp_path):
    suffixes = ["png", "JPG", "jpeg", "BmP", "webp", "gif", "TIFF", "tif"]
    suffixes += ["avif"] if "AVIF" in IMAGE_FORMATS else []
    for suffix in suffixes:
        picture(tmp_path / f"{suffix}.{suffix}")
        text(tmp_path / f"{suffix}.TXT")
    (tmp_path / "notes.md").write_text("neither")
    pairs, skipped = find_pairs(str(tmp_path))
    assert {picture[0] for picture, _ in pairs} == {f"{suffix}.{suffix}" for suffix in suffixes}
    assert skipped == {} and list(open_source(tmp_path).others) == ["notes.md"]
    assert len({load_image(tmp_path / image[0], 8).shape for image, _ in pairs}) == 1


def test_names_of_other_programs_pair(tmp_path):
    for name in ("cafe\u0301.jpg", "b.jpg", "images/c.jpg", "d.jpg", "d.gif", "e.jpg", "e.png", "f.jpg"):
        picture(tmp_path / name)
    texts = "caf\u00e9.txt b.jpg.txt captions/c.jpg.txt d.txt e.png.txt e.jpg.txt e.txt f.caption b.caption"
    for name in texts.split():
        text(tmp_path / name)
    pairs, skipped = find_pairs(tmp_path)
    assert names(tmp_path, pairs) == [
        ("b.jpg", "b.caption"),
        ("cafe\u0301.jpg", "caf\u00e9.txt"),
        ("d.jpg", "d.txt"),  # not d.gif, which was no image in earlier versions
        ("e.jpg", "e.txt"),
        ("e.png", "e.png.txt"),
        ("f.jpg", "f.caption"),
        ("images/c.jpg", "captions/c.jpg.txt"),
    ]
    assert {reason: [path.name for path in paths] for reason, paths in skipped.items()} == {
        "image whose caption file belongs to another image": ["d.gif"],
        "caption without image": ["b.jpg.txt", "e.jpg.txt"],
    }


def test_utf_16_is_read_with_and_without_a_byte_order_mark(tmp_path):
    for number, encoding in enumerate(("utf-16", "utf-16-le", "utf-16-be", "utf-8-sig")):
        picture(tmp_path / f"{number}.png")
        text(tmp_path / f"{number}.txt", "a red bus\ntwo caf\u00e9s\n".encode(encoding))
    picture(tmp_path / "zeros.png")
    text(tmp_path / "zeros.txt", b"a dog\0\0\0\0\0\0\0")
    pairs, skipped = find_pairs(tmp_path)
    assert [read_captions(tmp_path / caption[0]) for _, caption in pairs] == [["a red bus", "two caf\u00e9s"]] * 4
    assert skipped["neither UTF-8 nor UTF-16"] == [tmp_path / "zeros.txt"]


def test_otherwise_the_nearest_by_path(tmp_path):
    picture(tmp_path / "one" / "pictures" / "x.png")
    picture(tmp_path / "two" / "pictures" / "x.png")
    text(tmp_path / "one" / "words" / "x.txt")
    text(tmp_path / "two" / "words" / "x.txt")
    picture(tmp_path / "images" / "val" / "y.png")  # same leading folders for both captions: the trailing ones tell
    text(tmp_path / "captions" / "train" / "y.txt")
    text(tmp_path / "captions" / "val" / "y.txt")
    picture(tmp_path / "z.png")
    text(tmp_path / "m" / "z.txt")  # nothing tells these two apart: sorted order
    text(tmp_path / "k" / "z.txt")
    pairs, skipped = find_pairs(tmp_path)
    assert names(tmp_path, pairs) == [
        ("images/val/y.png", "captions/val/y.txt"),
        ("one/pictures/x.png", "one/words/x.txt"),
        ("two/pictures/x.png", "two/words/x.txt"),
        ("z.png", "k/z.txt"),
    ]
    assert sorted(skipped) == ["caption without image"]


def test_a_better_match_is_not_lost_to_an_earlier_image(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "pictures" / "1.png")
    text(tmp_path / "b" / "words" / "1.txt")
    pairs, skipped = find_pairs(tmp_path)
    assert names(tmp_path, pairs) == [("b/pictures/1.png", "b/words/1.txt")]
    assert skipped == {"image whose caption file belongs to another image": [tmp_path / "a" / "1.png"]}


@pytest.mark.parametrize(
    "lines, label",
    [
        (["0 0.5 0.5 0.1 0.1"], True),
        (["0 0.5 0.5 0.1 0.1", "79 1 1 0 1e-3"], True),
        (["0 0.5 0.5 0.1 0.1", "a dog"], False),
        (["2 dogs and 3 cats on 1 sofa"], False),
        (["0 0.5 0.5 0.1"], False),
        ([], False),
    ],
)
def test_label_files_are_known_by_content(lines, label):
    assert is_label_file(lines) is label


def test_every_reason_is_counted_once(tmp_path, logged):
    picture(tmp_path / "good.png")
    text(tmp_path / "good.txt")
    picture(tmp_path / "lonely.png")
    text(tmp_path / "orphan.txt")
    picture(tmp_path / "boxes.png")
    text(tmp_path / "boxes.txt", BOX)
    picture(tmp_path / "blank.png")
    text(tmp_path / "blank.txt", b"\xef\xbb\xbf \r\n\t\n")
    picture(tmp_path / "latin.png")
    text(tmp_path / "latin.txt", "un café".encode("latin-1"))
    text(tmp_path / "zero.jpg", b"")
    text(tmp_path / "zero.txt")
    text(tmp_path / "page.jpg", b"<html>404</html>")
    text(tmp_path / "page.txt")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    text(tmp_path / "dangling.txt")
    pairs, skipped = find_pairs(tmp_path)
    assert names(tmp_path, pairs) == [("good.png", "good.txt")]
    assert {reason: [path.name for path in paths] for reason, paths in skipped.items()} == {
        "image without caption": ["blank.png", "boxes.png", "latin.png", "lonely.png"],
        "caption without image": ["dangling.txt", "orphan.txt", "page.txt", "zero.txt"],
        "label file": ["boxes.txt"],
        "empty caption": ["blank.txt"],
        "neither UTF-8 nor UTF-16": ["latin.txt"],
        "zero-byte image": ["zero.jpg"],
        "not an image": ["page.jpg"],
        "cannot be opened": ["dangling.png"],
    }
    report_skipped(skipped)
    lines = logged.messages
    assert len(lines) == len(skipped)
    assert "blank.png" in next(line for line in lines if "skipped 4 files (image without caption)" in line)
    levels = {record.getMessage().split("(")[1].split(")")[0]: record.levelno for record in logged.records}
    assert levels["label file"] == logging.INFO
    assert levels["zero-byte image"] == logging.WARNING


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    picture(tmp_path / "set" / "real" / "1.png")
    text(tmp_path / "set" / "real" / "1.txt")
    picture(tmp_path / "elsewhere" / "2.png")
    text(tmp_path / "elsewhere" / "2.txt")
    (tmp_path / "set" / "a-second-name").symlink_to(tmp_path / "set" / "real")
    (tmp_path / "set" / "real" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set" / "self")
    pairs, skipped = find_pairs(tmp_path / "set")
    assert names(tmp_path / "set", pairs) == [("far/2.png", "far/2.txt"), ("real/1.png", "real/1.txt")]
    assert skipped == {}


def test_order_depends_on_names_alone(tmp_path, monkeypatch):
    for folder in ("b", "a", "a-b", "C"):
        for stem in ("10", "9", "x"):
            picture(tmp_path / folder / f"{stem}.png")
            text(tmp_path / "words" / folder / f"{stem}.txt")
    here = names(tmp_path, find_pairs(tmp_path)[0])
    assert here == sorted(here) and len(here) == 12
    assert all(caption == f"words/{image[:-4]}.txt" for image, caption in here)

    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.listing = scandir(path)

        def __enter__(self):
            return iter(sorted(self.listing, key=lambda entry: entry.name, reverse=True))

        def __exit__(self, *_):
            self.listing.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert names(tmp_path, find_pairs(tmp_path)[0]) == here


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_over_pils_limit_are_skipped(tmp_path):
    (tmp_path / "big.png").write_bytes(png_of(30_000, 30_000))
    text(tmp_path / "big.txt")
    picture(tmp_path / "good.png")
    text(tmp_path / "good.txt")
    _, skipped = find_pairs(tmp_path)
    assert skipped["image over PIL's pixel limit"] == [tmp_path / "big.png"]
    with pytest.raises(ValueError, match="big.png"):
        open_image(tmp_path / "big.png")


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "images, texts, words",
    [
        ([], [], ["0 images and 0 .txt files"]),
        (["1.png", "2.png"], [], ["2 images", "0 .txt files", "2 × image without caption"]),
        ([], ["1.txt"], ["0 images", "1 .txt file in", "1 × caption without image"]),
        (["a.jpg", "b.jpg"], ["a.txt", "b_caption.txt"], ["2 images", "2 .txt files", "such as a.jpg and a.txt"]),
    ],
)
def test_a_folder_without_a_pair_says_what_is_there_and_what_is_needed(tmp_path, images, texts, words):
    for name in images:
        text(tmp_path / name, b"") if name == "a.jpg" else picture(tmp_path / name)
    for name in texts:
        text(tmp_path / name)
    with pytest.raises(ValueError) as error:
        find_pairs(tmp_path)
    message = one_line(error)
    assert all(word in message for word in (str(tmp_path), "stem", *words)), message
    if "a.jpg" in images:
        assert "1 × zero-byte image, " in message or "1 × zero-byte image)" in message
