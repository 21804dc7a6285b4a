"""Pairing: what is found, in which order, what is skipped and why."""

import contextlib
import os

from PIL import Image

from data.files import IMAGE_FORMATS, list_files, read_captions
from data.images import load_image
from data.sources import folder as folders
from data.sources import open_source
from data.sources.folder import is_label_file
from tests.builders import one_line

IMAGES = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "bmp": "bmp", "webp": "webp", "gif": "gif", "tif": "tiff"}
IMAGES.update(tiff="tiff", avif="avif")


def fill(folder, names, content=b"a caption\n"):
    """Write a small image or a caption file under each of these names."""
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = IMAGES.get(path.suffix[1:].lower())
        if kind:
            Image.new("RGB", (8, 8), "teal").save(path, kind)
        else:
            path.write_bytes(content)


def names(folder, pairs):
    for name, size, mtime in (file for pair in pairs for file in pair):
        status = (folder / name).stat()
        assert (size, mtime) == (status.st_size, status.st_mtime_ns)
    return [(image[0], caption[0]) for image, caption in pairs]


def find_pairs(folder):
    return folders.find_pairs(folder, lambda file: False, list_files(folder, {}))


def by_reason(skipped):
    return {reason: [path.name for path in paths] for reason, paths in skipped.items()}


def test_every_image_suffix_counts_in_any_case(tmp_path):
    images = "a.png b.JPG c.jpeg d.BmP e.webp f.gif g.TIFF h.tif" + (" i.avif" if "AVIF" in IMAGE_FORMATS else "")
    fill(tmp_path, f"{images} notes.md " + " ".join(f"{image[0]}.TXT" for image in images.split()))
    pairs, skipped = find_pairs(tmp_path)
    assert [image[0] for image, _ in pairs] == images.split()
    assert skipped == {} and list(open_source(tmp_path).others) == ["notes.md"]
    assert len({load_image(tmp_path / image[0], 8).shape for image, _ in pairs}) == 1


def test_names_of_other_programs_pair(tmp_path):
    fill(tmp_path, "cafe\u0301.jpg b.jpg images/c.jpg d.jpg d.gif e.jpg e.png f.jpg")
    fill(tmp_path, "caf\u00e9.txt b.jpg.txt captions/c.jpg.txt d.txt e.png.txt e.jpg.txt e.txt f.caption b.caption")
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
    assert by_reason(skipped) == {
        "image whose caption file belongs to another image": ["d.gif"],
        "caption without image": ["b.jpg.txt", "e.jpg.txt"],
    }


def test_utf_16_is_read_with_and_without_a_byte_order_mark(tmp_path):
    for number, encoding in enumerate(("utf-16", "utf-16-le", "utf-16-be", "utf-8-sig")):
        fill(tmp_path, f"{number}.png {number}.txt", "a red bus\ntwo caf\u00e9s\n".encode(encoding))
    fill(tmp_path, "zeros.png zeros.txt", b"a dog\0\0\0\0\0\0\0")
    fill(tmp_path, "zero.png zero.txt", b"a small cat\0")  # it would be Chinese in UTF-16
    pairs, skipped = find_pairs(tmp_path)
    assert [read_captions(tmp_path / caption[0]) for _, caption in pairs] == [["a red bus", "two caf\u00e9s"]] * 4
    assert skipped["neither UTF-8 nor UTF-16"] == [tmp_path / "zero.txt", tmp_path / "zeros.txt"]


def test_the_nearest_path_of_the_same_stem_pairs(tmp_path):
    fill(tmp_path, "one/pictures/x.png one/words/x.txt two/pictures/x.png two/words/x.txt")
    fill(tmp_path, "images/val/y.png captions/train/y.txt captions/val/y.txt")  # the trailing folders decide
    fill(tmp_path, "z.png m/z.txt k/z.txt")  # nothing tells these two apart: sorted order
    fill(tmp_path, "a/1.png b/pictures/1.png b/words/1.txt")  # a better match is not lost to an earlier image
    pairs, skipped = find_pairs(tmp_path)
    expected = "b/pictures/1.png b/words/1.txt images/val/y.png captions/val/y.txt one/pictures/x.png one/words/x.txt"
    expected += " two/pictures/x.png two/words/x.txt z.png k/z.txt"
    assert sum(names(tmp_path, pairs), ()) == tuple(expected.split())
    assert by_reason(skipped) == {
        "image whose caption file belongs to another image": ["1.png"],
        "caption without image": ["y.txt", "z.txt"],
    }


def test_label_files_are_known_by_content():
    box = "0 0.5 0.5 0.1 0.1"
    assert is_label_file([box]) and is_label_file([box, "79 1 1 0 1e-3"])
    for lines in ([box, "a dog"], ["2 dogs and 3 cats on 1 sofa"], ["0 0.5 0.5 0.1"], []):
        assert not is_label_file(lines)


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    fill(tmp_path, "set/real/1.png set/real/1.txt elsewhere/2.png elsewhere/2.txt")
    links = {"a-second-name": "set/real", "real/up": "set", "far": "elsewhere", "self": "set/self"}
    for name, goal in links.items():
        (tmp_path / "set" / name).symlink_to(tmp_path / goal)
    pairs, skipped = find_pairs(tmp_path / "set")
    assert names(tmp_path / "set", pairs) == [("far/2.png", "far/2.txt"), ("real/1.png", "real/1.txt")]
    assert skipped == {}


def test_order_depends_on_names_alone(tmp_path, monkeypatch):
    for folder in ("b", "a", "a-b", "C"):
        for stem in ("10", "9", "x"):
            fill(tmp_path, f"{folder}/{stem}.png words/{folder}/{stem}.txt")
    here = names(tmp_path, find_pairs(tmp_path)[0])
    assert here == sorted(here) and len(here) == 12
    assert all(caption == f"words/{image[:-4]}.txt" for image, caption in here)
    scandir = os.scandir

    @contextlib.contextmanager
    def backwards(path):
        with scandir(path) as listing:
            yield iter(sorted(listing, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    assert names(tmp_path, find_pairs(tmp_path)[0]) == here


def test_a_folder_without_a_pair_says_what_is_there_and_what_is_needed(tmp_path):
    for files, words in (
        ("", ["0 images and 0 .txt files"]),
        ("1.png 2.png", ["2 images", "0 .txt files", "2 × image without caption"]),
        ("1.txt", ["0 images", "1 .txt file in", "1 × caption without image"]),
        ("b.jpg a.txt b_caption.txt", ["2 images", "2 .txt files", "such as a.jpg and a.txt", "1 × zero-byte image"]),
    ):
        folder = tmp_path / f"set {files}"
        folder.mkdir()
        fill(folder, files)
        if "a.txt" in files:
            (folder / "a.jpg").touch()
        with one_line(str(folder)) as error:
            find_pairs(folder)
        assert all(word in str(error.value) for word in ("stem", *words)), error.value
