"""PopTorch's own operators: checkpoints, serialised products, for_loop and dynamic slices."""

import pytest
import torch
from torch import nn

from tests.poptorch_standin.helpers import Through, infer, trainer_of


def test_checkpoints_and_serialised_products(poptorch_standin):
    mode = poptorch_standin.MatMulSerializationMode

    def forward(m, x, factor=2):
        x, y = poptorch_standin.recomputationCheckpoint(x, x + 1)
        out = poptorch_standin.serializedMatMul(x, m.weight, mode.OutputChannels, factor, keep_precision=True)
        return poptorch_standin.identity_loss(out, "mean"), y

    weight = nn.Parameter(torch.ones(3, 4))
    trainer, _, _ = trainer_of(poptorch_standin, Through(forward, weight=weight))
    assert trainer(torch.ones(2, 3))[0] == 3
    assert trainer.trace.checkpoints == [((2, 3), (2, 3))]
    assert trainer.trace.serialized == [(mode.OutputChannels, 2, ((2, 3), (3, 4)))]
    with pytest.raises(RuntimeError, match="4 channels, which 3 does not divide"):
        infer(poptorch_standin, lambda m, x: forward(m, x, 3), torch.ones(2, 3), weight=weight)
    x, weight = torch.ones(4, 6), torch.ones(6, 10)
    for kind, factor in ((mode.InputChannels, 4), (mode.ReducingDim, 3), (mode.OutputChannels, 5), (mode.Disabled, 0)):
        assert poptorch_standin.serializedMatMul(x, weight, kind, factor).shape == (4, 10)
    for kind, factor in ((mode.InputChannels, 3), (mode.ReducingDim, 4), (mode.OutputChannels, 3)):
        with pytest.raises(RuntimeError, match="does not divide"):
            poptorch_standin.serializedMatMul(x, weight, kind, factor)
    for arguments in (("OutputChannels", 2), (mode.ReducingDim, 2.0), (mode.ReducingDim, 2, 1)):
        with pytest.raises(TypeError):
            poptorch_standin.serializedMatMul(x, weight, *arguments)


def test_for_loop(poptorch_standin):
    """Counts with a buffer; inputs are by value."""

    def forward(m, x):
        def body(i, total, parts):
            part = poptorch_standin.dynamic_slice(m.table, 0, i, 1, 1)
            parts = poptorch_standin.dynamic_update(parts, part, 0, i, 1)
            total.add_(part * x)
            return [i + 1, total, parts]

        start = [torch.zeros(1, dtype=torch.int32), x, torch.zeros(4, 2)]
        _, total, parts = poptorch_standin.for_loop(4, body, start)
        return total, parts, x + 0

    model = Through(forward)
    model.register_buffer("table", torch.arange(8.0).view(4, 2))
    inference = poptorch_standin.inferenceModel(model)
    total, parts, x = inference(torch.full((1, 2), 10.0))
    assert total.tolist() == [[130.0, 170.0]] and x.tolist() == [[10.0, 10.0]]
    assert torch.equal(parts, model.table) and inference.trace.loops == [4]
    learned = Through(forward, weight=nn.Parameter(torch.ones(1)))
    with pytest.raises(RuntimeError, match="inference models only"):
        trainer_of(poptorch_standin, learned)[0].compile(torch.ones(1, 2))


@pytest.mark.parametrize(
    "loop, error",
    [
        (lambda p, m, x: p.for_loop(x, lambda a: [a], [x]), TypeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [a], (x,)), ValueError),
        (lambda p, m, x: p.for_loop(2, lambda a: [a], [1]), TypeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [a, a], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [torch.cat([a, a])], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [a > 0], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [m.cache.add_(1) * a], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [m.host * a], [x]), RuntimeError),
        (lambda p, m, x: [p.dynamic_slice(x, 0, 1, 1, 1)], TypeError),
        (lambda p, m, x: [p.dynamic_slice(x, 0, x[:1].long(), x, 1)], TypeError),
        (lambda p, m, x: [p.dynamic_update(x, x, 0, x[:1].long(), 1)], RuntimeError),
        (lambda p, m, x: [p.set_available_memory(x, 2.0)], ValueError),
        (lambda p, m, x: [p.recomputationCheckpoint(m.host)], RuntimeError),
    ],
)
def test_loops_and_slices_refuse(poptorch_standin, loop, error):
    model = Through(lambda m, x: loop(poptorch_standin, m, x)[0], host=torch.ones(2))
    model.register_buffer("cache", torch.zeros(2))
    with pytest.raises(error):
        poptorch_standin.inferenceModel(model).compile(torch.ones(2))


def test_slices_read_and_write_where_asked(poptorch_standin):
    x, start = torch.arange(10).view(1, 10), torch.tensor([3])
    assert poptorch_standin.dynamic_slice(x, 1, start, 4, 2).tolist() == [[3, 5]]
    assert poptorch_standin.dynamic_update(x, x[:, :2], 1, start, 2).tolist() == [[0, 1, 2, 0, 1, 5, 6, 7, 8, 9]]
    with pytest.raises((IndexError, RuntimeError)):
        poptorch_standin.dynamic_slice(x, 1, torch.tensor([9]), 2, 1)
