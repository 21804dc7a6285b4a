"""utils/download_coco_dataset.sh against a server on this machine that can misbehave on request."""

import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

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


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        server, name = self.server, self.path.lstrip("/")
        begin = self.headers.get("Range")
        server.requests.append((self.command, name, begin))
        body = server.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", begin)[1]) if begin else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if with_body:
            self.wfile.write(body[start : server.cut.pop(0) if server.cut else len(body)])


@pytest.fixture
def server():
    """Serves SERVED. `cut`: for its next answers, the byte at which the connection breaks."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.cut = dict(SERVED), [], []
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def environment(tmp_path):
    """Without proxies, and without the pauses in which a server could recover."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    if not (tmp_path / "bin" / "sleep").exists():
        (tmp_path / "bin" / "sleep").symlink_to(shutil.which("true"))
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, "PATH": f"{tmp_path / 'bin'}:{kept['PATH']}", "no_proxy": "*"}


@pytest.fixture
def run(tmp_path):
    def run(*arguments):
        command = [shutil.which("bash"), str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def fetch_val(run, server, tmp_path):
    return lambda *more: run("--out", tmp_path / "out", "--base-url", server.url, "--only", "val", *more)


def tree(folder: Path):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def expected(prefix=""):
    files = {name: data for name, data in FILES.items() if name.startswith(prefix)}
    return {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}


def error_line(done, code):
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    return last


def test_everything_then_nothing_more(server, run, tmp_path):
    out = tmp_path / "my data"
    (out / "images" / "val2017").mkdir(parents=True)  # empty: to be filled
    (out / ".unpacking" / "val2017").mkdir(parents=True)  # of a run that was killed
    (out / ".unpacking" / "val2017" / "half.jpg").write_bytes(b"half")
    done = run("--out", out, "--base-url", server.url + "/")
    assert (done.returncode, done.stderr) == (0, "")  # no bar where nobody looks
    assert tree(out) == expected() and "process_captions.py" in done.stdout
    server.requests.clear()
    again = run("--out", out, "--base-url", server.url)
    assert again.returncode == 0 and again.stdout.count("exists") == 3
    assert server.requests == [] and tree(out) == expected()


def test_a_broken_connection_is_resumed(server, fetch_val, tmp_path):
    size = len(SERVED[VAL])
    server.cut = [size // 3, 2 * size // 3]
    assert fetch_val().returncode == 0 and tree(tmp_path / "out") == expected("images/val2017")
    begins = [begin for method, _, begin in server.requests if method == "GET"]
    assert begins == [None, f"bytes={size // 3}-", f"bytes={2 * size // 3}-"]  # no byte twice


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 100]) + data[middle + 100 :]


BODIES = {"damaged": damaged(SERVED[VAL]), "no zip": b"<html>sign in</html>" * 50}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_corrupt_zip_is_refused_and_fetched_again(server, fetch_val, tmp_path, body):
    server.files[VAL] = body
    assert "val2017.zip" in error_line(fetch_val(), 1) and tree(tmp_path / "out") == {}
    server.files[VAL] = SERVED[VAL]
    assert fetch_val().returncode == 0 and tree(tmp_path / "out") == expected("images/val2017")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--bogus"], "--bogus"),
        (["--out", ""], "--out"),
        (["--only", "test"], "test"),
        (["--out", SCRIPT], SCRIPT.name),
    ],
)
def test_bad_usage(run, arguments, part):
    assert part in error_line(run(*arguments), 2)
