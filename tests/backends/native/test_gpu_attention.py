"""Attention in blocks, with the CPU's flash kernels, against masked attention; the GPU's: tests/cuda_contract."""

import pytest
import torch

from backends.native.gpu_attention import ALIGNMENT, AxialBlocks, aligned_bias, from_lines, to_lines
from models.transformer import attend, pattern_mask

TEXT_LEN, SIDE = 7, 4


@pytest.mark.parametrize("codes", [15, 11, 4, 1])
@pytest.mark.parametrize("pattern", ["axial_row", "axial_col"])
def test_blocks_are_masked_attention(pattern, codes):
    torch.manual_seed(0)
    length = TEXT_LEN + codes
    mask = pattern_mask(pattern, TEXT_LEN, SIDE)[:length, :length]
    given, weights = torch.randn(3, 2, 3, length, 8) * 2, torch.randn(2, 3, length, 8)
    found = []
    for blocks in (False, True):
        qkv = [x.clone().requires_grad_() for x in given]
        out = AxialBlocks.apply(*qkv, TEXT_LEN, SIDE, pattern == "axial_col") if blocks else attend(*qkv, mask)
        found.append([out, *torch.autograd.grad((out * weights).sum(), qkv)])
    for ours, expected in zip(found[1], found[0]):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("columns", [False, True])
def test_lines_are_undone(columns):
    x = torch.arange(2 * 3 * 11 * 5.0).view(2, 3, 11, 5)
    lines = to_lines(x, SIDE, columns)
    assert lines.shape == ((2 * SIDE, 3, 3, 5) if columns else (2 * 3, 3, SIDE, 5))
    assert torch.equal(from_lines(lines, 2, 11, SIDE, columns), x)


def test_a_bias_is_the_mask_in_aligned_rows():
    mask = pattern_mask("conv_like", TEXT_LEN, SIDE)
    bias = aligned_bias(mask, torch.float32)
    assert torch.equal(bias == 0, mask) and bias.shape == mask.shape and bias.stride(0) % ALIGNMENT == 0
    assert bias[~mask].max() == float("-inf")
