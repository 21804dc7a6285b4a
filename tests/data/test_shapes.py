"""The demo set: captions against the grammar, drawings against geometry, the files, and the reader of drawings."""

import hashlib
import itertools
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data import shapes
from data.shapes import BACKGROUND, COLORS, INVERSE, SHAPES, Scene, make_sample, parse_caption
from data.shapes_reader import find_faults, find_objects
from tests.builders import contents


def test_captions_mean_what_they_say():
    meanings = {
        "a small red circle above a large blue square": "red circle small above blue square large",
        "there is an orange star to the left of a little black heart": "orange star None left black heart small",
        "  Big green triangle	beneath pink circle. ": "green triangle large below pink circle None",
        "yellow heart right of purple star": "yellow heart None right purple star None",
    }
    for text, meaning in meanings.items():
        first, relation, second = parse_caption(text)
        assert " ".join(map(str, (*first, relation, *second))) == meaning


def withheld_combinations():
    """What training never sees; with each combination also its inverse ("A above B": "B below A")."""
    _, choose, score = shapes._combinations()
    inverse = ((c2, s2, INVERSE[relation], c1, s1) for c1, s1, relation, c2, s2 in choose + score)
    return {*choose, *score, *inverse}


def test_withheld_is_a_tenth_and_closed_under_inversion():
    withheld = withheld_combinations()
    every = {one for one in itertools.product(COLORS, SHAPES, INVERSE, COLORS, SHAPES) if one[0] != one[3]}
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


def test_samples_are_these_on_every_machine():
    """Written down once: other images or captions need another VERSION."""
    digest = hashlib.sha256()
    for split, index in itertools.product(("train", "val"), range(50)):
        pixels, captions = make_sample(split, index, seed=1)
        digest.update(pixels.tobytes() + "\n".join(captions).encode())
    assert digest.hexdigest()[:16] == "f739c1e3ac6680f7"


def test_layout(tmp_path):
    out = tmp_path / "shapes"
    shapes.write_dataset(out, pictures=9, val=4, size=32)
    stems = [f"{number:012d}" for number in range(1, 14)]
    assert sorted(path.stem for path in out.rglob("*.png")) == stems
    for place, stem in enumerate(stems):
        split, index = ("train", place) if place < 9 else ("val", place - 9)
        expected, texts = make_sample(split, index, 0, 32)
        with Image.open(out / split / "images" / f"{stem}.png") as image:
            assert (image.mode, image.format) == ("RGB", "PNG") and np.array_equal(np.asarray(image), expected)
        assert (out / split / "captions" / f"{stem}.txt").read_text(encoding="utf-8").splitlines() == texts


def test_a_finished_set_is_kept_and_one_of_other_settings_replaced(tmp_path):
    out = tmp_path / "shapes"
    assert shapes.write_dataset(out, pictures=4, val=2)
    before = contents(out)
    (out / "train" / "images" / "000000000001.png").touch()
    assert not shapes.write_dataset(out, pictures=4, val=2)
    assert contents(out) == before
    assert shapes.write_dataset(out, pictures=3, val=2)
    assert len(list((out / "train" / "images").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_someone_elses_folder_is_left_alone(tmp_path, command):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").write_bytes(b"precious")
    ended = command(shapes.main, "--out", tmp_path, "--pictures", 2, "--val", 1)
    assert ended.status == 2 and "error: --out" in ended.err and str(tmp_path) in ended.err.splitlines()[-1]
    assert contents(tmp_path) == {"train/mine.jpg": b"precious"}


def accuracy(captions, images):
    return np.mean([not find_faults(caption, pixels) for caption, pixels in zip(captions, images)])


@pytest.fixture(scope="module")
def pictures():
    return [make_sample("train" if index % 2 else "val", index, seed=11) for index in range(400)]


def test_the_reader_reads_real_images(pictures):
    right = 0
    for pixels, captions in pictures:
        scene = parse_caption(captions[0])
        right += {seen[:3] for seen in find_objects(pixels)} == {tuple(scene.first), tuple(scene.second)}
    assert right >= 0.995 * len(pictures)
    some = pictures[:100]
    assert accuracy([captions[1] for _, captions in some], [pixels for pixels, _ in some]) >= 0.999
    # Each picture with its neighbour's caption: two in a row are the same by chance about never.
    assert accuracy([captions[1] for _, captions in some[1:]], [pixels for pixels, _ in some[:-1]]) <= 0.01


def test_a_caption_with_one_thing_wrong_is_not_followed(pictures):
    for pixels, captions in pictures[:40]:
        told = parse_caption(captions[0])
        colour = next(c for c in COLORS if c not in (told.first.color, told.second.color))
        shape = SHAPES[(SHAPES.index(told.second.shape) + 1) % 5]
        size = "small" if told.first.size == "large" else "large"
        wrong = {
            "colour": told._replace(first=told.first._replace(color=colour)),
            "shape": told._replace(second=told.second._replace(shape=shape)),
            "size": told._replace(first=told.first._replace(size=size)),
        }
        rng = random.Random(0)
        for fault, scene in wrong.items():
            assert find_faults(shapes.describe_scene(scene, rng), pixels) == (fault,), captions[0]
        for relation in set(INVERSE) - {told.relation}:
            assert find_faults(shapes.describe_scene(told._replace(relation=relation), rng), pixels)
        swapped = Scene(told.second, told.relation, told.first)
        assert find_faults(shapes.describe_scene(swapped, rng), pixels)
        unsized = told._replace(first=told.first._replace(size=None))
        assert not find_faults(shapes.describe_scene(unsized, rng), pixels)


def test_a_third_object_or_a_missing_one_is_counted(pictures):
    for pixels, captions in pictures[:40]:
        ink = (pixels != BACKGROUND).any(-1)
        near = np.asarray(Image.fromarray(ink).filter(ImageFilter.MaxFilter(5)))
        third = pixels.copy()
        free = np.argwhere([[not near[y : y + 4, x : x + 4].any() for x in range(61)] for y in range(61)])
        y, x = free[len(free) // 2]
        third[y : y + 4, x : x + 4] = COLORS["green"]
        assert find_faults(captions[0], third) == ("count",)
        missing = pixels.copy()
        missing[(missing == COLORS[parse_caption(captions[0]).first.color]).all(-1)] = BACKGROUND
        assert find_faults(captions[0], missing)
    assert find_objects(np.full((64, 64, 3), BACKGROUND, np.uint8)) == []
