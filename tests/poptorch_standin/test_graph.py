"""Blocks and stages, PopTorch's own operators, and the losses of a training graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.poptorch_standin.helpers import Through, trainer_of


def pipeline(poptorch, ids, accumulation=9, strategy=None, forward=None, training=True, layers=3):
    """Wrap a chain of layers, each annotated with (user_id, ipu_id) or None."""
    model = Through(forward or run_layers, layers=nn.ModuleList(nn.Linear(3, 3) for _ in range(layers)))
    for layer, pair in zip(model.layers, ids):
        if pair is not None:
            poptorch.BeginBlock(layer, *pair)
    strategy = strategy or poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    options = poptorch.Options().setExecutionStrategy(strategy).autoRoundNumIPUs(True)
    if training:
        options.Training.gradientAccumulation(accumulation)
        return trainer_of(poptorch, model, options)[0]
    return poptorch.inferenceModel(model, options.deviceIterations(accumulation))


def run_layers(m, x):
    out = x
    for layer in m.layers:
        out = layer(out)
    return F.mse_loss(out, x)


def test_blocks_and_stages_are_recorded(poptorch):
    trainer = pipeline(poptorch, [("a", 0), ("b", 1), ("c", 0)])
    trainer.compile(torch.ones(9, 3))
    trace = trainer.trace
    assert trace.blocks == [("a", 0), ("b", 1), ("c", 0)]
    assert trace.stages == {"a": 0, "b": 1, "c": 2}
    assert trace.ipu_of == {"layers.0": 0, "layers.1": 1, "layers.2": 0}
    assert trace.parameter_ipus["layers.1.weight"] == {1}
    assert not torch.equal(trainer(torch.ones(9, 3)), torch.zeros(()))


@pytest.mark.parametrize(
    "ids, accumulation, message",
    [
        ([("a", 0), ("b", 1), ("c", 2)], 4, "gradientAccumulation of at least 5, not 4"),
        ([("a", 0), ("b", 1), ("a", 0)], 9, "cannot go backwards"),
        ([("a", 0), ("b", 1), ("a", 1)], 9, "on IPU 0 and on IPU 1"),
        ([None, ("b", 1), ("c", 2)], 9, "linear comes before the first block"),
    ],
)
def test_pipelines_are_refused(poptorch, ids, accumulation, message):
    with pytest.raises(poptorch.Error, match=message):
        pipeline(poptorch, ids, accumulation).compile(torch.ones(accumulation, 3))


def test_begin_block_needs_a_call(poptorch):
    """A method that is called instead of the module never enters its block."""

    def forward(m, x):
        out = m.layers[1].forward(m.layers[0](x))
        return F.mse_loss(out, x)

    with pytest.raises(poptorch.Error, match="layers.1 never entered"):
        pipeline(poptorch, [("a", 0), ("b", 1)], forward=forward, layers=2).compile(torch.ones(9, 3))
    layer = nn.Linear(1, 1)
    keys = list(layer.state_dict())
    assert poptorch.BeginBlock(layer, ipu_id=0) is layer and list(layer.state_dict()) == keys
    with pytest.raises(AssertionError, match="one BeginBlock for each module"):
        poptorch.BeginBlock(layer, ipu_id=1)
    for arguments in ((lambda x: x,), (nn.Linear(1, 1), 1.5), (nn.Linear(1, 1), "a", "0")):
        with pytest.raises(TypeError):
            poptorch.BeginBlock(*arguments)


def test_for_loop(poptorch):
    """A loop that reads a buffer and counts; its inputs are passed by value."""

    def forward(m, x):
        def body(i, total, parts):
            part = m.table.index_select(0, i)
            parts = poptorch.dynamic_update(parts, part, 0, i, 1)
            total.add_(part * x)
            return [i + 1, total, parts]

        start = [torch.zeros(1, dtype=torch.int32), x, torch.zeros(4, 2)]
        _, total, parts = poptorch.for_loop(4, body, start)
        return total, parts, x + 0

    model = Through(forward)
    model.register_buffer("table", torch.arange(8.0).view(4, 2))
    inference = poptorch.inferenceModel(model)
    total, parts, x = inference(torch.full((1, 2), 10.0))
    assert total.tolist() == [[130.0, 170.0]] and x.tolist() == [[10.0, 10.0]]
    assert torch.equal(parts, model.table) and inference.trace.loops == [4]
    trained = Through(forward, weight=nn.Parameter(torch.ones(1)))
    with pytest.raises(poptorch.Error, match="inference models only"):
        trainer_of(poptorch, trained)[0].compile(torch.ones(1, 2))


@pytest.mark.parametrize(
    "loop, error",
    [
        (lambda p, m, x: p.for_loop(x, lambda a: [a], [x]), TypeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [a, a], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [torch.cat([a, a])], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [m.cache.add_(1) * a], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [m.host * a], [x]), RuntimeError),
        (lambda p, m, x: [p.dynamic_update(x, x, 0, 1, 2)], TypeError),
        (lambda p, m, x: [p.dynamic_update(x, x.half(), 0, x[:1].long(), 2)], RuntimeError),
        (lambda p, m, x: [p.dynamic_update(x, x, 0, x[:1].long(), 1)], RuntimeError),
    ],
)
def test_loops_and_updates_refuse(poptorch, loop, error):
    model = Through(lambda m, x: loop(poptorch, m, x)[0], host=torch.ones(2))
    model.register_buffer("cache", torch.zeros(2))
    with pytest.raises(error):
        poptorch.inferenceModel(model).compile(torch.ones(2))
