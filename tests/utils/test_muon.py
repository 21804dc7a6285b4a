"""Muon: orthogonal updates, the size of AdamW's; the same as torch's own where there is one."""

import pytest
import torch
from torch import nn

from utils.muon import Muon


def quadratic(optimizer, parameters, targets, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter - target).square().sum() for parameter, target in zip(parameters, targets)).backward()
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_equals_torchs_own_up_to_its_half_precision():
    torch.manual_seed(0)
    starts, targets = [torch.randn(16, 24), torch.randn(32, 8)], [torch.randn(16, 24), torch.randn(32, 8)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    quadratic(Muon(ours, **settings), ours, targets, 10)
    quadratic(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings), theirs, targets, 10)
    for own, other, start in zip(ours, theirs, starts):
        moved = (other - start).norm()
        assert moved > 0.5
        assert (own - other).norm() < 0.02 * moved


def test_a_kernel_moves_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    start, target = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    quadratic(Muon([kernel], lr=0.02), [kernel], [target], 5)
    quadratic(Muon([matrix], lr=0.02), [matrix], [target.flatten(1)], 5)
    torch.testing.assert_close(kernel.flatten(1), matrix)
