"""A model trained through the stand-in equals plain torch, in fp32 and in fp16; which losses are refused."""

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


def test_half_precision_works_in_place_and_is_not_mixed(poptorch_standin):
    """Whether or not torch's CPU has the operators for fp16."""
    x = torch.full((2, 2), 1.0).half()
    for _ in range(2):  # the second time torch 2.0 is not asked whether it has the operator
        out, total = infer(poptorch_standin, lambda m, x: _added_product(x), x)
        assert out.dtype == total.dtype == torch.float16
        assert out.tolist() == total.tolist() == [[2.0, 2.0], [2.0, 2.0]]
        with pytest.raises(RuntimeError, match="dtype|scalar type|Half"):
            infer(poptorch_standin, lambda m, x: x @ m.weight, x, weight=nn.Parameter(torch.ones(2, 2)))


def _added_product(x):
    total = torch.zeros(2, 2, dtype=torch.float16)
    return total.addmm_(x, x), total


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
