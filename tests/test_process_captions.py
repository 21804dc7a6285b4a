"""process_captions.py from its command line: COCO's captions file to one text file per image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from process_captions import write_caption_files
from tests.conftest import ROOT


def run(*arguments, cwd=ROOT, env=None):
    command = [sys.executable, str(ROOT / "process_captions.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8")


def captions_json(path: Path, pairs, **more) -> Path:
    annotations = [{"id": n, "image_id": image, "caption": caption} for n, (image, caption) in enumerate(pairs)]
    path.write_text(json.dumps({**more, "annotations": annotations}), encoding="utf-8")
    return path


def contents(folder: Path):
    return {path.name: path.read_bytes().decode("utf-8") for path in sorted(folder.iterdir())}


def test_captions_stay_as_they_are_but_for_white_space(tmp_path):
    source = captions_json(
        tmp_path / "captions.json",
        [
            (9, "bike . A dog"),
            (139, " A man\nfiring a .22 \r\n\r\n at  5 .\t"),
            (9, "Caf\u00e9 \u201cna\u00efve\u201d \u65e5\u672c\u8a9e \U0001f436 ."),
            (9, " \n\t "),
            (123456789012345, "wide\u3000and\u2028odd\u00a0spaces\x0bhere"),
            (9, 'back\\slash | pipe, "quotes" & <b>'),
            (0, "\u2026"),
            (7, None),
            ("x", "An id that is no number"),
        ],
        images=[{"id": 139, "file_name": "val2014/COCO_val2014_000000000139.jpg"}, {"id": "x", "file_name": "x.y.png"}],
    )
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())  # the byte order mark that some editors add
    # A machine whose own encoding is not UTF-8 must not make a difference.
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    done = run("--captions", source, "--out-dir", tmp_path / "a" / "b", env=env)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a" / "b") == {
        "000000000000.txt": "\u2026\n",
        "000000000009.txt": "bike . A dog\nCaf\u00e9 \u201cna\u00efve\u201d \u65e5\u672c\u8a9e \U0001f436 .\n"
        'back\\slash | pipe, "quotes" & <b>\n',
        "123456789012345.txt": "wide and odd spaces here\n",
        "COCO_val2014_000000000139.txt": "A man firing a .22 at 5 .\n",
        "x.y.txt": "An id that is no number\n",
    }
    last_line = done.stdout.splitlines()[-1]
    assert "7 captions of 5 images" in last_line and "2 empty" in last_line
    assert done.stderr == ""  # no progress bar where nobody looks


GOOD = {"image_id": 1, "caption": "A dog."}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JSON file"),
        (json.dumps({"annotations": [GOOD] * 50}).encode()[:-20], "cut short"),
        (b"[" * 100000, "not a JSON file"),
        (json.dumps({"annotations": [{"image_id": 1, "caption": "  "}]}).encode(), "no caption"),
        (json.dumps({"annotations": [GOOD, "A dog."]}).encode(), 'annotation 1 is "A dog."'),
        (
            json.dumps({"annotations": [GOOD, {"image_id": 1, "bbox": [1]}]}).encode(),
            'annotation 1 is {"image_id": 1, "bbox"',
        ),
        (json.dumps({"annotations": [{**GOOD, "image_id": "000000000001"}]}).encode(), "000000000001"),
        (b'{"annotations": [{"image_id": 1, "caption": "half \\ud83d"}]}', "without an image_id or a valid caption"),
    ],
)
def test_bad_files(tmp_path, content, reason):
    source = tmp_path / "captions.json"
    source.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        write_caption_files(source, tmp_path / "out")
    message = str(caught.value)
    assert str(source) in message and reason in message and "\n" not in message
    assert not (tmp_path / "out").exists()
