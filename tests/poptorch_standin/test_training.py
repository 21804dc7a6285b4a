"""Training against plain torch in fp32 and fp16; optimizers and their state."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.poptorch_standin.helpers import (
    Net,
    Through,
    assert_same_weights,
    batch_of,
    options_of,
    torch_training,
    trainer_of,
)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("iterations, accumulation, replicas, clip", [(1, 1, 1, None), (2, 3, 2, 0.05)])
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


def test_fp16_accumulator_keeps_a_running_mean(poptorch):
    """A sum of eight gradients of 12,000 exceeds fp16's 65,504; their mean does not."""
    model = Through(lambda m, x: poptorch.identity_loss(m.weight * x, "sum"), weight=nn.Parameter(torch.ones(1)))
    options = options_of(poptorch, accumulation=8)
    trainer, _, _ = trainer_of(poptorch, model, options, accum_type=torch.float16)
    trainer(torch.full((8, 1), 12000.0))
    assert trainer.state_dict()["weight"].isfinite()
