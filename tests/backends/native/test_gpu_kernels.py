"""What GPUs compute with, as far as a CPU can tell; the rest is in tests/cuda_contract and checked on a GPU itself."""

import os

import pytest
import torch

from backends.native.gpu_attention import ALIGNMENT, aligned_bias
from models.transformer import pattern_mask
from tests.builders import python


def test_a_bias_is_the_mask_in_aligned_rows():
    mask = pattern_mask("conv_like", 7, 4)
    bias = aligned_bias(mask, torch.float32)
    assert torch.equal(bias == 0, mask) and bias.shape == mask.shape and bias.stride(0) % ALIGNMENT == 0
    assert bias[~mask].max() == float("-inf")


def test_kernels_compute_what_operators_compute():
    pytest.importorskip("triton")
    ended = python("-m", "tests.backends.native.interpreted", env={**os.environ, "TRITON_INTERPRET": "1"})
    assert ended.returncode == 0, ended.stderr
