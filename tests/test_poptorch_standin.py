"""The stand-in for PopTorch: a model trained through it equals plain torch, and each refusal really refuses."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

STANDIN = Path(__file__).resolve().parent / "poptorch_standin"
PACKAGES = ("poptorch", "popart", "popdist", "horovod")
POPRUN = ("POPDIST_NUM_TOTAL_REPLICAS", "POPDIST_NUM_LOCAL_REPLICAS", "POPDIST_INSTANCE_INDEX", "POPDIST_NUM_INSTANCES")


def forget_packages():
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture
def poptorch_standin(monkeypatch):
    """The module poptorch, freshly imported."""
    monkeypatch.syspath_prepend(str(STANDIN))
    forget_packages()
    yield importlib.import_module("poptorch")
    forget_packages()


class Net(nn.Module):
    """Two layers and a loss; `dropout` draws on the device, `calls` is a buffer that forward writes to."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.dropout = nn.Linear(4, 8), nn.Linear(8, 3), dropout
        self.register_buffer("calls", torch.zeros(1))

    def scores(self, x):
        return self.second(F.dropout(torch.relu(self.first(x)), self.dropout))

    def forward(self, x, y):
        self.calls.add_(1)
        out = self.scores(x)
        return F.cross_entropy(out, y), out


class Through(nn.Module):
    """forward is a function of the module and its inputs."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def batch_of(size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def options_of(poptorch, iterations=1, accumulation=1, replicas=1, mode=None):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas).randomSeed(3)
    options.Training.gradientAccumulation(accumulation)
    return options if mode is None else options.outputMode(mode)


def trainer_of(poptorch, model=None, options=None, **attributes):
    """An executor, and the host model and optimizer that it was made of."""
    model = Net() if model is None else model
    optimizer = poptorch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **attributes})
    return poptorch.trainingModel(model, options, optimizer), model, optimizer


def infer(poptorch, function, *inputs, options=None, **members):
    return poptorch.inferenceModel(Through(function, **members), options)(*inputs)


# ---- what is there and what is not


def test_only_what_is_known_is_there(poptorch_standin):
    assert poptorch_standin.IS_STANDIN and "standin" in poptorch_standin.__version__
    assert poptorch_standin.ipuHardwareIsAvailable() is False
    with pytest.raises(AttributeError):
        poptorch_standin.ipuHardwareVersion  # noqa: B018
    with pytest.raises(AttributeError, match="no batchSize"):
        poptorch_standin.Options().batchSize(4)
    with pytest.raises(AttributeError, match="calling their setters"):
        poptorch_standin.Options().replication_factor = 2
    with pytest.raises(AttributeError):
        trainer_of(poptorch_standin)[0].train()
    for absent in (poptorch_standin.cond, poptorch_standin.custom_op):
        with pytest.raises(NotImplementedError, match="not in the stand-in"):
            absent()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda p, o: o.deviceIterations(0), ValueError),
        (lambda p, o: o.deviceIterations(2.0), TypeError),
        (lambda p, o: o.replicationFactor(True), TypeError),
        (lambda p, o: o.randomSeed("7"), TypeError),
        (lambda p, o: o.outputMode("All"), TypeError),
        (lambda p, o: o.outputMode(p.OutputMode.EveryN), ValueError),
        (lambda p, o: o.outputMode(p.OutputMode.All, 2), ValueError),
        (lambda p, o: o.setExecutionStrategy(p.AutoStage.AutoIncrement), TypeError),
        (lambda p, o: p.PipelinedExecution("AutoIncrement"), TypeError),
        (lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1}), TypeError),
        (lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1.5}), ValueError),
        (lambda p, o: o.setAvailableMemoryProportion({0: 0.5}), ValueError),
        (lambda p, o: o.setAvailableMemoryProportion([0.5]), TypeError),
        (lambda p, o: o.enableExecutableCaching(Path("cache")), TypeError),
        (lambda p, o: o.useOfflineIpuTarget("ipu2"), TypeError),
        (lambda p, o: o.enableSyntheticData(1), TypeError),
        (lambda p, o: o.connectionType("never"), TypeError),
        (lambda p, o: o.updatableNamedBuffers("mask"), TypeError),
        (lambda p, o: o.broadcastBuffers(False), NotImplementedError),
        (lambda p, o: o.Training.gradientAccumulation(-1), ValueError),
        (lambda p, o: o.Training.gradientAccumulation(n=1), TypeError),
        (lambda p, o: o.Training.accumulationAndReplicationReductionType("mean"), TypeError),
        (lambda p, o: o.Training.setAutomaticLossScaling(1), TypeError),
        (lambda p, o: o.Training.gradientClipping(1.0), AttributeError),
        (lambda p, o: o.Precision.enableStochasticRounding(1), TypeError),
        (lambda p, o: o.Precision.setPartialsType(torch.bfloat16), TypeError),
        (lambda p, o: o.TensorLocations.setOptimizerLocation(True), TypeError),
        (lambda p, o: p.TensorLocationSettings().useOnChipStorage(0), TypeError),
        (lambda p, o: o._Popart.set("outlineThreshold", 10), TypeError),
        (lambda p, o: o._Popart.set("outlineTreshold", 10.0), KeyError),
        (lambda p, o: o.Distributed.configureProcessId(2, 2), ValueError),
        (lambda p, o: p.Options(deviceIterations=2), TypeError),
    ],
)
def test_options_refuse(poptorch_standin, call, error):
    with pytest.raises(error):
        call(poptorch_standin, poptorch_standin.Options())


def test_options_take_chain_and_can_be_read(poptorch_standin):
    options = poptorch_standin.Options().deviceIterations(2).replicationFactor(3).autoRoundNumIPUs(True).logDir("logs")
    options.setExecutionStrategy(poptorch_standin.ShardedExecution(poptorch_standin.AutoStage.SameAsIpu))
    options.setAvailableMemoryProportion({"IPU0": 0.2, "IPU1": 0.6}).relaxOptimizerAttributesChecks(True)
    assert options.Training.gradientAccumulation(4).setAutomaticLossScaling(False) is options.Training
    off_chip = poptorch_standin.TensorLocationSettings().useOnChipStorage(False).useReplicatedTensorSharding(True)
    options.TensorLocations.setOptimizerLocation(off_chip)
    options._Popart.set("outlineThreshold", 10.0)
    numbers = options.device_iterations, options.Training.gradient_accumulation, options.replication_factor
    assert numbers == (2, 4, 3)
    assert options.output_mode is poptorch_standin.OutputMode.Default


@pytest.mark.parametrize("holder", ["loader", "inference", "training"])
def test_options_freeze(poptorch_standin, holder):
    options = poptorch_standin.Options()
    if holder == "loader":
        poptorch_standin.DataLoader(options, [torch.zeros(1)])
    elif holder == "inference":
        poptorch_standin.inferenceModel(Net(), options)
    else:
        trainer_of(poptorch_standin, options=options)
    for change in (options.deviceIterations, options.Training.gradientAccumulation, options.clone):
        if change == options.clone:
            assert options.clone().deviceIterations(2).Training.gradientAccumulation(2).gradient_accumulation == 2
        else:
            with pytest.raises(AttributeError, match="frozen"):
                change(2)
    with pytest.raises(AttributeError, match="frozen"):
        options._Popart.set("outlineThreshold", 1.0)


# ---- training against plain torch


def torch_training(kind, batches, accumulation, clip=None, model=None, **attributes):
    """The losses of each step and the weights after them, one optimizer step per entry of `batches`."""
    model = Net() if model is None else model
    optimizer = getattr(torch.optim, kind)(model.parameters(), **attributes)
    for x, y in batches:
        optimizer.zero_grad()
        for rows in range(0, len(x), len(x) // accumulation):
            part = slice(rows, rows + len(x) // accumulation)
            (F.cross_entropy(model.scores(x[part]), y[part]) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return dict(model.named_parameters())


def assert_same_weights(found, wanted, tolerance=1e-6):
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name].float(), weight.detach().float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("iterations, accumulation, replicas", [(1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_equals_torch(poptorch_standin, kind, iterations, accumulation, replicas, clip):
    attributes = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    model, micro_batches = Net(), accumulation * replicas
    optimizer = getattr(poptorch_standin.optim, kind)(
        model.parameters(), loss_scaling=64.0, max_grad_norm=clip, **attributes
    )
    options = options_of(poptorch_standin, iterations, accumulation, replicas)
    trainer = poptorch_standin.trainingModel(model, options, optimizer)
    calls = [batch_of(iterations * micro_batches * 2, seed) for seed in range(3)]
    updates = [part for x, y in calls for part in zip(x.chunk(iterations), y.chunk(iterations))]
    for x, y in calls:
        trainer(x, y)
    wanted = torch_training(kind, updates, micro_batches, clip, **attributes)
    assert_same_weights(trainer.state_dict(), wanted)
    assert (model.first.weight - Net().first.weight).abs().max() > 1e-3


def test_weight_decay_of_groups(poptorch_standin):
    model, oracle = Net(), Net()

    def groups(net):
        weights = [net.first.weight, net.second.weight]
        return [{"params": weights, "weight_decay": 0.5}, {"params": [net.first.bias, net.second.bias]}]

    optimizer = poptorch_standin.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.0)
    x, y = batch_of(6)
    trainer = poptorch_standin.trainingModel(model, None, optimizer)
    trainer(x, y)
    plain = torch.optim.AdamW(groups(oracle), lr=1e-2, weight_decay=0.0)
    oracle(x, y)[0].backward()
    plain.step()
    assert_same_weights(trainer.state_dict(), dict(oracle.named_parameters()))


def test_sum_reduction_is_a_larger_gradient(poptorch_standin):
    norms = {}
    for kind in (poptorch_standin.ReductionType.Mean, poptorch_standin.ReductionType.Sum):
        options = options_of(poptorch_standin, accumulation=4)
        options.Training.accumulationAndReplicationReductionType(kind)
        trainer, _, optimizer = trainer_of(poptorch_standin, options=options)
        trainer(*batch_of(8))
        norms[kind.name] = optimizer.state_dict()["ipu_state"]["Accl1___first.weight"].norm()
    torch.testing.assert_close(norms["Sum"], 4 * norms["Mean"])


def test_a_running_mean_is_the_same_mean(poptorch_standin):
    options = options_of(poptorch_standin, accumulation=4, replicas=2)
    strategy = poptorch_standin.MeanReductionStrategy.Running
    options.Training.setMeanAccumulationAndReplicationReductionStrategy(strategy)
    trainer, _, _ = trainer_of(poptorch_standin, options=options)
    trainer(*batch_of(16))
    assert_same_weights(trainer.state_dict(), torch_training("AdamW", [batch_of(16)], 8, lr=1e-2))


def test_half_precision(poptorch_standin):
    """fp16 weights run in fp16, moments are kept as asked, and an fp16 accumulator does not overflow as a mean."""
    half = dict.fromkeys(("accum_type", "first_order_momentum_accum_type"), torch.float16)
    options = options_of(poptorch_standin, accumulation=4)
    trainer, model, optimizer = trainer_of(poptorch_standin, Net().half(), options, loss_scaling=2.0**12, **half)
    x, y = batch_of(8)
    loss, out = trainer(x.half(), y)
    state = optimizer.state_dict()["ipu_state"]
    assert out.dtype == torch.float16 and model.first.weight.dtype == torch.float16
    assert state["Accl1___first.weight"].dtype == torch.float16
    assert state["Accl2___first.weight"].dtype == torch.float32
    assert_same_weights(trainer.state_dict(), torch_training("AdamW", [(x, y)], 4, lr=1e-2), 2e-3)


def test_fp16_accumulator_keeps_a_running_mean(poptorch_standin):
    """A sum of eight gradients of 12,000 exceeds fp16's 65,504; their mean does not."""
    finite = {}
    for kind in (poptorch_standin.ReductionType.Mean, poptorch_standin.ReductionType.Sum):
        options = options_of(poptorch_standin, accumulation=8)
        options.Training.accumulationAndReplicationReductionType(kind)
        model = Through(
            lambda m, x: poptorch_standin.identity_loss(m.weight * x, "sum"), weight=nn.Parameter(torch.ones(1))
        )
        trainer, _, _ = trainer_of(poptorch_standin, model, options, accum_type=torch.float16)
        trainer(torch.full((8, 1), 12000.0))
        finite[kind.name] = bool(trainer.state_dict()["weight"].isfinite())
    assert finite == {"Mean": True, "Sum": False}


# ---- optimizers


@pytest.mark.parametrize(
    "attributes, error",
    [
        ({"amsgrad": True}, ValueError),
        ({"accum_type": torch.bfloat16}, TypeError),
        ({"first_order_momentum_accum_type": "fp16"}, TypeError),
        ({"loss_scaling": torch.ones(1)}, TypeError),
        ({"foreach": True}, TypeError),
        ({"bias_correction": 1}, TypeError),
    ],
)
def test_optimizers_refuse(poptorch_standin, attributes, error):
    with pytest.raises(error):
        poptorch_standin.optim.AdamW(Net().parameters(), **attributes)


def test_optimizers_of_others_are_refused(poptorch_standin):
    class Custom(poptorch_standin.optim.Adam):
        def step(self, closure=None):
            return None

    model = Net()
    for optimizer in (torch.optim.Adam(model.parameters()), Custom(model.parameters())):
        with pytest.raises(TypeError, match="as they are"):
            poptorch_standin.trainingModel(model, None, optimizer)
    with pytest.raises(RuntimeError, match="has no optimizer"):
        poptorch_standin.inferenceModel(model).setOptimizer(poptorch_standin.optim.Adam(model.parameters()))
    with pytest.raises(RuntimeError, match="no step"):
        poptorch_standin.optim.Adam(model.parameters()).step()
    with pytest.raises(RuntimeError, match="lacks parameters.*second.bias"):
        poptorch_standin.trainingModel(model, None, poptorch_standin.optim.Adam(list(model.parameters())[:-1])).compile(
            *batch_of(2)
        )
    model = Net()
    with pytest.raises(RuntimeError, match="not the model's"):
        poptorch_standin.trainingModel(
            model, None, poptorch_standin.optim.Adam([*model.parameters(), nn.Parameter(torch.ones(1))])
        ).compile(*batch_of(2))


def test_learning_rate_arrives_by_set_optimizer_only(poptorch_standin):
    trainer, model, optimizer = trainer_of(poptorch_standin)
    trainer.compile(*batch_of(4))
    before = model.first.weight.clone()
    optimizer.param_groups[0]["lr"] = 0.0
    trainer(*batch_of(4))
    moved = trainer.state_dict()["first.weight"].clone()
    assert not torch.equal(moved, before)
    trainer.setOptimizer(optimizer)
    trainer(*batch_of(4))
    assert torch.equal(trainer.state_dict()["first.weight"], moved)


def test_what_was_not_given_is_constant(poptorch_standin):
    trainer, _, optimizer = trainer_of(poptorch_standin)
    trainer.compile(*batch_of(4))
    optimizer.param_groups[0]["lr"] = 0.5
    trainer.setOptimizer(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match="constants and cannot change.*weight_decay.*0.5"):
        trainer.setOptimizer(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.01
    optimizer.loss_scaling = 8.0
    with pytest.raises(RuntimeError, match="constants and cannot change"):
        trainer.setOptimizer(optimizer)
    with pytest.raises(RuntimeError, match="class"):
        trainer.setOptimizer(poptorch_standin.optim.Adam(optimizer.param_groups[0]["params"], lr=0.1))


def test_unexpected_attributes_are_told_unless_relaxed(poptorch_standin, recwarn):
    model = Net()
    optimizer = poptorch_standin.optim.Adam([{"params": model.parameters(), "initial_lr": 1.0}])
    poptorch_standin.inferenceModel(model)
    trainer = poptorch_standin.trainingModel(
        model, poptorch_standin.Options().relaxOptimizerAttributesChecks(True), optimizer
    )
    assert not recwarn
    trainer.destroy()
    with pytest.warns(UserWarning, match="initial_lr"):
        poptorch_standin.trainingModel(model, None, optimizer)


def test_optimizer_state_comes_and_goes(poptorch_standin):
    """A run that is stopped, saved and resumed equals one that went through."""
    batches = [batch_of(4, seed) for seed in range(4)]
    trainer, _, optimizer = trainer_of(poptorch_standin)
    state = optimizer.state_dict()
    assert state["ipu_state"] is None and state["ipu_param"] is None and state["state"] == {}
    for batch in batches[:2]:
        trainer(*batch)
    weights, state = copy.deepcopy(trainer.state_dict()), optimizer.state_dict()
    assert state["ipu_state"]["Step___first.weight"].item() == 2
    assert "Accl1___second.bias" in state["ipu_state"] and torch.is_tensor(state["ipu_param"]["lr___group0"])
    for batch in batches[2:]:
        trainer(*batch)

    model = Net()
    model.load_state_dict(weights)
    again = poptorch_standin.optim.AdamW(model.parameters(), lr=1e-2)
    again.load_state_dict(state)
    resumed = poptorch_standin.trainingModel(model, None, again)
    for batch in batches[2:]:
        resumed(*batch)
    assert_same_weights(resumed.state_dict(), trainer.state_dict(), 0)

    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="setOptimizer"):
        resumed(*batches[0])
    resumed.setOptimizer(again)
    resumed.load_state_dict(weights)
    for batch in batches[2:]:
        resumed(*batch)
    weights = {name: weight for name, weight in trainer.state_dict().items() if name != "calls"}
    assert_same_weights(resumed.state_dict(), weights, 0)


def test_other_optimizer_states_do_not_load(poptorch_standin):
    model = Net()
    optimizer = poptorch_standin.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="Only IPU optimizer states"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    odd = optimizer.state_dict()
    odd["ipu_state"] = {"Accl1___third.weight": torch.zeros(1)}
    optimizer.load_state_dict(odd)
    with pytest.raises(RuntimeError, match="differ"):
        poptorch_standin.trainingModel(model, None, optimizer).compile(*batch_of(2))


# ---- weights here and there


def test_host_weights_are_stale_until_read(poptorch_standin):
    trainer, model, _ = trainer_of(poptorch_standin)
    weight, before = model.first.weight, model.first.weight.clone()
    trainer(*batch_of(4))
    assert torch.equal(weight, before)
    next(model.parameters())
    assert not torch.equal(weight, before)
    before = weight.clone()
    trainer(*batch_of(4))
    trainer.copyWeightsToHost()
    assert not torch.equal(weight, before) and model.calls.item() == 2
    assert copy.deepcopy(model).__class__ is Net and type(model) is not Net
    trainer.destroy()
    assert type(model) is Net


def test_device_weights_change_on_demand_only(poptorch_standin):
    x, y = batch_of(4)
    model = Net()
    inference = poptorch_standin.inferenceModel(model)
    _, out = inference(x, y)
    with torch.no_grad():
        model.second.bias.add_(1)
    assert torch.equal(inference(x, y)[1], out)
    inference.copyWeightsToDevice()
    torch.testing.assert_close(inference(x, y)[1], out + 1)
    inference.load_state_dict(Net().state_dict())
    assert torch.equal(inference(x, y)[1], out)
    assert model.calls.item() == 0  # the buffer was written to on the device
    inference.copyWeightsToHost()
    assert model.calls.item() == 1


def test_named_buffers_can_be_sent_alone(poptorch_standin):
    model = Through(lambda m, x: x * m.scale + m.shift)
    model.register_buffer("scale", torch.ones(1))
    model.register_buffer("shift", torch.zeros(1))
    inference = poptorch_standin.inferenceModel(model, poptorch_standin.Options().updatableNamedBuffers(["scale"]))
    inference(torch.ones(1))
    model.scale.fill_(5)
    model.shift.fill_(7)
    inference.copyNamedBuffersToDevice()
    assert inference(torch.ones(1)).item() == 5


def test_inference_follows_training(poptorch_standin):
    x, y = batch_of(4)
    trainer, model, _ = trainer_of(poptorch_standin)
    inference = poptorch_standin.inferenceModel(model)
    outs = [inference(x, y)[1]]
    for _ in range(2):
        trainer(x, y)
        outs.append(inference(x, y)[1])
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    model.state_dict()
    oracle = Net()
    oracle.load_state_dict(trainer.state_dict())
    torch.testing.assert_close(outs[2], oracle.scores(x))
    with pytest.raises(RuntimeError, match="wrapped for training already"):
        trainer_of(poptorch_standin, model)


def test_random_numbers_are_the_devices_own(poptorch_standin):
    x = torch.zeros(2, 3)

    def draw(seed):
        options = poptorch_standin.Options()
        model = poptorch_standin.inferenceModel(
            Through(lambda m, x: torch.rand_like(x)), options if seed is None else options.randomSeed(seed)
        )
        return model(x), model(x)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = draw(1)
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack(draw(1)), torch.stack((first, second)))
    assert not torch.equal(draw(2)[0], first)
    assert not torch.equal(draw(None)[0], draw(None)[0])
    assert torch.equal(torch.get_rng_state(), state)
    model = poptorch_standin.inferenceModel(Through(lambda m, x: torch.rand_like(x)))
    model(x)
    kept = model.rng_state
    first = model(x)
    model.rng_state = kept
    assert torch.equal(model(x), first)


# ---- what comes back


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


# ---- compilation


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(10, 4), "10 is not a multiple of 12 = deviceIterations 2 .* 3 .* 2"),
        (torch.tensor(1.0), "none is not a multiple"),
        (torch.ones(12, 0), "zero-sized"),
        (torch.ones(12, 4, requires_grad=True), "requires_grad"),
        (torch.ones(12, 4, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_inputs_are_refused(poptorch_standin, x, message):
    trainer, _, _ = trainer_of(poptorch_standin, options=options_of(poptorch_standin, 2, 3, 2))
    with pytest.raises(RuntimeError, match=message):
        trainer.compile(x, torch.zeros(12, dtype=torch.int64))


def test_shapes_are_fixed(poptorch_standin):
    trainer, _, _ = trainer_of(poptorch_standin)
    x, y = batch_of(4)
    trainer.compile(x, y)
    assert trainer.isAttachedToDevice()
    for batch in ((x[:2], y[:2]), (x.half(), y), (x, y, y)):
        with pytest.raises(RuntimeError, match="fixed at compile time"):
            trainer(*batch)
    with pytest.raises(TypeError, match="every input must be a tensor"):
        trainer(x, 3)
    with pytest.raises(TypeError):
        trainer(x, y=y)
    with pytest.raises(RuntimeError, match="compiled already"):
        trainer.compile(x, y)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda m, x: x * x.sum().item(), "no value to read"),
        (lambda m, x: x if x.sum() > 0 else -x, "no value to read"),
        (lambda m, x: x * int(x[0, 0]), "no value to read"),
        (lambda m, x: x * x.tolist()[0][0], "no value to read"),
        (lambda m, x: x.cpu(), "no value to read"),
        (lambda m, x: x.to("cpu"), "no value to read"),
        (lambda m, x: x.nonzero(), "determined by the tensor values"),
        (lambda m, x: torch.where(x > 0)[0], "determined by the tensor values"),
        (lambda m, x: x[x > 0], "determined by the tensor values"),
        (lambda m, x: x.masked_select(x > 0), "determined by the tensor values"),
        (lambda m, x: torch.multinomial(x, 1), "determined by the tensor values"),
        (lambda m, x: F.one_hot(x.long()), "num classes must be specified"),
        (lambda m, x: x.topk(2, sorted=False)[0], "sorted=False"),
        (lambda m, x: x.tril(), "constants only"),
        (lambda m, x: x.bfloat16(), "bfloat16"),
        (lambda m, x: torch.rand(2, 3, device=x.device, generator=torch.Generator()), "no torch.Generator"),
        (lambda m, x: x + m.plain, r"Expected an IPU tensor but got tensor\(device=cpu, shape=\[3\]"),
        (lambda m, x: x + torch.ones(3, device="cpu"), "Expected an IPU tensor"),
        (lambda m, x: torch.ones(3, device="cpu"), "tensor of the host"),
        (lambda m, x: x + from_torch_import_ones(3), "Expected an IPU tensor"),
        (lambda m, x: torch.cat([x, m.plain[None]]), "Expected an IPU tensor"),
        (lambda m, x: m.plain.copy_(x[0]), "Expected an IPU tensor"),
        (lambda m, x: setattr(m, "kept", x + 1) or x, "left IPU tensors in kept"),
        (lambda m, x: setattr(m, "mask", m.mask + 1) or x, "'mask' was reassigned"),
        (lambda m, x: m.mask.set_(m.mask + 1) * x, "'mask' was reassigned"),
    ],
)
def test_forward_is_traced(poptorch_standin, function, message):
    model = Through(function, plain=torch.ones(3))
    model.register_buffer("mask", torch.ones(3))
    with pytest.raises(RuntimeError, match=message):
        poptorch_standin.inferenceModel(model).compile(torch.ones(2, 3))
    assert model.mask.tolist() == [1, 1, 1] and model.mask.device.type == "cpu"


from_torch_import_ones = torch.ones


def test_forward_may(poptorch_standin):
    """What is refused above, done right."""

    def function(m, x):
        assert x.device.type == "ipu" and m.mask.device == x.device
        m.mask.add_(1)
        x = x + torch.arange(3) + m.plain.to(x.device) + torch.ones(3, device=x.device) + m.mask
        x = torch.where(x > 0, x, -x).masked_fill(x > 90, 0.0)
        x[:, 0] = 7
        x = x + F.one_hot(torch.zeros(2, dtype=torch.long), 3) * torch.ones(3, 3).tril()[2]
        return x.topk(3)[0].sort(-1)[0], x.new_zeros(2)

    model = Through(function, plain=torch.ones(3))
    model.register_buffer("mask", torch.zeros(3))
    inference = poptorch_standin.inferenceModel(model)
    out, _ = inference(torch.zeros(2, 3))
    assert out[0].tolist() == [4.0, 5.0, 8.0]
    assert inference(torch.zeros(2, 3))[0][0].tolist() == [5.0, 6.0, 8.0]  # the buffer counted on
    assert model.mask.tolist() == [0, 0, 0]


def test_what_was_compiled_is_what_runs(poptorch_standin):
    """A number that changes between calls would be ignored by a compiled graph."""
    model = Through(lambda m, x: x * m.factor)
    model.factor = 2.0
    inference = poptorch_standin.inferenceModel(model)
    inference(torch.ones(2))
    inference.model.factor = 3.0
    with pytest.raises(RuntimeError, match="another way than when it was compiled"):
        inference(torch.ones(2))


def test_modes_are_those_of_compile_time(poptorch_standin):
    x = torch.ones(100)
    model = Through(lambda m, x: m.inner(x), inner=nn.Dropout(0.5)).eval()
    inference = poptorch_standin.inferenceModel(model)
    inference.compile(x)
    model.train()
    assert torch.equal(inference(x), x) and model.inner.training
    inference = poptorch_standin.inferenceModel(model)
    inference.compile(x)
    model.eval()
    assert not torch.equal(inference(x), x) and not model.inner.training


def test_buffers_of_two_modules(poptorch_standin):
    """One tensor in two modules becomes two on the IPU; state_dict() decides whether they are made one again."""

    def shared(persistent):
        model = Through(lambda m, x: m.b(m.a(x)), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
        mask = torch.ones(1)
        model.a.register_buffer("mask", mask, persistent=persistent)
        model.b.register_buffer("mask", mask, persistent=persistent)
        return poptorch_standin.inferenceModel(model)

    with pytest.raises(KeyError, match="b.mask: the same tensor as a.mask"):
        shared(False).compile(torch.ones(1, 2))
    shared(True).compile(torch.ones(1, 2))


def test_tied_weights_stay_tied(poptorch_standin):
    model = Through(lambda m, x: F.mse_loss(m.b(m.a(x)), x), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.b.weight = model.a.weight
    oracle = copy.deepcopy(model)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    trainer, _, _ = trainer_of(poptorch_standin, model)
    trainer(x)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2)
    oracle(x).backward()
    optimizer.step()
    assert_same_weights(trainer.state_dict(), oracle.state_dict())
    assert model.b.weight is model.a.weight


def test_state_dict_must_not_compute(poptorch_standin):
    class Joined(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if not keep_vars or self.always:
                destination[prefix + "weight"] = torch.cat([self.weight, self.weight])

    model = Joined(2, 2)
    model.always = True
    with pytest.raises(RuntimeError, match="outside of forward"):
        poptorch_standin.inferenceModel(model).compile(torch.ones(1, 2))
    model.always = False
    poptorch_standin.inferenceModel(model).compile(torch.ones(1, 2))
    assert model.state_dict()["weight"].shape == (4, 2)


# ---- losses


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda p, a, b: a + b, "Couldn't find a loss"),
        (lambda p, a, b: F.mse_loss(a, b) + F.l1_loss(a, b), "Multiple independent losses.*mse_loss, l1_loss"),
        (lambda p, a, b: [p.identity_loss(a, "sum"), p.identity_loss(b, "sum")], "Multiple independent losses"),
        (lambda p, a, b: p.identity_loss(a, "none"), "must be reduced"),
        (lambda p, a, b: F.cross_entropy(a, b.argmax(1), label_smoothing=0.1), "must go through identity_loss"),
        (lambda p, a, b: F.cross_entropy(a, b.argmax(1), weight=a.detach()[0]), "weight is unsupported"),
        (lambda p, a, b: p.identity_loss(a.sum(), "none").backward(), "no value to read"),
    ],
)
def test_losses_are_refused(poptorch_standin, loss, message):
    model = Through(lambda m, x: loss(poptorch_standin, m.a(x), x), a=nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=message):
        trainer_of(poptorch_standin, model)[0].compile(torch.ones(2, 3))


def test_combined_losses_are_one_through_identity_loss(poptorch_standin):
    def function(m, x):
        out = m.a(x)
        parts = F.mse_loss(out, x), F.l1_loss(out, x)
        return poptorch_standin.identity_loss(parts[0] + 2 * parts[1], "none"), *parts

    trainer, _, _ = trainer_of(poptorch_standin, Through(function, a=nn.Linear(3, 3)))
    total, squared, absolute = trainer(torch.ones(2, 3))
    torch.testing.assert_close(total, squared + 2 * absolute)
    assert trainer.trace.losses == ["mse_loss", "l1_loss", "identity_loss"]
    with pytest.raises(ValueError, match="reduction"):
        poptorch_standin.identity_loss(total, "average")


def test_gradient_is_the_losses_not_the_outputs(poptorch_standin):
    """What is done to a loss afterwards changes what comes back, not what is trained."""
    states = []
    for factor in (1, 100):
        model = Through(lambda m, x, factor=factor: F.mse_loss(m.a(x), x) * factor, a=nn.Linear(3, 3))
        nn.init.ones_(model.a.weight)
        nn.init.zeros_(model.a.bias)
        trainer, _, optimizer = trainer_of(poptorch_standin, model)
        trainer(torch.ones(2, 3))
        states.append(optimizer.state_dict()["ipu_state"]["Accl1___a.weight"])
    assert torch.equal(*states) and states[0].abs().max() > 0


# ---- blocks


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


# ---- operators


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


# ---- devices and files


def test_offline_targets_compile_only(poptorch_standin):
    for options in (
        poptorch_standin.Options().useOfflineIpuTarget(ipu_version=2),
        poptorch_standin.Options().connectionType(poptorch_standin.ConnectionType.Never),
    ):
        trainer, _, _ = trainer_of(poptorch_standin, options=options)
        trainer.compile(*batch_of(2))
        assert not trainer.isAttachedToDevice()
        with pytest.raises(RuntimeError, match="offline device"):
            trainer(*batch_of(2))


def test_detaching(poptorch_standin):
    trainer, model, _ = trainer_of(poptorch_standin)
    before, batch = model.first.weight.clone(), batch_of(2)
    with pytest.raises(RuntimeError, match="not compiled"):
        trainer.copyWeightsToHost()
    with pytest.raises(RuntimeError, match="has not run"):
        trainer.getLatency()
    trainer(*batch)
    assert trainer.cycleCount() > 0 and len(trainer.getLatency()) == 3
    trainer.detachFromDevice()
    assert not torch.equal(model.first.weight, before) and not trainer.isAttachedToDevice()
    with pytest.raises(RuntimeError, match="not attached"):
        trainer(*batch)
    trainer.attachToDevice()
    trainer(*batch)
    trainer.destroy()
    trainer_of(poptorch_standin, model)[0](*batch)


def test_files(poptorch_standin, tmp_path):
    cache, profile = tmp_path / "cache", tmp_path / "profile"

    def compiled(rows=4, seed=3):
        options = options_of(poptorch_standin).randomSeed(seed).enableProfiling(str(profile))
        trainer, _, _ = trainer_of(poptorch_standin, options=options.enableExecutableCaching(str(cache)))
        trainer.compile(*batch_of(rows))
        return trainer

    assert not compiled().trace.cache_hit and compiled().trace.cache_hit
    assert not compiled(rows=2).trace.cache_hit and not compiled(seed=4).trace.cache_hit
    assert len(list(cache.iterdir())) == 3 and (profile / "profile.pop").stat().st_size

    file = str(tmp_path / "model.poptorch")
    trainer_of(poptorch_standin)[0].compileAndExport(file, *batch_of(4))
    trainer, _, _ = trainer_of(poptorch_standin)
    trainer.loadExecutable(file)
    trainer(*batch_of(4))
    with pytest.raises(RuntimeError, match="another model"):
        trainer_of(poptorch_standin, Net(dropout=0.5))[0].loadExecutable(file)


# ---- loaders


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(int, 1)


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length=20):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


@pytest.mark.parametrize("mode", ["Sync", "Async", "AsyncRebatched"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_whole_batches_in_order(poptorch_standin, mode, workers):
    loader = poptorch_standin.DataLoader(
        options_of(poptorch_standin, 2, 3, 1),
        Numbers(),
        num_workers=workers,
        mode=getattr(poptorch_standin.DataLoaderMode, mode),
        rebatched_worker_size=4 if mode == "AsyncRebatched" else None,
    )
    assert loader.combinedBatchSize == 6 and len(loader) == 3
    for _ in range(2):
        rows = [index.tolist() for _, index in loader]
        assert rows == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    loader.terminate()
    with pytest.raises(RuntimeError, match="terminated"):
        iter(loader)


def test_asynchronous_batches_must_be_cloned(poptorch_standin):
    def load(mode, **more):
        loader = poptorch_standin.DataLoader(poptorch_standin.Options(), Numbers(), batch_size=2, mode=mode, **more)
        kept = [(batch, batch[1].tolist()) for batch in loader]
        return [batch[1].tolist() == was for batch, was in kept]

    modes = poptorch_standin.DataLoaderMode
    assert all(load(modes.Sync))
    assert load(modes.Async, async_options={"buffer_size": 3}) == 7 * [False] + 3 * [True]


def test_asynchronous_loaders_work_on_a_copy(poptorch_standin):
    dataset = Numbers()
    dataset.local = lambda: None
    with pytest.raises(RuntimeError, match="pickled"):
        poptorch_standin.DataLoader(poptorch_standin.Options(), dataset, mode=poptorch_standin.DataLoaderMode.Async)
    dataset = Numbers(4)
    loader = poptorch_standin.DataLoader(
        poptorch_standin.Options(), dataset, mode=poptorch_standin.DataLoaderMode.Async
    )
    dataset.length = 2
    assert len(list(loader)) == 4


def test_batch_samplers_give_combined_batches(poptorch_standin):
    def load(keys):
        options = options_of(poptorch_standin, accumulation=2)
        return [i.tolist() for _, i in poptorch_standin.DataLoader(options, Numbers(), batch_sampler=keys)]

    assert load([[5, 3], [1, 2, 7, 7]]) == [[5, 3], [1, 2, 7, 7]]
    with pytest.raises(RuntimeError, match="not a multiple of 2"):
        load([[5, 3, 1]])


def test_loader_shares_the_dataset_among_processes(poptorch_standin):
    options = poptorch_standin.Options()
    options.Distributed.configureProcessId(1, 2)
    shared = poptorch_standin.DataLoader(options, Numbers(), batch_size=5)
    whole = poptorch_standin.DataLoader(options, Numbers(), batch_size=5, auto_distributed_partitioning=False)
    assert [i[0].item() for _, i in shared] == [10, 15] and [i[0].item() for _, i in whole] == [0, 5, 10, 15]
    with pytest.raises(ValueError, match="auto_distributed_partitioning=False"):
        poptorch_standin.DataLoader(options, Numbers(), batch_sampler=[[1]])
    with pytest.raises(RuntimeError, match=r"popdist\.poptorch\.Options"):
        trainer_of(poptorch_standin, options=options)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"persistent_workers": True}, ValueError),
        ({"mode": "Async"}, TypeError),
        ({"rebatched": True, "batch_size": 1}, ValueError),
        ({"rebatched": True, "batch_size": 4, "rebatched_worker_size": 5}, ValueError),
        ({"rebatched": True, "batch_size": 4, "batch_sampler": [[1]]}, ValueError),
        ({"rebatched_worker_size": 1}, ValueError),
        ({"async_options": {"buffer_size": 2}}, ValueError),
        ({"rebatched": True, "batch_size": 4, "async_options": {"buffers": 2}}, ValueError),
        ({"rebatched": True, "batch_size": 4, "async_options": {"buffer_size": 2.0}}, TypeError),
        ({"batch_sampler": [[1]], "batch_size": 2}, ValueError),
        ({"batchsize": 2}, TypeError),
        ({"dataset": Endless()}, NotImplementedError),
        ({"options": None}, TypeError),
    ],
)
def test_loaders_refuse(poptorch_standin, arguments, error):
    arguments = {"options": poptorch_standin.Options(), "dataset": Numbers(), **arguments}
    if arguments.pop("rebatched", False):
        arguments["mode"] = poptorch_standin.DataLoaderMode.AsyncRebatched
    with pytest.raises(error):
        poptorch_standin.DataLoader(**arguments)


# ---- PopRun


def test_without_poprun(poptorch_standin, monkeypatch):
    for name in POPRUN:
        monkeypatch.delenv(name, raising=False)
    popdist, hvd = importlib.import_module("popdist"), importlib.import_module("horovod.torch")
    importlib.import_module("popart")
    assert not popdist.isPopdistEnvSet() and not hasattr(popdist, "poptorch")
    with pytest.raises(RuntimeError, match="not started by PopRun"):
        popdist.getInstanceIndex()
    with pytest.raises(ValueError, match=r"hvd\.init"):
        hvd.rank()
    hvd.init()
    assert (hvd.rank(), hvd.size(), hvd.local_rank()) == (0, 1, 0)
    assert hvd.allreduce(torch.tensor(3.0)).item() == 3 and hvd.broadcast(torch.ones(1), 0).item() == 1
    with pytest.raises(ValueError, match="root_rank"):
        hvd.broadcast(torch.ones(1), root_rank=1)


def test_poprun_presets_the_replicas(poptorch_standin, monkeypatch):
    for name, value in zip(POPRUN, "4210"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POPDIST_NUM_INSTANCES", "2")
    options = importlib.import_module("popdist.poptorch").Options(ipus_per_replica=2)
    assert options.replication_factor == 2 and options.replicationFactor(2) is options
    assert (options.Distributed.processId, options.Distributed.numProcesses) == (1, 2)
    with pytest.raises(RuntimeError, match="PopRun gave this instance 2"):
        options.replicationFactor(1)
    with pytest.raises(TypeError):
        type(options)(ipus_per_replica="2")


INSTANCE = """
import sys, torch
import horovod.torch as hvd, popdist, popdist.poptorch, poptorch
sys.path.insert(0, {tests!r})
from test_poptorch_standin import Net, batch_of
hvd.init()
model, rank = Net(), popdist.getInstanceIndex()
if rank == 1:
    torch.nn.init.zeros_(model.first.weight)
for parameter in model.parameters():
    parameter.data = hvd.broadcast(parameter.data, root_rank=0)
options = popdist.poptorch.Options(ipus_per_replica=1)
options.Training.gradientAccumulation(2)
trainer = poptorch.trainingModel(model, options, poptorch.optim.AdamW(model.parameters(), lr=1e-2))
x, y = batch_of(16)
for _ in range(3):
    loss, _ = trainer(x.chunk(2)[rank], y.chunk(2)[rank])
mean, total = hvd.allreduce(loss), hvd.allreduce(torch.tensor(rank + 1), op=hvd.Sum)
torch.save([trainer.state_dict(), mean, total, loss], f"{folder}/{{rank}}.pt")
"""


def test_two_instances_train_as_one(poptorch_standin, tmp_path):
    program = INSTANCE.format(tests=str(STANDIN.parent), folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STANDIN_STORE": str(tmp_path / "store")}
    environment["PYTHONPATH"] = os.pathsep.join((str(STANDIN), str(STANDIN.parent.parent)))
    running = []
    for rank in range(2):
        mine = {**environment, **dict(zip(POPRUN, "4202"))}
        mine["POPDIST_INSTANCE_INDEX"] = str(rank)
        running.append(subprocess.Popen([sys.executable, "-c", program], env=mine))
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    (weights, mean, total, loss), (others, *_, loss_of_other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert_same_weights(others, weights, 0)
    torch.testing.assert_close(mean, (loss + loss_of_other) / 2)
    assert total.item() == 3 and loss.shape == (2,)
    x, y = batch_of(16)
    assert_same_weights(weights, torch_training("AdamW", 3 * [(x, y)], 1, lr=1e-2))
