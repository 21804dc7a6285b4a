"""Small models and settings that several tests build."""

import argparse
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
import torch
from torch import Tensor

import args
from backends.native import backend
from models.dalle import DALLE
from models.packed_sampler import guide
from models.sampling import Stepper
from utils import checkpoint

ROOT = Path(__file__).resolve().parent.parent
Weights = Dict[str, Tensor]
SIZES = {"dim": 32, "num_text_tokens": 58, "text_seq_len": 6, "depth": 2, "heads": 2, "dim_head": 16}
FLAGS = "--generated-data --precision fp32 --dataloader-workers 0"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # arguments of Python


def small_dalle(vae: Any, weight_std: Optional[float] = None, **changes: Any) -> DALLE:
    """Build a DALLE of two narrow layers; its weights are the same each time.

    Args:
        weight_std: if given, every parameter is drawn with this deviation, because LayerScale's 0.1 and zero biases
            would hide mistakes.
        changes: arguments of DALLE other than SIZES, or in their place.
    """
    torch.manual_seed(0)
    model = DALLE(vae=vae, **{**SIZES, **changes})
    if weight_std is not None:
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * weight_std
    return model


def reference_weights(text_tokens: int = 8192, text_seq_len: int = 80, sandwich_norm: bool = False) -> Weights:
    """Return random weights under the reference's names, without their prefix: 2 layers of 32, 4 x 4 codes of 64."""
    tokens = text_tokens + text_seq_len
    shapes = {"text_emb.weight": (tokens, 32), "image_emb.weight": (64, 32)}
    shapes["text_pos_emb.weight"] = (text_seq_len + 1, 32)
    shapes.update({"image_pos_emb.weights_0": (1, 4, 1, 32), "image_pos_emb.weights_1": (1, 1, 4, 32)})
    shapes.update({"to_logits.0.weight": (32,), "to_logits.0.bias": (32,)})
    shapes.update({"to_logits.1.weight": (tokens + 64, 32), "to_logits.1.bias": (tokens + 64,)})
    for layer in ("transformer.layers.0", "transformer.layers.1"):
        for block in (f"{layer}.0", f"{layer}.1"):
            shapes[f"{block}.scale"] = (1, 1, 32)
            for norm in ("norm", "norm_out") if sandwich_norm else ("norm",):
                shapes.update({f"{block}.fn.{norm}.weight": (32,), f"{block}.fn.{norm}.bias": (32,)})
        shapes[f"{layer}.0.fn.fn.to_qkv.weight"] = (3 * 32, 32)
        shapes.update({f"{layer}.0.fn.fn.to_out.0.weight": (32, 32), f"{layer}.0.fn.fn.to_out.0.bias": (32,)})
        shapes.update({f"{layer}.1.fn.fn.net.0.weight": (256, 32), f"{layer}.1.fn.fn.net.0.bias": (256,)})
        shapes.update({f"{layer}.1.fn.fn.net.3.weight": (32, 128), f"{layer}.1.fn.fn.net.3.bias": (32,)})
    random = torch.Generator().manual_seed(1)
    return {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def train_settings(flags: str = "", device: str = "cpu", **changes: Any) -> argparse.Namespace:
    """Parse train.py's flags for generated data in fp32; `changes` overwrite parsed values."""
    settings = args.train_arguments([*FLAGS.split(), "--device", device, *flags.split()])
    vars(settings).update(changes)
    return settings


def samples(count: int, seed: int = 0) -> Tuple[Tensor, Tensor]:
    """Return text (count, 6), every other caption padded, and codes (count, 16) for a small_dalle."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (count, 6), generator=random)
    text[::2, 4:] = 0
    return text, torch.randint(0, 32, (count, 16), generator=random)


def tokenize(tokenizer: Any, texts: List[str], length: int) -> Tensor:
    """Return the ids of each text and then zeros, int64 (B, length)."""
    rows = [tokenizer.encode(text) for text in texts]
    return torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])


class WholePassStepper(Stepper):
    """A Stepper that computes the whole sequence for every code, without a cache: slow, and the reference."""

    def begin(self, text: Tensor, codes: Tensor, cond_scale: float = 1.0) -> Tensor:
        self.text, self.codes = text, codes
        logits = self.dalle(text, codes if codes.shape[1] else None)[:, -1, self.dalle.num_text_tokens :]
        return guide(logits, cond_scale)

    def next(self, codes: Tensor, places: Tensor, cond_scale: float = 1.0) -> Tensor:
        return self.begin(self.text, torch.cat((self.codes, codes), dim=1), cond_scale)[:, None]


def contents(folder: Path) -> Dict[str, bytes]:
    """Return the contents of all files in a folder and those below, by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states_of(folder: Path, pattern: str) -> List[Tuple[str, int, int]]:
    """Return (path in the folder, bytes, time of change) of its files, as caches get them."""
    states = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob(pattern))}
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states.items()]


def metrics_in(folder: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_in(path: Any) -> Weights:
    """Return a checkpoint's weights under the model's names."""
    return checkpoint.model_weights(checkpoint.read(path)["weights"])


def assert_same_weights(one: Any, other: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
    torch.testing.assert_close(weights_in(one), weights_in(other), atol=atol, rtol=rtol)


@contextlib.contextmanager
def one_line(match: str, kind: Any = ValueError) -> Iterator[Any]:
    """Expect an error whose message matches and has one line."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def start(*words: Any, **options: Any) -> "subprocess.Popen[str]":
    """Start Python with these arguments on one thread, in the repository's folder unless `cwd` differs; add `env`."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1", **options.get("env", {})}
    return subprocess.Popen([sys.executable, *map(str, words)], **options)


def python(*words: Any, input: Optional[str] = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end as `start` starts it; return its exit status and output."""
    with start(*words, stdin=subprocess.DEVNULL if input is None else subprocess.PIPE, **options) as process:
        out, err = process.communicate(input)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def interrupt(
    script: str, flags: Any, after: str, folder: Path, what: int = signal.SIGINT, delay: float = 0, launcher: Any = ()
) -> Any:
    """Run a script; press Ctrl-C `delay` s after a line with `after`; return exit status, output and errors."""
    process = start("-u", *launcher, ROOT / script, *flags, cwd=folder, start_new_session=True)
    said = []
    for line in process.stdout or ():
        said.append(line)
        if after in line:
            break
    time.sleep(delay)
    # A terminal sends Ctrl-C to worker processes as well; torchrun's processes have groups of their own.
    others = descendants(process.pid) if launcher else []
    for group in [process.pid, *others] if process.poll() is None else []:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, what)
    out, err = process.communicate(timeout=120)
    return process.returncode, "".join(said) + out, err


def descendants(pid: int) -> List[int]:
    """Return the processes that a process started, and those that they started."""
    children = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    return children + [other for child in children for other in descendants(child)]


class PickledCall:
    """Pickles as a call of a function, which runs if the file is unpickled without care."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __call__(self) -> None:
        """Look callable, so that the function of a call can be a call itself."""

    def __reduce__(self) -> Any:
        return self.call


def cpu_only(reason: str) -> Any:
    """Mark a test of what only CPUs promise, to be skipped if all devices of a test run are GPUs."""
    return pytest.mark.skipif(backend.pick_device("cpu").type != "cpu", reason=reason)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """Return a small PNG whose header promises more pixels than it has."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(100)))
