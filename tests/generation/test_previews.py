"""Pictures while they form: which rows are shown, what they show, and what they may cost."""

import numpy as np
import pytest
import torch

from generation import batching, previews
from generation.loading import load


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load(tiny_checkpoint, device="cpu")


def test_rows_are_shown_as_they_come(loaded):
    shown = []
    watch = previews.Preview(loaded, 1, lambda images, row: shown.append((images, row)), share=1e9)
    pictures = [batching.plan_image(loaded, "a red circle", seed) for seed in range(2)]
    codes = batching.generate_batch(loaded, pictures, watch)
    assert [row for _, row in shown] == [1, 2, 3]
    assert torch.equal(codes, batching.generate_batch(loaded, pictures))
    for images, row in shown:
        expected = loaded.model.vae.decode(codes[:, : 4 * row], row)
        for image, pixels in zip(images, expected):
            seen = np.asarray(image)
            assert seen.shape == (32, 32, 3) and (seen[8 * row :] == 128).all()
            assert np.abs(seen[: 8 * row] - (pixels * 255).permute(1, 2, 0).numpy()).max() < 0.51
    moving = previews.animation_frames(loaded, codes)
    assert len(moving) == 4 and all(image.size == (32, 32) for images in moving for image in images)
    assert np.abs(np.asarray(moving[3][1]) - (loaded.decode(codes)[1] * 255).permute(1, 2, 0).numpy()).max() < 0.51


def test_every_second_row(loaded):
    rows = []
    watch = previews.Preview(loaded, 2, lambda images, row: rows.append(row), share=1e9)
    batching.generate_batch(loaded, [batching.plan_image(loaded, "red", 0)], watch)
    assert rows == [2]


def test_previews_that_would_cost_too_much_are_left_out(loaded, monkeypatch):
    """A clock of our own: a code takes a second, a preview as many as it has rows, times `cost`."""
    now, rows, cost = [0.0], [], [0.0]
    monkeypatch.setattr(previews.time, "monotonic", lambda: now[0])

    def show(images, row):
        now[0] += cost[0] * row
        rows.append(row)

    def drawn():
        rows.clear()
        watch = previews.Preview(loaded, 1, show, share=0.1)  # of 16 seconds: 1.6
        for count in range(1, 17):
            now[0] += 1
            watch(torch.zeros(1, count, dtype=torch.long))
        return list(rows)

    cost[0] = 0.2
    assert drawn() == [1, 2, 3]  # 1.2 s
    cost[0] = 0.3
    assert drawn() == [1, 2]  # 0.9 s; a third would make it 1.8
    cost[0] = 3
    assert drawn() == [1]
