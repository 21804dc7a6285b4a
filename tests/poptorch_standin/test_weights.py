"""Weights of the host and of the device: when they pass from one to the other; the device's random numbers."""

import copy

import pytest
import torch

from tests.poptorch_standin.helpers import Net, Through, batch_of, trainer_of


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
