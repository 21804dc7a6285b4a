"""Optimizers: what they refuse, what setOptimizer may change, and their state saved and loaded."""

import copy

import pytest
import torch
from torch import nn

from tests.poptorch_standin.helpers import Net, assert_same_weights, batch_of, trainer_of


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
