"""The download of the official VQGAN from a server of our own: once, whole or not at all, and failures in one line."""

import http.server
import io
import os
import re
import subprocess
import sys
import threading
import zipfile

import pytest
import torch

from models.vqgan_files import OFFICIAL_FILES, download_official_vqgan, load_vqgan
from tests.conftest import ROOT

CHECKPOINT, CONFIG = "vqgan.1024.model.ckpt", "vqgan.1024.config.yml"
BY_HAND = f"put {CHECKPOINT} and {CONFIG} into .* by hand, or name another VQGAN with --vqgan_model_path"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (name -> bytes) and notes what was asked for. The other attributes are its ailments.

    cut: names of which only half is sent. gate: with the first half sent, waits for it.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.cut, self.gate = files, [], set(), threading.Event()
        self.half_sent = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_port}/mirror"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        server.asked.append(self.path)
        if name not in server.files:
            self.send_error(404)
            return
        content = server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.wfile.flush()
        server.half_sent.set()
        server.gate.wait(60)
        if name not in server.cut:
            self.wfile.write(content[half:])

    def log_message(self, *_):
        pass


def archive(size=3 << 20):
    """More than one chunk of something that is a zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("archive/data.pkl", os.urandom(size))
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A healthy server that $MINIDALLE_VQGAN_URL names; $DALLE_CACHE is tmp_path/cache, not yet there."""
    server = Server({CHECKPOINT: archive(), CONFIG: b"model:\n  params: {}\n"})
    monkeypatch.setenv("MINIDALLE_VQGAN_URL", server.url)
    monkeypatch.setenv("DALLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def assert_whole(cache, server):
    assert names(cache) == [CONFIG, CHECKPOINT]
    assert all((cache / name).read_bytes() == content for name, content in server.files.items())


def assert_fails(reason):
    with pytest.raises(OSError, match=f"{reason}.*; {BY_HAND}") as caught:
        download_official_vqgan()
    assert "\n" not in str(caught.value)


def test_the_files_are_dalle_pytorchs_own(dalle_pytorch):
    from dalle_pytorch import vae

    assert {CHECKPOINT: vae.VQGAN_VAE_PATH, CONFIG: vae.VQGAN_VAE_CONFIG_PATH} == OFFICIAL_FILES


def test_downloaded_once(cache, server):
    assert download_official_vqgan() == (cache / CHECKPOINT, cache / CONFIG)
    assert_whole(cache, server)
    assert server.asked == [f"/mirror/{CHECKPOINT}", f"/mirror/{CONFIG}"]
    assert download_official_vqgan() == (cache / CHECKPOINT, cache / CONFIG)
    assert len(server.asked) == 2


@pytest.mark.parametrize("name", [CHECKPOINT, CONFIG])
def test_a_broken_connection_leaves_nothing_under_the_name(cache, server, name):
    server.cut.add(name)
    assert_fails(rf"could not download {server.url}/{name} \(\d+ of {len(server.files[name])} bytes arrived\)")
    assert names(cache) == ([] if name == CHECKPOINT else [CHECKPOINT])
    server.cut.clear()
    download_official_vqgan()
    assert_whole(cache, server)


def test_an_address_that_does_not_answer_is_named(cache, server, monkeypatch):
    address = "http://127.0.0.1:9"
    monkeypatch.setenv("MINIDALLE_VQGAN_URL", address)
    assert_fails(f"could not download {address.rstrip('/')}/{CHECKPOINT}")
    assert names(cache) == []


def start():
    """Another process that says "ready" and downloads; it prints what it was given."""
    code = "from models.vqgan_files import download_official_vqgan as get; print('ready', flush=True); print(*get())"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_of_two_processes_one_downloads_and_both_have_whole_files(cache, server):
    server.gate.clear()
    processes = [start(), start()]
    assert server.half_sent.wait(60)
    for process in processes:
        with pytest.raises(subprocess.TimeoutExpired):  # both are busy, and neither sees a half file
            process.wait(0.3)
    assert CHECKPOINT not in names(cache)
    server.gate.set()
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert out.decode().split() == [str(cache / CHECKPOINT), str(cache / CONFIG)]
    assert len(server.asked) == 2
    assert_whole(cache, server)


def test_without_a_path_load_vqgan_takes_the_official_files(cache, server, tiny_vqgan):
    server.files.update({CHECKPOINT: (tiny_vqgan / "vqgan.ckpt").read_bytes()})
    server.files.update({CONFIG: (tiny_vqgan / "vqgan.yaml").read_bytes()})
    vae, expected = load_vqgan(), load_vqgan(tiny_vqgan)
    images = torch.rand(2, 3, vae.image_size, vae.image_size)
    assert torch.equal(vae(images), expected(images)) and vae.fingerprint() == expected.fingerprint()
    assert_whole(cache, server)
    (cache / CONFIG).write_text("model: {}")
    with pytest.raises(ValueError, match=re.escape(f"{cache / CONFIG}: ")):
        load_vqgan()
