"""utils/download_coco_dataset.sh against a server on this machine that can be told to misbehave."""

import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "utils" / "download_coco_dataset.sh"
ANNOTATIONS = "annotations/annotations_trainval2017.zip"
VAL = "zips/val2017.zip"
TRAIN = "zips/train2017.zip"
# All that the script may call besides bash, curl, unzip and Python.
BASICS = ["awk", "cat", "df", "dirname", "head", "ls", "mkdir", "mv", "rm", "rmdir", "tr", "wc"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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
        server = self.server
        name = self.path.lstrip("/")
        begin = self.headers.get("Range")
        server.requests.append((self.command, name, begin))
        if name not in server.files:
            self.send_error(404)
            return
        body = server.files[name]
        start = 0
        if begin and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", begin).group(1))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(server.announced.get(name, len(body)) - start))
        self.end_headers()
        if not with_body:
            return
        stop = server.cut.get(name, []).pop(0) if server.cut.get(name) else len(body)
        self.wfile.write(body[start:stop])
        self.wfile.flush()
        server.sent += max(0, min(stop, len(body)) - start)
        if stop < len(body) and server.hang:
            server.reached_cut.set()
            server.go_on.wait(30)


@pytest.fixture
def server():
    """Serves SERVED. `cut`: name -> for its next answers, the byte at which the connection breaks (or `hang`s)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = dict(SERVED)
    server.requests, server.sent, server.ranges, server.announced, server.cut = [], 0, True, {}, {}
    server.hang, server.reached_cut, server.go_on = False, threading.Event(), threading.Event()
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def tools_in(folder: Path, *extra) -> str:
    """A PATH with the basics and `extra` alone, so that a tool left out is as good as not installed."""
    folder.mkdir()
    for tool in BASICS + [tool for tool in extra if tool != "python3"]:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is not installed")
        (folder / tool).symlink_to(found)
    (folder / "sleep").symlink_to(shutil.which("true"))  # the server here needs no time to recover
    if "python3" in extra:
        (folder / "python3").symlink_to(sys.executable)
    return str(folder)


@pytest.fixture(params=["curl and unzip", "python"])
def path(request, tmp_path):
    return tools_in(tmp_path / "bin", *(["curl", "unzip"] if request.param != "python" else ["python3"]))


@pytest.fixture
def usual_path(tmp_path):
    if shutil.which("curl") is None or shutil.which("unzip") is None:
        return tools_in(tmp_path / "usual", "python3")
    return tools_in(tmp_path / "usual", "curl", "unzip")


def environment(path):
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, "PATH": path, "no_proxy": "*"}


def run(path, *arguments, script=SCRIPT, cwd=None):
    command = [shutil.which("bash"), str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment(path), cwd=cwd, capture_output=True, text=True, timeout=60)


def tree(folder: Path):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def expected(*prefixes):
    files = {name: data for name, data in FILES.items() if name.startswith(prefixes)}
    return {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}


def error_line(done, code):
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    return last


def test_all_of_it_then_nothing_more(server, path, tmp_path):
    out = tmp_path / "my data"
    done = run(path, "--out", out, "--base-url", server.url + "/")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where nobody looks
    assert tree(out) == expected("")
    assert "process_captions.py" in done.stdout

    server.requests.clear()
    again = run(path, "--out", out, "--base-url", server.url)
    assert again.returncode == 0 and again.stdout.count("is there already") == 3
    assert server.requests == [] and tree(out) == expected("")


def test_without_arguments_it_goes_into_the_project(server, usual_path, tmp_path):
    (tmp_path / "project" / "utils").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    text = SCRIPT.read_text("utf-8")
    assert "\nBASE_URL=http://images.cocodataset.org\n" in text
    script = tmp_path / "project" / "utils" / SCRIPT.name
    script.write_text(text.replace("http://images.cocodataset.org", server.url), encoding="utf-8")
    done = run(usual_path, script=script, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "project" / "data") == {f"COCO/{name}": data for name, data in expected("").items()}
    assert tree(tmp_path / "elsewhere") == {}


def test_one_part_and_its_zip(server, usual_path, tmp_path):
    done = run(usual_path, "--out", "here", "--base-url", server.url, "--only", "val", "--keep-zips", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "here") == {**expected("images/val2017"), "val2017.zip": SERVED[VAL]}
    assert {name for _, name, _ in server.requests} == {VAL}
    # A zip that is there is unpacked, not fetched.
    shutil.rmtree(tmp_path / "here" / "images")
    server.requests.clear()
    done = run(usual_path, "--out", "here", "--base-url", server.url, "--only", "val", cwd=tmp_path)
    assert done.returncode == 0 and tree(tmp_path / "here") == expected("images/val2017")
    assert [method for method, _, _ in server.requests] == ["HEAD"]


def test_a_broken_connection_is_taken_up_again(server, path, tmp_path):
    size = len(SERVED[VAL])
    server.cut[VAL] = [size // 3, 2 * size // 3]
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == expected("images/val2017")
    begins = [begin for method, _, begin in server.requests if method == "GET"]
    assert begins == [None, f"bytes={size // 3}-", f"bytes={2 * size // 3}-"]
    assert server.sent == size  # no byte twice


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_run_that_ends_mid_file(server, path, tmp_path, how):
    out = tmp_path / "out"
    half = len(SERVED[VAL]) // 2
    server.cut[VAL], server.hang = [half], True
    command = [shutil.which("bash"), str(SCRIPT), "--out", str(out), "--base-url", server.url, "--only", "val"]
    process = subprocess.Popen(
        command, env=environment(path), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    part = out / "val2017.zip.part"
    try:
        assert server.reached_cut.wait(30)
        for _ in range(500):
            if part.exists() and part.stat().st_size > 0:
                break
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, how)
        process.wait(30)
    server.go_on.set()
    have = part.stat().st_size
    assert 0 < have <= half and not (out / "images").exists()

    done = run(path, "--out", out, "--base-url", server.url, "--only", "val")
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected("images/val2017")
    assert server.requests[-1] == ("GET", VAL, f"bytes={have}-")


def test_a_server_that_cannot_resume(server, path, tmp_path):
    server.ranges = False
    server.cut[VAL] = [len(SERVED[VAL]) // 2]
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == expected("images/val2017")


def test_a_server_that_always_breaks_off(server, path, tmp_path):
    server.cut[VAL] = [1000] * 50
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val")
    line = error_line(done, 1)
    assert VAL in line and f"1000 of {len(SERVED[VAL])} bytes" in line and "again" in line
    assert (tmp_path / "out" / "val2017.zip.part").stat().st_size == 1000
    server.cut[VAL], server.ranges = [1000] * 50, False
    assert "again" in error_line(run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val"), 1)


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 100]) + data[middle + 100 :]


@pytest.mark.parametrize("kind", ["damaged", "not a zip", "cut short"])
def test_a_corrupt_zip_is_kept_out(server, path, tmp_path, kind):
    body = {"damaged": damaged(SERVED[VAL]), "not a zip": b"<html>sign in</html>" * 50, "cut short": SERVED[VAL][:-500]}
    server.files[VAL] = body[kind]
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val")
    assert "val2017.zip" in error_line(done, 1)
    assert tree(tmp_path / "out") == {}

    server.files[VAL] = SERVED[VAL]
    assert run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val").returncode == 0
    assert tree(tmp_path / "out") == expected("images/val2017")


@pytest.mark.parametrize("stale", ["shorter", "as long", "longer"])
def test_what_is_left_of_another_version(server, path, tmp_path, stale):
    size = len(SERVED[VAL])
    (tmp_path / "out").mkdir()
    length = {"shorter": size // 2, "as long": size, "longer": size + 10}[stale]
    (tmp_path / "out" / "val2017.zip.part").write_bytes(b"\0" * length)
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == expected("images/val2017")


def test_too_little_room(server, path, tmp_path):
    server.announced[TRAIN] = 400 * 10**12
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url)
    line = error_line(done, 2)
    needed, free = (float(number) for number in re.findall(r"([\d.]+) GB", line))
    # The zip and its pictures, which together with the small parts make 800 TB.
    assert needed == pytest.approx(800e3, rel=1e-6)
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.1)
    assert all(method == "HEAD" for method, _, _ in server.requests)
    assert tree(tmp_path / "out") == {}
    done = run(path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val", "--only", "annotations")
    assert done.returncode == 0, done.stderr


def test_what_the_server_does_not_have(server, path, tmp_path):
    del server.files[ANNOTATIONS]
    line = error_line(run(path, "--out", tmp_path / "out", "--base-url", server.url), 1)
    assert ANNOTATIONS in line and "404" in line
    server.server_close()  # from now on nobody listens
    server.shutdown()
    assert ANNOTATIONS in error_line(run(path, "--out", tmp_path / "out", "--base-url", server.url), 1)
    assert "nonsense" in error_line(run(path, "--out", tmp_path / "out", "--base-url", "nonsense://x"), 1)


def test_a_zip_of_something_else(server, usual_path, tmp_path):
    server.files[VAL] = SERVED[TRAIN]
    line = error_line(run(usual_path, "--out", tmp_path / "out", "--base-url", server.url, "--only", "val"), 1)
    assert "val2017" in line and not (tmp_path / "out" / "images" / "val2017").exists()


def test_folders_that_are_there(server, usual_path, tmp_path):
    out = tmp_path / "out"
    (out / "images" / "val2017").mkdir(parents=True)  # empty: to be filled
    (out / ".unpacking" / "val2017").mkdir(parents=True)  # of a run that was killed
    (out / ".unpacking" / "val2017" / "half.jpg").write_bytes(b"half")
    (out / "images" / "train2017").mkdir()
    (out / "images" / "train2017" / "mine.jpg").write_bytes(b"mine")
    done = run(usual_path, "--out", out, "--base-url", server.url, "--only", "val", "--only", "train")
    assert done.returncode == 0, done.stderr
    assert tree(out) == {**expected("images/val2017"), "images/train2017/mine.jpg": b"mine"}

    (out / "annotations").mkdir()
    (out / "annotations" / "captions_val2017.json").write_text("{}")
    line = error_line(run(usual_path, "--out", out, "--base-url", server.url), 2)
    assert "captions_train2017.json" in line and (out / "annotations" / "captions_val2017.json").read_text() == "{}"


def test_two_runs_at_once(server, usual_path, tmp_path):
    lock = tmp_path / "out" / ".download.lock"
    lock.mkdir(parents=True)
    (lock / "pid").write_text(str(os.getpid()))
    line = error_line(run(usual_path, "--out", tmp_path / "out", "--base-url", server.url), 2)
    assert str(os.getpid()) in line and server.requests == [] and lock.exists()
    (lock / "pid").write_text("999999999")  # no such process
    assert run(usual_path, "--out", tmp_path / "out", "--base-url", server.url).returncode == 0
    assert not lock.exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--bogus"], "--bogus"),
        (["data"], "data"),
        (["--out"], "--out"),
        (["--out", ""], "--out"),
        (["--only", "test"], "test"),
        (["--only"], "--only"),
    ],
)
def test_bad_usage(usual_path, arguments, part):
    assert part in error_line(run(usual_path, *arguments), 2)


def test_out_is_a_file(usual_path, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert "taken" in error_line(run(usual_path, "--out", tmp_path / "taken"), 2)
    assert "taken" in error_line(run(usual_path, "--out", tmp_path / "taken" / "sub"), 2)


def test_help(usual_path, tmp_path):
    done = run(usual_path, "--help", cwd=tmp_path)
    assert done.returncode == 0 and tree(tmp_path / "data") == {}
    for option in ("--out", "--only", "--keep-zips", "--base-url", "http://images.cocodataset.org"):
        assert option in done.stdout


def test_no_tool_to_fetch_with(tmp_path):
    line = error_line(run(tools_in(tmp_path / "bare"), "--out", tmp_path / "out"), 2)
    assert "curl" in line and "python3" in line
