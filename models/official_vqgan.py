"""Download the official ImageNet VQGAN (f = 16, 1,024 codes), once for all processes.

The file names are those of dalle-pytorch, so a cache that it filled works here, too.
"""

import os
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Optional, Tuple

from filelock import FileLock
from tqdm import tqdm

from utils.files import remove_leftovers

# File name in the cache -> address at Heidelberg University, where the authors of taming-transformers publish it.
OFFICIAL_FILES = {
    "vqgan.1024.model.ckpt": "https://heibox.uni-heidelberg.de/f/140747ba53464f49b476/?dl=1",
    "vqgan.1024.config.yml": "https://heibox.uni-heidelberg.de/f/6ecf2af6c658432c8298/?dl=1",
}
OFFICIAL_PARAMS = {  # model.params of its yaml
    "embed_dim": 256,
    "n_embed": 1024,
    "ddconfig": {
        "double_z": False,
        "z_channels": 256,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.0,
    },
}
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60  # without any byte; not for the whole file


def download_official_vqgan() -> Tuple[Path, Path]:
    """Return the paths of the official model's checkpoint and yaml; download those that are missing.

    The folder is $DALLE_CACHE, or ~/.cache/dalle. $MINIDALLE_VQGAN_URL names the base address of a mirror that
    serves the two file names. If several processes call this, one downloads and the others wait. A file appears under
    its name only when it is complete.

    Raises:
        OSError: the folder cannot be written or a download failed; says where to put the files by hand.
    """
    folder = Path(os.environ.get("DALLE_CACHE") or "~/.cache/dalle").expanduser()
    paths = [folder / name for name in OFFICIAL_FILES]
    if not all(path.is_file() for path in paths):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "vqgan.1024.lock")
            lock.acquire()  # waits for another process; the system releases the lock even if its holder is killed
        except OSError as error:
            raise _by_hand(f"could not write to {folder} ({error.strerror})", folder) from error
        try:
            for path in paths:
                if not path.is_file():  # another process may have downloaded it while this one waited
                    _download(_address(path.name), path)
        finally:
            lock.release()
    return paths[0], paths[1]


def _address(name: str) -> str:
    mirror = os.environ.get("MINIDALLE_VQGAN_URL")
    return f"{mirror.rstrip('/')}/{name}" if mirror else OFFICIAL_FILES[name]


def _by_hand(problem: str, folder: Path) -> OSError:
    return OSError(
        f"{problem}; put {' and '.join(OFFICIAL_FILES)} into {folder} by hand, "
        "or name another VQGAN with --vqgan_model_path and --vqgan_config_path"
    )


def _download(address: str, path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        remove_leftovers(path.parent, path.name)  # the lock is ours
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response, unfinished.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            with tqdm(
                total=total, unit="B", unit_scale=True, desc=f"downloading {path.name}", disable=None
            ) as progress:
                for chunk in iter(lambda: response.read(CHUNK_BYTES), b""):
                    file.write(chunk)
                    progress.update(len(chunk))
        _verify(unfinished, path, total)
        os.replace(unfinished, path)
    except (OSError, HTTPException, ValueError) as error:  # a URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise _by_hand(f"could not download {address} ({reason})", path.parent) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _verify(unfinished: Path, path: Path, total: Optional[int]) -> None:
    """Refuse a truncated file, and a page that a login or proxy serves instead of the file."""
    size = unfinished.stat().st_size
    if total is not None and size != total:
        raise ValueError(f"{size} of {total} bytes arrived")
    with unfinished.open("rb") as file:
        beginning = file.read(64).lstrip()
    if beginning[:1] == b"<":
        raise ValueError("what arrived is a web page")
    stream = beginning[:1] == b"\x80"  # torch.save's older format; the other is looked for by its directory at the end
    if path.suffix == ".ckpt" and not stream and not zipfile.is_zipfile(unfinished):
        raise ValueError("what arrived is not a checkpoint")
