"""Estimates against the figures of L16 worked out by hand, and what is chosen by them."""

import pytest

import backends
from backends.ipu import estimates
from tests.builders import small_dalle


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


def test_a_sampler_tells_its_estimate(poptorch_standin, tiny_vae, logged):
    model = small_dalle(tiny_vae)
    backend = backends.for_inference("ipu")
    assert backend.images_at_once(model) == estimates.MAX_SEQUENCES
    backend.sampler(model, 3)
    assert "4 sequences a call" in logged.text and "of 941 MB of an IPU: weights" in logged.text
