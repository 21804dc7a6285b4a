"""The download of the official VQGAN from a server of our own: once, whole or not at all, and failures in one line."""

import io
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from models.vqgan_files import OFFICIAL_FILES, download_official_vqgan, load_vqgan
from tests.builders import one_line, start
from tests.file_server import serving

CHECKPOINT, CONFIG = "vqgan.1024.model.ckpt", "vqgan.1024.config.yml"
BY_HAND = f"put {CHECKPOINT} and {CONFIG} into .* by hand, or name another VQGAN with --vqgan_model_path"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A healthy server that $MINIDALLE_VQGAN_URL names; $DALLE_CACHE is tmp_path/cache, not yet there."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("archive/data.pkl", os.urandom(3 << 20))  # more than one chunk
    monkeypatch.setenv("DALLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    files = {f"mirror/{CHECKPOINT}": file.getvalue(), f"mirror/{CONFIG}": b"model:\n  params: {}\n"}
    with serving(files) as server:
        monkeypatch.setenv("MINIDALLE_VQGAN_URL", f"{server.url}/mirror")
        yield server


cache = pytest.fixture(lambda tmp_path: tmp_path / "cache")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def assert_whole(cache, server):
    assert names(cache) == [CONFIG, CHECKPOINT]
    assert all((cache / Path(name).name).read_bytes() == content for name, content in server.files.items())


def test_the_files_are_dalle_pytorchs_own(dalle_pytorch):
    from dalle_pytorch import vae

    assert {CHECKPOINT: vae.VQGAN_VAE_PATH, CONFIG: vae.VQGAN_VAE_CONFIG_PATH} == OFFICIAL_FILES


def test_downloaded_once(cache, server):
    assert download_official_vqgan() == (cache / CHECKPOINT, cache / CONFIG)
    assert_whole(cache, server)
    assert [path for _, path, _ in server.requests] == [f"mirror/{CHECKPOINT}", f"mirror/{CONFIG}"]
    assert download_official_vqgan() == (cache / CHECKPOINT, cache / CONFIG)
    assert len(server.requests) == 2


def test_a_cache_that_cannot_be_written_is_noticed_before_connecting(cache, server):
    cache.write_text("a file")
    with one_line(f"could not download .*{BY_HAND}", OSError):
        download_official_vqgan()
    assert not server.requests


@pytest.mark.parametrize("name", [CHECKPOINT, CONFIG])
def test_a_broken_connection_leaves_nothing_under_the_name(cache, server, name):
    size = len(server.files[f"mirror/{name}"])
    server.cut[f"mirror/{name}"] = [size // 2] * 99
    with one_line(rf"could not download {server.url}/mirror/{name} \(\d+ of {size} bytes.*; {BY_HAND}", OSError):
        download_official_vqgan()
    assert names(cache) == ([] if name == CHECKPOINT else [CHECKPOINT])
    server.cut.clear()
    download_official_vqgan()
    assert_whole(cache, server)


def test_of_two_processes_one_downloads_and_both_have_whole_files(cache, server):
    server.gate.clear()
    code = "from models.vqgan_files import download_official_vqgan as get; print('ready', flush=True); print(*get())"
    processes = [start("-c", code) for _ in range(2)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    assert server.half_sent.wait(60)
    for process in processes:
        with pytest.raises(subprocess.TimeoutExpired):  # both are busy, and neither sees a half file
            process.wait(0.3)
    assert CHECKPOINT not in names(cache)
    server.gate.set()
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert out.split() == [str(cache / CHECKPOINT), str(cache / CONFIG)]
    assert len(server.requests) == 2
    assert_whole(cache, server)


def test_without_a_path_load_vqgan_takes_the_official_files(cache, server, tiny_vqgan):
    server.files[f"mirror/{CHECKPOINT}"] = (tiny_vqgan / "vqgan.ckpt").read_bytes()
    server.files[f"mirror/{CONFIG}"] = (tiny_vqgan / "vqgan.yaml").read_bytes()
    vae, expected = load_vqgan(), load_vqgan(tiny_vqgan)
    images = torch.rand(2, 3, vae.image_size, vae.image_size)
    assert torch.equal(vae(images), expected(images)) and vae.fingerprint() == expected.fingerprint()
    assert_whole(cache, server)
    (cache / CONFIG).write_text("model: {}")
    with pytest.raises(ValueError, match=re.escape(f"{cache / CONFIG}: ")):
        load_vqgan()
