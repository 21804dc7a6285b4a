"""Malformed input, made up by hypothesis: each ends in one clear line and status 2, or does no harm. Never a traceback,
half a file, or code that was in the input.
"""

import contextlib
import io
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import args
import generate
import process_captions
import train
from data.loader import TextImageDataset
from data.tokenizer import load_tokenizer
from tests.builders import PickledCall
from tests.conftest import ROOT, YTTM
from utils import checkpoint, command_line

# The same examples in every run, so that a failure can be seen again.
MANY = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def ends(main, *argv):
    """Run a command in this process → (status, stdout, stderr); anything but SystemExit is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv]) or 0
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def told_or_harmless(ended, named):
    status, out, err = ended
    assert "Traceback" not in out + err
    assert status in (0, 2), ended
    if status == 2:
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and "error: " in lines[0], err
        assert any(name in lines[0] for name in named), lines[0]
    return status


@st.composite
def damaged(draw, content):
    """Bytes with a few places changed: cut, overwritten, doubled, left out, filled with noise."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 7, 64, 4096]))
        kind = draw(st.sampled_from(["cut", "noise", "zeros", "double", "leave out", "flip"]))
        if kind == "cut":
            del data[place:]
        elif kind == "noise":
            data[place : place + length] = draw(st.binary(min_size=1, max_size=length))
        elif kind == "zeros":
            data[place : place + length] = bytes(length)
        elif kind == "double":
            data[place:place] = data[place : place + length]
        elif kind == "leave out":
            del data[place : place + length]
        elif data:
            data[place] ^= draw(st.integers(1, 255))
    return bytes(data)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["1e3", "nan", "-1", "0", "full,", "../..", "\0", "on", "~", "0x10", "१२", "1_000"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TRAIN = [action for action in args.train_parser()._actions if action.dest not in ("help", "config")]


@settings(max_examples=60, **MANY)
@given(st.lists(st.tuples(st.sampled_from(TRAIN), anything), min_size=1, max_size=3), st.booleans())
def test_flags(flags, equals):
    words = ["--generated-data"]
    for action, value in flags:
        value = json.dumps(value) if isinstance(value, (list, dict)) else str(value)
        words += [f"{action.option_strings[0]}={value}"] if equals else [action.option_strings[0], value]

    def parse(argv):
        args.train_arguments(argv)

    told_or_harmless(
        ends(parse, *words), [name for action, _ in flags for name in action.option_strings] + ["argument"]
    )


NAMES = st.sampled_from([action.dest for action in TRAIN]) | st.text(max_size=12)
ENTRIES = st.dictionaries(NAMES, anything, max_size=3).map(lambda entry: yaml.safe_dump({"mine": entry}).encode())
FILES = ENTRIES | damaged((ROOT / "configs.yaml").read_bytes()) | anything.map(lambda it: yaml.safe_dump(it).encode())


@settings(max_examples=60, **MANY)
@given(FILES, st.sampled_from(["mine", "L16", "demo", "unit_test"]))
def test_configuration_files(content, name):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "configs.yaml"
        path.write_bytes(content)
        patch.setattr(command_line, "CONFIGS", path)

        def parse(argv):
            args.train_arguments(argv)

        told_or_harmless(ends(parse, "--config", name), ["configs.yaml", "--input-folder"])


CAPTIONS = {"annotations": [{"image_id": number, "id": number, "caption": f"picture {number}"} for number in range(3)]}
WRONG = st.tuples(st.sampled_from(["image_id", "caption", None]), anything).map(
    lambda change: {
        "annotations": [
            *CAPTIONS["annotations"],
            change[1] if change[0] is None else {"image_id": 7, "caption": "a dog", change[0]: change[1]},
        ]
    }
)
JSONS = (WRONG | anything | anything.map(lambda it: {"annotations": it})).map(lambda it: json.dumps(it).encode())


@settings(max_examples=60, **MANY)
@given(JSONS | damaged(json.dumps(CAPTIONS).encode()))
def test_captions_files(content):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path, out = Path(folder) / "captions.json", Path(folder) / "out"
        path.write_bytes(content)
        patch.setattr(sys, "argv", ["process_captions.py", "--captions", str(path), "--out-dir", str(out)])
        status = told_or_harmless(ends(lambda _: process_captions.main()), ["captions.json"])
        files = list(out.glob("*")) if out.exists() else []
        assert not [file for file in files if file.suffix != ".txt" or not file.read_text(encoding="utf-8")]
        assert status == 0 or not files


@pytest.fixture(scope="module")
def small_file(tiny_checkpoint):
    """A checkpoint's content, without the optimizer's state: fewer bytes, so that changes meet more that matters."""
    return {**checkpoint.read(tiny_checkpoint), "opt_state": []}


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@settings(max_examples=10, **MANY)
@given(st.data())
def test_checkpoints(small_file, tiny_flags, data):
    with tempfile.TemporaryDirectory() as folder:
        path, marker, out = Path(folder) / "dalle_9.pt", Path(folder) / "marker", Path(folder) / "out"
        kind = data.draw(st.sampled_from(["bytes", "value", "missing", "code", "pickle", "hparam"]))
        if kind == "bytes":
            path.write_bytes(data.draw(damaged(saved(small_file))))
        elif kind == "pickle":
            path.write_bytes(pickle.dumps({"hparams": {}, "weights": {"a": PickledCall(os.system, f"touch {marker}")}}))
        else:
            content = dict(small_file)
            key = data.draw(st.sampled_from(sorted(content)))
            if kind == "missing":
                del content[key]
            elif kind == "hparam":
                name = data.draw(st.sampled_from(sorted(content["hparams"])))
                content["hparams"] = {**content["hparams"], name: data.draw(anything)}
            else:
                content[key] = PickledCall(os.system, f"touch {marker}") if kind == "code" else data.draw(anything)
            path.write_bytes(saved(content))
        before = path.read_bytes()
        draw = ["--dalle_path", path, "--text", "red", "--num_images", 1, "--device", "cpu", "--precision", "fp32"]
        drawn = ends(generate.main, *draw, "--outputs_dir", out / "drawn")
        named = [str(path), "--text", "--bpe_path"]
        told_or_harmless(drawn, named)
        went_on = ends(
            train.main,
            *[*tiny_flags, "--pretrained-checkpoint", path, "--checkpoint-output-dir", out / "ckpt"],
            *["--max-steps", 12, "--epochs", 9, "--caption-dropout", "0.1"],
        )
        told_or_harmless(went_on, named)
        assert path.read_bytes() == before and not marker.exists()
        assert not list(out.rglob("*.tmp"))


PICTURES = ["png", "jpeg", "bmp", "gif", "tiff", "webp"]


@settings(max_examples=60, **MANY)
@given(st.data())
def test_pictures(data):
    from PIL import Image

    pixels = Image.fromarray(np.arange(3 * 24 * 20, dtype=np.uint8).reshape(24, 20, 3))
    form, content = data.draw(st.sampled_from(PICTURES)), io.BytesIO()
    pixels.save(content, form)
    content = data.draw(damaged(content.getvalue()) | st.binary(max_size=100))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pixels.save(folder / "good.png")
        (folder / "bad.png").write_bytes(content)
        for name in ("good", "bad"):
            (folder / f"{name}.txt").write_text(f"a {name} picture\n")
        dataset = TextImageDataset(folder, load_tokenizer(str(ROOT / YTTM)), image_size=16, text_seq_len=12)
        shapes = {tuple(dataset[index][1].shape) for index in range(len(dataset))}
        assert shapes == {(3, 16, 16)}
        pictures = [name for name, _, _ in dataset.images]
        seen = pictures + [path.name for files in dataset.source.skipped.values() for path in files]
        assert "bad.png" in seen and "good.png" in pictures
