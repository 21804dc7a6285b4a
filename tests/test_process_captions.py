"""process_captions.py from its command line: COCO's captions file to one text file per image."""

import json
import re

from process_captions import write_caption_files
from tests.builders import one_line, python


def test_captions_stay_as_they_are_but_for_white_space(tmp_path):
    pairs = [
        (9, "bike . A dog"),
        (139, " A man\nfiring a .22 \r\n\r\n at  5 .\t"),
        (9, "Caf\u00e9 \u201cna\u00efve\u201d \u65e5\u672c\u8a9e \U0001f436 ."),
        (9, " \n\t "),
        (123456789012345, "wide\u3000and\u2028odd\u00a0spaces\x0bhere"),
        (9, 'back\\slash | pipe, "quotes" & <b>'),
        (0, "\u2026"),
        (7, None),
        ("x", "An id that is no number"),
    ]
    images = {139: "val2014/COCO_val2014_000000000139.jpg", "x": "x.y.png"}
    content = {"images": [{"id": key, "file_name": name} for key, name in images.items()]}
    content["annotations"] = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(pairs)]
    source, out = tmp_path / "captions.json", tmp_path / "a" / "b"
    source.write_text(json.dumps(content), encoding="utf-8-sig")  # with the byte order mark of some editors
    # A machine whose own encoding is not UTF-8 must not make a difference.
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    done = python("process_captions.py", "--captions", source, "--out-dir", out, env=env, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == "", done.stderr  # no progress bar where nobody looks
    assert {path.name: path.read_bytes().decode("utf-8") for path in out.iterdir()} == {
        "000000000000.txt": "\u2026\n",
        "000000000009.txt": "bike . A dog\nCaf\u00e9 \u201cna\u00efve\u201d \u65e5\u672c\u8a9e \U0001f436 .\n"
        'back\\slash | pipe, "quotes" & <b>\n',
        "123456789012345.txt": "wide and odd spaces here\n",
        "COCO_val2014_000000000139.txt": "A man firing a .22 at 5 .\n",
        "x.y.txt": "An id that is no number\n",
    }
    last_line = done.stdout.splitlines()[-1]
    assert "7 captions of 5 images" in last_line and "2 empty" in last_line


GOOD = {"image_id": 1, "caption": "A dog."}
SAME_STEM = {"images": [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": "b/1.png"}]}
SAME_STEM["annotations"] = [GOOD, {**GOOD, "image_id": 2}]


def test_bad_files(tmp_path):
    for content, reason in (
        (b"", "not a JSON file"),
        (json.dumps({"annotations": [GOOD] * 50}).encode()[:-20], "cut short"),
        (b"[" * 100000, "not a JSON file"),
        (json.dumps({"annotations": [{"image_id": 1, "caption": "  "}]}).encode(), "no caption"),
        (json.dumps({"annotations": [GOOD, "A dog."]}).encode(), 'annotation 1 is "A dog."'),
        (json.dumps({"annotations": [GOOD, {"image_id": 1, "bbox": []}]}).encode(), 'annotation 1 is {"image_id": 1'),
        (json.dumps({"annotations": [{**GOOD, "image_id": "000000000001"}]}).encode(), "000000000001"),
        (json.dumps(SAME_STEM).encode(), "a/1.jpg and b/1.png would share 1.txt"),
        (b'{"annotations": [{"image_id": 1, "caption": "half \\ud83d"}]}', "without an image_id or a valid caption"),
    ):
        source = tmp_path / "captions.json"
        source.write_bytes(content)
        with one_line(f"{source}.*{re.escape(reason)}"):
            write_caption_files(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
