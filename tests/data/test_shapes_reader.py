"""The reader of the demo set: real drawings are read right, and what is not as the caption says is refused."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.shapes import BACKGROUND, COLORS, INVERSE, SHAPES, Scene, describe_scene, make_sample, parse_caption
from data.shapes_reader import find_faults, find_objects


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
            assert find_faults(describe_scene(scene, rng), pixels) == (fault,), captions[0]
        for relation in set(INVERSE) - {told.relation}:
            assert find_faults(describe_scene(told._replace(relation=relation), rng), pixels)
        swapped = Scene(told.second, told.relation, told.first)
        assert find_faults(describe_scene(swapped, rng), pixels)
        unsized = told._replace(first=told.first._replace(size=None))
        assert not find_faults(describe_scene(unsized, rng), pixels)


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
