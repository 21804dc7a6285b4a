"""The demo set: captions against the grammar, drawings against geometry, and the files."""

import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image

from data import shapes
from data.shapes import COLORS, INVERSE, SHAPES, make_sample, parse_caption, write_dataset

# --------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "a small red circle above a large blue square",
            (("red", "circle", "small"), "above", ("blue", "square", "large")),
        ),
        (
            "there is an orange star to the left of a little black heart",
            (("orange", "star", None), "left", ("black", "heart", "small")),
        ),
        (
            "  Big green triangle\tbeneath pink circle. ",
            (("green", "triangle", "large"), "below", ("pink", "circle", None)),
        ),
        ("yellow heart right of purple star", (("yellow", "heart", None), "right", ("purple", "star", None))),
    ],
)
def test_captions_mean_what_they_say(text, expected):
    assert parse_caption(text) == expected


# ----------------------------------------------------------------------------------------------- combinations


def withheld_combinations():
    """What training never sees; with each combination also its inverse ("A above B": "B below A")."""
    _, choose, score = shapes._combinations()
    inverse = ((c2, s2, INVERSE[relation], c1, s1) for c1, s1, relation, c2, s2 in choose + score)
    return {*choose, *score, *inverse}


def test_withheld_is_a_tenth_and_closed_under_inversion():
    withheld = withheld_combinations()
    every = {
        (c1, s1, relation, c2, s2)
        for c1, s1, relation, c2, s2 in itertools.product(COLORS, SHAPES, INVERSE, COLORS, SHAPES)
        if c1 != c2
    }
    assert len(every) == 5600 and len(withheld) == 560 and withheld < every
    assert withheld == {(c2, s2, INVERSE[relation], c1, s1) for c1, s1, relation, c2, s2 in withheld}
    # Checkpoints are scored against this very set: another rule would count what they trained on as held out.
    assert ("purple", "circle", "left", "black", "circle") in withheld
    assert ("red", "circle", "above", "blue", "square") not in withheld


def test_training_and_validation_images_share_no_combination():
    def shown(split, seed):
        return {parse_caption(c).combination for i in range(1500) for c in make_sample(split, i, seed)[1]}

    withheld = withheld_combinations()
    for seed in (0, 7):
        assert shown("train", seed).isdisjoint(withheld)
        assert shown("val", seed) <= withheld


# ---------------------------------------------------------------------------------------------------- drawing


def test_samples_are_these_on_every_machine():
    """Written down once: other images or captions need another VERSION."""
    digest = hashlib.sha256()
    for split, index in itertools.product(("train", "val"), range(50)):
        pixels, captions = make_sample(split, index, seed=1)
        digest.update(pixels.tobytes() + "\n".join(captions).encode())
    assert digest.hexdigest()[:16] == "f739c1e3ac6680f7"


# ------------------------------------------------------------------------------------------------------ files


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout(tmp_path):
    out = tmp_path / "shapes"
    write_dataset(out, pictures=9, val=4, size=32)
    stems = []
    for split, ids in (("train", range(1, 10)), ("val", range(10, 14))):
        for index, number in enumerate(ids):
            stems.append(f"{number:012d}")
            with Image.open(out / split / "images" / f"{stems[-1]}.png") as picture:
                assert (picture.mode, picture.size, picture.format) == ("RGB", (32, 32), "PNG")
                pixels = np.asarray(picture)
            captions = (out / split / "captions" / f"{stems[-1]}.txt").read_text(encoding="utf-8").splitlines()
            expected, texts = make_sample(split, index, 0, 32)
            assert np.array_equal(pixels, expected) and captions == texts
    assert sorted(path.stem for path in out.rglob("*.png")) == stems
    assert stems == [f"{number:012d}" for number in range(1, 14)]


def test_a_finished_set_is_kept_and_one_of_other_settings_replaced(tmp_path):
    out = tmp_path / "shapes"
    assert write_dataset(out, pictures=4, val=2)
    before = files(out)
    (out / "train" / "images" / "000000000001.png").touch()
    assert not write_dataset(out, pictures=4, val=2)
    assert files(out) == before
    assert write_dataset(out, pictures=3, val=2)
    assert len(list((out / "train" / "images").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_someone_elses_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(SystemExit, match="2"):
        shapes.main(["--out", str(tmp_path), "--pictures", "2", "--val", "1"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: --out" in error and str(tmp_path) in error
    assert files(tmp_path) == {"train/mine.jpg": b"precious"}
