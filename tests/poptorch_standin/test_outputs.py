"""What a call returns: output modes, tuples and lists, no gradients, dtypes of at most 32 bits."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from tests.poptorch_standin.helpers import Through, batch_of, infer, options_of, trainer_of


def test_output_modes(poptorch_standin):
    modes = poptorch_standin.OutputMode
    x, y = batch_of(24)
    x[:, 0] = torch.arange(24)

    def call(mode, replicas, period=None):
        options = options_of(poptorch_standin, iterations=2, accumulation=2, replicas=replicas).outputMode(mode, period)
        model = Through(
            lambda m, x: (poptorch_standin.identity_loss(m.weight * x[:, 0], "mean"), [x[:, 0]]),
            weight=nn.Parameter(torch.ones(1)),
        )
        trainer, _, _ = trainer_of(poptorch_standin, model, options, lr=0.0)
        loss, (rows,) = trainer(x)
        return loss, rows

    means = x[:, 0].view(8, 3).mean(1)
    loss, rows = call(modes.Default, 2)
    assert loss.tolist() == means[6:].tolist() and rows.tolist() == list(range(18, 24))
    loss, rows = call(modes.All, 2)
    assert loss.tolist() == means.tolist() and rows.tolist() == list(range(24))
    loss, rows = call(modes.Sum, 2)
    assert loss.tolist() == [means[0::2].sum(), means[1::2].sum()]
    assert rows.tolist() == x[:, 0].view(4, 6).sum(0).tolist()
    loss, rows = call(modes.EveryN, 2, 2)
    assert loss.tolist() == means[[2, 3, 6, 7]].tolist() and len(rows) == 12
    for mode in (modes.Final, modes.Sum):
        assert call(mode, 1)[0].dim() == 0
    assert call(modes.All, 1)[0].shape == (4,)
    with pytest.raises(RuntimeError, match="does not divide"):
        call(modes.EveryN, 1, 3)


def test_outputs_are_tuples_and_lists(poptorch_standin):
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    x = torch.ones(2, 3)
    out = infer(poptorch_standin, lambda m, x: (x, [x + 1, (x + 2,)]), x)
    assert type(out) is tuple and type(out[1]) is list and out[1][1][0][0, 0] == 3
    for function in (lambda m, x: Pair(x, x), lambda m, x: {"x": x}, lambda m, x: None, lambda m, x: (x, 1)):
        with pytest.raises(TypeError, match="forward returned"):
            infer(poptorch_standin, function, x)
    with pytest.raises(TypeError, match="refuses; return a plain tuple"):
        infer(poptorch_standin, lambda m, x: Pair(x, x), x)


def test_outputs_have_no_gradient(poptorch_standin):
    loss, _ = trainer_of(poptorch_standin)[0](*batch_of(2))
    with pytest.raises(RuntimeError):
        loss.backward()


def test_64_bits_are_narrowed(poptorch_standin):
    out = infer(poptorch_standin, lambda m, x: x + 1, torch.tensor([2**32 + 5]))
    assert out.dtype == torch.int32 and out.item() == 6
    out = infer(poptorch_standin, lambda m, x: x.double() * 2, torch.ones(1, dtype=torch.float64) + 1e-12)
    assert out.dtype == torch.float32 and out.item() == 2


def test_synthetic_data(poptorch_standin):
    out = infer(
        poptorch_standin, lambda m, x: x, torch.ones(2), options=poptorch_standin.Options().enableSyntheticData(True)
    )
    assert out.isnan().all()
