"""The bundled checkpoints: their sizes and images, and that few passes sample the codes of one at a time."""

import itertools

import pytest
import torch

from data.scene_captions import BACKGROUNDS, objects
from data.shapes import parse_caption, validation_prompts
from generation.images import complete_caption, generate_batch, generate_lists, plan_image
from generation.loading import DEMO, load
from tests.conftest import ROOT, SHAPES
from training.evaluation import judge, shape_faults

demo = pytest.fixture(lambda: load(SHAPES, device="cpu"), scope="module")


def test_it_is_small_and_complete(demo):
    assert SHAPES.stat().st_size <= 8_000_000
    assert demo.guidable and demo.recommended == (0.0, 0.9, 0.8, 1.25)
    assert demo.tokenizer.vocabulary == (ROOT / "bpe" / "bpe_shapes_vocab.txt").read_bytes()


def test_it_follows_prompts_that_it_was_not_trained_on(demo):
    prompts = validation_prompts("score", 48)
    lists = [[plan_image(demo, prompt, place)] for place, prompt in enumerate(prompts)]
    images = torch.cat([demo.decode(codes) for codes in generate_lists(demo, lists)])
    accuracy, faults = judge(images, shape_faults(prompts))
    assert accuracy >= 0.9, faults


def test_it_completes_captions(demo):
    right = 0
    for seed in range(20):
        _, caption = complete_caption(demo, "a small red", seed)
        try:
            parse_caption(caption)
        except ValueError:
            continue
        right += caption.startswith("a small red ")
    assert right >= 18


@pytest.mark.parametrize("count", [16, pytest.param(1000, marks=pytest.mark.slow)])
def test_codes_are_those_of_one_at_a_time_in_fewer_passes(demo, count):
    """One image in eight is generated alone, too."""
    one, eight = (load(SHAPES, device="cpu", batch_size=8, window=window) for window in (1, 8))
    settings = [{}, {"cond_scale": 1.0}, {"top_p": None, "top_k": 0.9}, {"temperature": 1.2, "cond_scale": 2.0}]
    for first, prompt in zip(range(0, count, 8), itertools.cycle(validation_prompts("score", 48))):
        specs = [plan_image(demo, prompt, first + place, settings[first // 8 % 4]) for place in range(8)]
        expected = generate_batch(one, specs)
        for loaded in (eight, demo):  # demo chooses its windows itself
            assert torch.equal(generate_batch(loaded, specs), expected), specs
        assert torch.equal(generate_batch(demo, specs[:1]), expected[:1]), specs
    assert eight.sampler.stepper.passes < one.sampler.stepper.passes / 2.5


def test_the_default_knows_everyday_things():
    assert DEMO.stat().st_size <= 24_000_000
    loaded = load(device="cpu")
    assert sum(all(word in loaded.words for word in name.split()) for name in objects()) >= 300
    specs = [plan_image(loaded, f"a small cat on a {color} background", 1) for color in ("blue", "green")]
    for image, color in zip(loaded.decode(generate_batch(loaded, specs)), ("blue", "green")):
        middle = image.flatten(1).median(dim=1).values * 255
        assert (middle - torch.tensor(BACKGROUNDS[color])).abs().max() < 12
