"""Malformed input, made up by hypothesis: each ends in one clear line and status 2, or does no harm. Never a traceback,
half a file, or code that was in the input.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import args
from data.loader import TextImageDataset
from data.tokenizer import load_tokenizer
from tests.conftest import ROOT, YTTM
from utils import command_line

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
