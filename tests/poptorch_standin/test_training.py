"""Training against plain torch in fp32 and fp16; optimizers and their state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.poptorch_standin.helpers import (
    Net,
    Through,
    assert_same_weights,
    batch_of,
    infer,
    options_of,
    torch_training,
    trainer_of,
)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("iterations, accumulation, replicas", [(1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_equals_torch(poptorch, kind, iterations, accumulation, replicas, clip):
    attributes = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    model, micro_batches = Net(), accumulation * replicas
    optimizer = getattr(poptorch.optim, kind)(model.parameters(), loss_scaling=64.0, max_grad_norm=clip, **attributes)
    options = options_of(poptorch, iterations, accumulation, replicas)
    trainer = poptorch.trainingModel(model, options, optimizer)
    calls = [batch_of(iterations * micro_batches * 2, seed) for seed in range(3)]
    updates = [part for x, y in calls for part in zip(x.chunk(iterations), y.chunk(iterations))]
    for x, y in calls:
        trainer(x, y)
    wanted = torch_training(kind, updates, micro_batches, clip, **attributes)
    assert_same_weights(trainer.state_dict(), wanted)
    assert (model.first.weight - Net().first.weight).abs().max() > 1e-3


def test_weight_decay_of_groups(poptorch):
    model, oracle = Net(), Net()

    def groups(net):
        weights = [net.first.weight, net.second.weight]
        return [{"params": weights, "weight_decay": 0.5}, {"params": [net.first.bias, net.second.bias]}]

    optimizer = poptorch.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.0)
    x, y = batch_of(6)
    trainer = poptorch.trainingModel(model, None, optimizer)
    trainer(x, y)
    plain = torch.optim.AdamW(groups(oracle), lr=1e-2, weight_decay=0.0)
    oracle(x, y)[0].backward()
    plain.step()
    assert_same_weights(trainer.state_dict(), dict(oracle.named_parameters()))


def test_half_precision(poptorch):
    """fp16 weights run in fp16, moments are kept as asked, and an fp16 accumulator does not overflow as a mean."""
    half = dict.fromkeys(("accum_type", "first_order_momentum_accum_type"), torch.float16)
    options = options_of(poptorch, accumulation=4)
    trainer, model, optimizer = trainer_of(poptorch, Net().half(), options, loss_scaling=2.0**12, **half)
    x, y = batch_of(8)
    loss, out = trainer(x.half(), y)
    state = optimizer.state_dict()["ipu_state"]
    assert out.dtype == torch.float16 and model.first.weight.dtype == torch.float16
    assert state["Accl1___first.weight"].dtype == torch.float16
    assert state["Accl2___first.weight"].dtype == torch.float32
    assert_same_weights(trainer.state_dict(), torch_training("AdamW", [(x, y)], 4, lr=1e-2), 2e-3)


def test_half_precision_works_in_place_and_is_not_mixed(poptorch):
    """Whether or not torch's CPU has the operators for fp16."""
    x = torch.full((2, 2), 1.0).half()
    for _ in range(2):  # the second time torch 2.0 is not asked whether it has the operator
        out, total = infer(poptorch, lambda m, x: _added_product(x), x)
        assert out.dtype == total.dtype == torch.float16
        assert out.tolist() == total.tolist() == [[2.0, 2.0], [2.0, 2.0]]
        with pytest.raises(RuntimeError, match="dtype|scalar type|Half"):
            infer(poptorch, lambda m, x: x @ m.weight, x, weight=nn.Parameter(torch.ones(2, 2)))


def _added_product(x):
    total = torch.zeros(2, 2, dtype=torch.float16)
    return total.addmm_(x, x), total


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
def test_losses_are_refused(poptorch, loss, message):
    model = Through(lambda m, x: loss(poptorch, m.a(x), x), a=nn.Linear(3, 3))
    with pytest.raises((poptorch.Error, RuntimeError), match=message):
        trainer_of(poptorch, model)[0].compile(torch.ones(2, 3))


def test_combined_losses_are_one_through_identity_loss(poptorch):
    def function(m, x):
        out = m.a(x)
        parts = F.mse_loss(out, x), F.l1_loss(out, x)
        return poptorch.identity_loss(parts[0] + 2 * parts[1], "none"), *parts

    trainer, _, _ = trainer_of(poptorch, Through(function, a=nn.Linear(3, 3)))
    total, squared, absolute = trainer(torch.ones(2, 3))
    torch.testing.assert_close(total, squared + 2 * absolute)
    assert trainer.trace.losses == ["mse_loss", "l1_loss", "identity_loss"]
    with pytest.raises(ValueError, match="reduction"):
        poptorch.identity_loss(total, "average")


def test_gradient_is_the_losses_not_the_outputs(poptorch):
    """What is done to a loss afterwards changes what comes back, not what is trained."""
    states = []
    for factor in (1, 100):
        model = Through(lambda m, x, factor=factor: F.mse_loss(m.a(x), x) * factor, a=nn.Linear(3, 3))
        nn.init.ones_(model.a.weight)
        nn.init.zeros_(model.a.bias)
        trainer, _, optimizer = trainer_of(poptorch, model)
        trainer(torch.ones(2, 3))
        states.append(optimizer.state_dict()["ipu_state"]["Accl1___a.weight"])
    assert torch.equal(*states) and states[0].abs().max() > 0


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
def test_optimizers_refuse(poptorch, attributes, error):
    with pytest.raises(error):
        poptorch.optim.AdamW(Net().parameters(), **attributes)


def test_optimizers_of_others_are_refused(poptorch):
    class Custom(poptorch.optim.Adam):
        def step(self, closure=None):
            return None

    model = Net()
    for optimizer in (torch.optim.Adam(model.parameters()), Custom(model.parameters())):
        with pytest.raises(TypeError, match="as it is"):
            poptorch.trainingModel(model, None, optimizer)
    with pytest.raises(poptorch.Error, match="has no optimizer"):
        poptorch.inferenceModel(model).setOptimizer(poptorch.optim.Adam(model.parameters()))
    with pytest.raises(RuntimeError, match="no step"):
        poptorch.optim.Adam(model.parameters()).step()
    with pytest.raises(poptorch.Error, match="lacks parameters.*second.bias"):
        poptorch.trainingModel(model, None, poptorch.optim.Adam(list(model.parameters())[:-1])).compile(*batch_of(2))
    model = Net()
    with pytest.raises(poptorch.Error, match="not the model's"):
        poptorch.trainingModel(
            model, None, poptorch.optim.Adam([*model.parameters(), nn.Parameter(torch.ones(1))])
        ).compile(*batch_of(2))


def test_learning_rate_arrives_by_set_optimizer_only(poptorch):
    trainer, model, optimizer = trainer_of(poptorch)
    trainer.compile(*batch_of(4))
    before = model.first.weight.clone()
    optimizer.param_groups[0]["lr"] = 0.0
    trainer(*batch_of(4))
    moved = trainer.state_dict()["first.weight"].clone()
    assert not torch.equal(moved, before)
    trainer.setOptimizer(optimizer)
    trainer(*batch_of(4))
    assert torch.equal(trainer.state_dict()["first.weight"], moved)


def test_what_was_not_given_is_constant(poptorch):
    trainer, _, optimizer = trainer_of(poptorch)
    trainer.compile(*batch_of(4))
    optimizer.param_groups[0]["lr"] = 0.5
    trainer.setOptimizer(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(poptorch.Error, match="constants and cannot change.*weight_decay.*0.5"):
        trainer.setOptimizer(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.01
    optimizer.loss_scaling = 8.0
    with pytest.raises(poptorch.Error, match="constants and cannot change"):
        trainer.setOptimizer(optimizer)
    with pytest.raises(poptorch.Error, match="class"):
        trainer.setOptimizer(poptorch.optim.Adam(optimizer.param_groups[0]["params"], lr=0.1))


def test_optimizer_state_comes_and_goes(poptorch):
    """A run that is stopped, saved and resumed equals one that went through."""
    batches = [batch_of(4, seed) for seed in range(4)]
    trainer, _, optimizer = trainer_of(poptorch)
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
    again = poptorch.optim.AdamW(model.parameters(), lr=1e-2)
    again.load_state_dict(state)
    resumed = poptorch.trainingModel(model, None, again)
    for batch in batches[2:]:
        resumed(*batch)
    assert_same_weights(resumed.state_dict(), trainer.state_dict(), 0)

    again.load_state_dict(state)
    with pytest.raises(poptorch.Error, match="setOptimizer"):
        resumed(*batches[0])
    resumed.setOptimizer(again)
    resumed.load_state_dict(weights)
    for batch in batches[2:]:
        resumed(*batch)
    weights = {name: weight for name, weight in trainer.state_dict().items() if name != "calls"}
    assert_same_weights(resumed.state_dict(), weights, 0)


def test_other_optimizer_states_do_not_load(poptorch):
    model = Net()
    optimizer = poptorch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    odd = optimizer.state_dict()
    odd["ipu_state"] = {"Accl1___third.weight": torch.zeros(1)}
    optimizer.load_state_dict(odd)
    with pytest.raises(poptorch.Error, match="differ"):
        poptorch.trainingModel(model, None, optimizer).compile(*batch_of(2))


def test_unexpected_attributes_are_warned_of(poptorch):
    model = Net()
    optimizer = poptorch.optim.Adam([{"params": model.parameters(), "initial_lr": 1.0}])
    with pytest.warns(UserWarning, match="initial_lr"):
        poptorch.trainingModel(model, None, optimizer)


def test_fp16_accumulator_keeps_a_running_mean(poptorch):
    """A sum of eight gradients of 12,000 exceeds fp16's 65,504; their mean does not."""
    model = Through(lambda m, x: poptorch.identity_loss(m.weight * x, "sum"), weight=nn.Parameter(torch.ones(1)))
    options = options_of(poptorch, accumulation=8)
    trainer, _, _ = trainer_of(poptorch, model, options, accum_type=torch.float16)
    trainer(torch.full((8, 1), 12000.0))
    assert trainer.state_dict()["weight"].isfinite()
