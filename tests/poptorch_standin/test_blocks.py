"""Blocks, stages and execution strategies."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.poptorch_standin.helpers import Net, Through, batch_of, options_of, trainer_of


def pipeline(poptorch, ids, accumulation=9, strategy=None, forward=None, training=True, layers=3):
    """An executor of a chain of layers, annotated with (user_id, ipu_id) or None each."""
    model = Through(forward or run_layers, layers=nn.ModuleList(nn.Linear(3, 3) for _ in range(layers)))
    for layer, pair in zip(model.layers, ids):
        if pair is not None:
            poptorch.BeginBlock(layer, *pair)
    strategy = strategy or poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    options = poptorch.Options().setExecutionStrategy(strategy)
    if training:
        options.Training.gradientAccumulation(accumulation)
        return trainer_of(poptorch, model, options)[0]
    return poptorch.inferenceModel(model, options.deviceIterations(accumulation))


def run_layers(m, x):
    out = x
    for layer in m.layers:
        out = layer(out)
    return F.mse_loss(out, x)


def test_blocks_and_stages_are_recorded(poptorch_standin):
    trainer = pipeline(poptorch_standin, [("a", 0), ("b", 1), ("c", 0)])
    trainer.compile(torch.ones(9, 3))
    trace = trainer.trace
    assert trace.blocks == [("a", 0), ("b", 1), ("c", 0)]
    assert trace.stages == {"a": 0, "b": 1, "c": 2}
    assert trace.ipu_of == {"layers.0": 0, "layers.1": 1, "layers.2": 0}
    assert trace.modules_by_block == {"a": ["layers.0"], "b": ["layers.1"], "c": ["layers.2"]}
    assert trace.parameter_ipus["layers.1.weight"] == {1}
    assert not torch.equal(trainer(torch.ones(9, 3)), torch.zeros(()))


def test_blocks_without_names_get_some(poptorch_standin):
    trainer = pipeline(poptorch_standin, [(None, 0), None, (None, 1)])
    trainer.compile(torch.ones(9, 3))
    assert [ipu for _, ipu in trainer.trace.blocks] == [0, 1] and len(trainer.trace.stages) == 2
    assert trainer.trace.ipu_of["layers.1"] == 0


@pytest.mark.parametrize(
    "ids, accumulation, message",
    [
        ([("a", 0), ("b", 1), ("c", 2)], 4, "gradientAccumulation of at least 5, not 4"),
        ([("a", 0), ("b", 1), ("a", 0)], 9, "cannot go backwards"),
        ([("a", 0), ("b", 1), ("a", 1)], 9, "on IPU 0 and on IPU 1"),
        ([None, ("b", 1), ("c", 2)], 9, "linear comes before the first block"),
    ],
)
def test_pipelines_are_refused(poptorch_standin, ids, accumulation, message):
    with pytest.raises(RuntimeError, match=message):
        pipeline(poptorch_standin, ids, accumulation).compile(torch.ones(accumulation, 3))


def test_pipeline_same_as_ipu(poptorch_standin):
    strategy = poptorch_standin.PipelinedExecution(poptorch_standin.AutoStage.SameAsIpu)
    pipeline(poptorch_standin, [("a", 0), ("b", 1)], strategy=strategy).compile(torch.ones(9, 3))
    with pytest.raises(RuntimeError, match="cannot go backwards"):
        pipeline(poptorch_standin, [("a", 1), ("b", 0)], strategy=strategy).compile(torch.ones(9, 3))


def test_sharded_models_go_anywhere(poptorch_standin):
    strategy = poptorch_standin.ShardedExecution(poptorch_standin.AutoStage.AutoIncrement)
    pipeline(poptorch_standin, [("a", 1), ("b", 0), ("a", 1)], 1, strategy).compile(torch.ones(1, 3))


def test_inference_pipelines(poptorch_standin):
    ids = [("a", 0), ("b", 1), ("c", 2)]
    with pytest.raises(RuntimeError, match="deviceIterations of at least 3, not 2"):
        pipeline(poptorch_standin, ids, 2, training=False).compile(torch.ones(2, 3))
    pipeline(poptorch_standin, ids, 3, training=False).compile(torch.ones(3, 3))
    options = options_of(poptorch_standin, accumulation=2)
    with pytest.raises(RuntimeError, match="gradientAccumulation 1"):
        poptorch_standin.inferenceModel(Net(), options).compile(*batch_of(2))


def test_begin_block_needs_a_call(poptorch_standin):
    """A method that is called instead of the module never enters its block."""

    def forward(m, x):
        out = m.layers[1].forward(m.layers[0](x))
        return F.mse_loss(out, x)

    with pytest.raises(RuntimeError, match="layers.1 never entered"):
        pipeline(poptorch_standin, [("a", 0), ("b", 1)], forward=forward, layers=2).compile(torch.ones(9, 3))
    layer = nn.Linear(1, 1)
    keys = list(layer.state_dict())
    assert poptorch_standin.BeginBlock(layer, ipu_id=0) is layer and list(layer.state_dict()) == keys
    with pytest.raises(AssertionError, match="one BeginBlock a module"):
        poptorch_standin.BeginBlock(layer, ipu_id=1)
    for arguments in ((lambda x: x,), (nn.Linear(1, 1), 1.5), (nn.Linear(1, 1), "a", "0")):
        with pytest.raises(TypeError):
            poptorch_standin.BeginBlock(*arguments)


def test_block_scopes(poptorch_standin):
    def forward(m, x, after=False, nested=False):
        with poptorch_standin.Block("a", 0):
            out = m.layers[0](x)
            if nested:
                with poptorch_standin.Block("c", 0):
                    out = out + 1
        if after:
            out = out + 1
        with poptorch_standin.Block("b", 1):
            return F.mse_loss(m.layers[1](out), x)

    trainer = pipeline(poptorch_standin, [], forward=forward)
    trainer.compile(torch.ones(9, 3))
    assert trainer.trace.blocks == [("a", 0), ("b", 1)]
    with pytest.raises(RuntimeError, match="No active Block.*add"):
        pipeline(poptorch_standin, [], forward=lambda m, x: forward(m, x, after=True)).compile(torch.ones(9, 3))
    with pytest.raises(RuntimeError, match="do not nest"):
        pipeline(poptorch_standin, [], forward=lambda m, x: forward(m, x, nested=True)).compile(torch.ones(9, 3))
