"""A schedule against values reckoned by hand; which parameters decay."""

import pytest
import torch

from tests.builders import small_dalle
from utils.optimization import cosine, parameter_groups


def test_cosine_begins_and_ends_where_it_should():
    assert [cosine(step, 100, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert cosine(52, 100, 4) == pytest.approx(0.5)
    assert cosine(28, 100, 4) == pytest.approx(0.8535534)
    assert 0 < cosine(99, 100, 4) < 3e-4 and cosine(100, 100, 4) == pytest.approx(0, abs=1e-15)
    assert cosine(0, 100, 0) == 1
    assert [cosine(step, 3, 5) for step in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])  # all warm-up
    factors = [cosine(step, 100, 4) for step in range(4, 100)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("sandwich_norm", [False, True])
def test_matrices_decay_and_nothing_else(tiny_vae, sandwich_norm):
    tiny_vae.frozen = torch.nn.Linear(3, 3)
    dalle = small_dalle(tiny_vae, sandwich_norm=sandwich_norm)
    names = {id(parameter): name for name, parameter in dalle.named_parameters()}
    decaying, others = parameter_groups(dalle, 0.25)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    expected = ["text_emb.weight", "image_emb.weight", "text_pos_emb.weight"]
    for layer in "01":
        attention, feed_forward = (f"transformer.layers.{layer}.{block}.fn.fn" for block in "01")
        expected += [f"{attention}.to_qkv.weight", f"{attention}.to_out.0.weight"]
        expected += [f"{feed_forward}.net.0.weight", f"{feed_forward}.net.3.weight"]
    expected += ["to_logits.1.weight"]
    assert [names[id(parameter)] for parameter in decaying["params"]] == expected
    rest = {names[id(parameter)] for parameter in others["params"]}
    assert len(rest) == len(others["params"])
    assert rest == {name for name in names.values() if not name.startswith("vae.")} - set(expected)
    assert {"image_pos_emb.weights_0", "transformer.layers.0.0.scale", "to_logits.1.bias"} <= rest
