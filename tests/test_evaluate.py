"""evaluate.py as a user starts it: the figure, the grid and its prompts; and that the figure is right about pictures
whose content is known.
"""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from args import evaluate_arguments
from data.shapes import COLOURS, draw_scene, held_out_prompts, parse_caption


@pytest.fixture
def evaluated(command, tiny_checkpoint, tmp_path):
    """evaluated(*flags): runs evaluate.py on a checkpoint that has learnt next to nothing → its output."""

    def run(*flags):
        ended = command(evaluate.main, "--dalle_path", tiny_checkpoint, "--outputs-dir", tmp_path / "out", *flags)
        assert ended.status == 0 and ended.err == "", ended
        return ended.out

    return run


def test_figure_grid_and_prompts(evaluated, tmp_path):
    out = evaluated("--prompts", 5, "--batch-size", 2)
    assert re.search(r"^prompt accuracy: \d+\.\d % \(5 prompts\)$", out, re.M)
    assert str(tmp_path / "out" / "grid.png") in out and str(tmp_path / "out" / "prompts.txt") in out
    assert (tmp_path / "out" / "prompts.txt").read_text().splitlines() == held_out_prompts("score", 5, 0)
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 * 34 + 2, 3 * 34 + 2)  # five of 32 × 32 in two columns


def test_the_grid_shows_the_first_36(evaluated, tmp_path):
    assert "(40 prompts)" in evaluated("--prompts", 40, "--prompt-set", "choose", "--seed", 3)
    assert (tmp_path / "out" / "prompts.txt").read_text().splitlines() == held_out_prompts("choose", 40, 3)[:36]
    assert Image.open(tmp_path / "out" / "grid.png").size == (6 * 34 + 2, 6 * 34 + 2)


def test_a_seed_repeats_and_the_batch_size_changes_nothing(evaluated, tmp_path):
    grids = []
    for flags in (["--batch-size", 4], ["--batch-size", 3], ["--seed", 1], ["--top_k", 1]):
        evaluated("--prompts", 4, *flags)
        grids.append((tmp_path / "out" / "grid.png").read_bytes())
    assert grids[0] == grids[1] and len(set(grids)) == 3


def test_fewer_than_256_prompts_only_when_asked():
    assert evaluate_arguments(["--dalle_path", "x"]).prompts >= 256
    assert evaluate_arguments(["--dalle_path", "x"]).prompt_set == "score"


def test_pictures_of_known_content_get_their_marks():
    prompts = held_out_prompts("score", 6)
    drawn = [draw_scene(parse_caption(prompt), random.Random(number)) for number, prompt in enumerate(prompts)]
    drawn[1] = np.full_like(drawn[1], 247)  # nothing to be seen
    scene = parse_caption(prompts[2])
    colour = next(name for name in COLOURS if name not in (scene.first.colour, scene.second.colour))
    drawn[2] = draw_scene(scene._replace(first=scene.first._replace(colour=colour)), random.Random(2))
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255
    share, wrong = evaluate.judge(prompts, pictures)
    assert share == 4 / 6 and wrong == {"count": 1, "colour": 1}
