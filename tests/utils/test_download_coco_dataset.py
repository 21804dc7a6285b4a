"""utils/download_coco_dataset.sh against a server on this machine that can misbehave on request."""

import io
import json
import os
import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.builders import contents
from tests.file_server import serving

SCRIPT = Path(__file__).resolve().parents[2] / "utils" / "download_coco_dataset.sh"
ANNOTATIONS = "annotations/annotations_trainval2017.zip"
VAL = "zips/val2017.zip"
TRAIN = "zips/train2017.zip"

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "unzip"))), reason="needs bash, curl, unzip")


def packed(files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def small_coco():
    rnd = random.Random(0)
    pictures = {
        part: {f"{part}/{i:012d}.jpg": rnd.getrandbits(8 * 100_000).to_bytes(100_000, "big") for i in range(3)}
        for part in ("train2017", "val2017")
    }
    captions = json.dumps({"annotations": [{"image_id": 1, "caption": "A dog."}]})
    annotations = {f"annotations/captions_{part}.json": captions for part in ("train2017", "val2017")}
    files = {**annotations, **{f"images/{name}": data for part in pictures.values() for name, data in part.items()}}
    served = {ANNOTATIONS: packed(annotations), VAL: packed(pictures["val2017"]), TRAIN: packed(pictures["train2017"])}
    return files, served


FILES, SERVED = small_coco()
MIDDLE = len(SERVED[VAL]) // 2


@pytest.fixture
def server():
    with serving(SERVED) as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """run(*arguments): the script without proxies, and without the pauses in which a server could recover."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleep").symlink_to(shutil.which("true"))
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**kept, "PATH": f"{tmp_path / 'bin'}:{kept['PATH']}", "no_proxy": "*"}

    def run(*arguments, out="out", url="", status=0):
        place = ["--out", tmp_path / out, "--base-url", server.url + url]
        command = ["bash", SCRIPT, *place, *arguments]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done
        assert not status or done.stderr.splitlines()[-1].startswith("error: "), done
        return done

    return run


def expected(prefix=""):
    files = {name: data for name, data in FILES.items() if name.startswith(prefix)}
    return {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}


def test_everything_then_nothing_more(server, run, tmp_path):
    out = tmp_path / "my data"
    (out / "images" / "val2017").mkdir(parents=True)  # empty: to be filled
    (out / ".unpacking" / "val2017").mkdir(parents=True)  # of a run that was killed
    (out / ".unpacking" / "val2017" / "half.jpg").write_bytes(b"half")
    done = run(out="my data", url="/")
    assert done.stderr == ""  # no bar where nobody looks
    assert contents(out) == expected() and "process_captions.py" in done.stdout
    server.requests.clear()
    assert run(out="my data").stdout.count("exists") == 3
    assert server.requests == [] and contents(out) == expected()


def test_a_broken_connection_is_resumed(server, run, tmp_path):
    size = len(SERVED[VAL])
    server.cut[VAL] = [size // 3, 2 * size // 3]
    run("--only", "val")
    assert contents(tmp_path / "out") == expected("images/val2017")
    begins = [begin for method, _, begin in server.requests if method == "GET"]
    assert begins == [None, f"bytes={size // 3}-", f"bytes={2 * size // 3}-"]  # no byte twice


DAMAGED = SERVED[VAL][:MIDDLE] + bytes(byte ^ 0xFF for byte in SERVED[VAL][MIDDLE:][:100]) + SERVED[VAL][MIDDLE + 100 :]


@pytest.mark.parametrize("body", [DAMAGED, b"<html>sign in</html>" * 50], ids=["damaged", "no zip"])
def test_a_corrupt_zip_is_refused_and_fetched_again(server, run, tmp_path, body):
    server.files[VAL] = body
    assert "val2017.zip" in run("--only", "val", status=1).stderr.splitlines()[-1] and contents(tmp_path / "out") == {}
    server.files[VAL] = SERVED[VAL]
    run("--only", "val")
    assert contents(tmp_path / "out") == expected("images/val2017")


def test_bad_usage(run):
    for arguments in (["--bogus"], ["--out", ""], ["--only", "test"], ["--out", SCRIPT]):
        error = run(*arguments, status=2).stderr.splitlines()[-1]
        assert (Path(arguments[-1]).name if arguments[-1] else "--out") in error
