"""Estimates against the figures of L16 worked out by hand, and what is chosen by them."""

from argparse import Namespace

import pytest

import backends
from backends.ipu import estimates
from models.pipeline_dalle import placement
from tests.builders import ROOT, small_dalle


@pytest.fixture
def l16(tiny_vae):
    """Graphcore's L16, with 1,024 codes for 256 x 256 pixels."""
    tiny_vae.image_size, tiny_vae.num_layers, tiny_vae.num_tokens = 256, 4, 1024
    patterns = ["axial_row", "axial_row", "axial_col", "axial_row"] * 2
    patterns += ["axial_row", "axial_row", "axial_col", "full"] * 2
    sizes = {"dim": 512, "num_text_tokens": 8192, "text_seq_len": 80, "depth": 16, "heads": 16, "dim_head": 64}
    return small_dalle(tiny_vae, attn_types=patterns, **sizes)


def test_a_sampler_of_l16_in_fp16(poptorch_standin, l16):
    memory = estimates.sampler_memory(l16, 4, 2)
    assert memory["weights"] == 2 * 93_604_432
    assert memory["keys and values"] == 4 * 16 * 2 * 336 * 1024 * 2
    assert memory["noise"] == 4 * 256 * 1024 * 4
    assert 2 * sum(memory.values()) == pytest.approx(542e6, rel=0.05)  # a loop that copies what it reads
    backend = backends.for_inference("ipu")
    assert backend.images_at_once(l16) == 16
    assert sum(estimates.sampler_memory(l16, 16, 2).values()) <= estimates.SAMPLER_SHARE * estimates.MEMORY
    assert sum(estimates.sampler_memory(l16, 32, 2).values()) > estimates.SAMPLER_SHARE * estimates.MEMORY
    assert backends.for_inference("ipu", "fp32").images_at_once(l16) == 4


L16 = estimates.Training(size=2, moments=6, batch_size=2)


def balanced(costs, ipus=4):
    flags = {"num_hidden_layers": 16, "ipus_per_replica": ipus, "cls_ipu_id": None, "embedding_ipu_id": 0}
    return estimates.balanced_layers(costs, L16, Namespace(**flags))


def test_the_stages_of_l16(l16):
    costs = estimates.module_costs(l16, L16, pixels=False)
    stages = estimates.estimate_stages(placement(16, layers_per_ipu=[0, 6, 6, 4]), costs, L16)
    parameters = [4_817_408, 31_506_432, 31_506_432, 25_774_160]
    assert [stage.memory["weights"] // 2 for stage in stages] == parameters
    assert [stage.memory["optimizer"] // 6 for stage in stages] == parameters
    page = (ROOT / "docs" / "ipu.md").read_text(encoding="utf-8")
    assert all(f"{count:,}" in page for count in parameters)
    layer = 2 * 336 * 512 * 2  # bytes of its output for two samples
    assert [stage.memory["stash"] / layer for stage in stages] == [2 * 7, 6 * 5, 6 * 3, 4 * 1]
    scores = 3 * 2 * 16 * 2 * 31393  # an axial layer's three tensors in fp16, two samples, 16 heads
    assert scores == pytest.approx(6e6, rel=0.01)
    axial, full = costs["transformer.layers.0"], costs["transformer.layers.15"]
    assert full.operations - axial.operations == 4 * 4 * 2 * 16 * (112896 - 31393) * 64
    assert all(sum(stage.memory.values()) < stage.capacity for stage in stages)


def test_layers_are_balanced_and_a_vqgan_and_a_full_ipu_get_fewer(l16, monkeypatch):
    monkeypatch.setattr(estimates, "encoder_cost", lambda vae: estimates.Cost(0, 29_600_000, 138e9))
    costs = estimates.module_costs(l16, L16, pixels=True)
    assert balanced(costs) == [0, 5, 6, 5]
    costs = estimates.module_costs(l16, L16, pixels=False)
    assert [balanced(costs, ipus) for ipus in (1, 2, 4)] == [[16], [8, 8], [4, 4, 4, 4]]
    monkeypatch.setattr(estimates, "MEMORY", 330e6)
    found = balanced(costs)
    stages = estimates.estimate_stages(placement(16, layers_per_ipu=found), costs, L16)
    assert all(sum(stage.memory.values()) < 0.9 * 330e6 for stage in stages) and found[0] < 4
