"""Attention on GPUs against masked attention; what their kernels compute: tests/cuda_contract."""

import torch

from backends.native.gpu_attention import ALIGNMENT, aligned_bias
from models.transformer import pattern_mask


def test_a_bias_is_the_mask_in_aligned_rows():
    mask = pattern_mask("conv_like", 7, 4)
    bias = aligned_bias(mask, torch.float32)
    assert torch.equal(bias == 0, mask) and bias.shape == mask.shape and bias.stride(0) % ALIGNMENT == 0
    assert bias[~mask].max() == float("-inf")
