"""Compilation, what a call returns, and how weights pass between host and device."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.poptorch_standin.helpers import Net, Through, batch_of, infer, options_of, trainer_of


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
def test_inputs_are_refused(poptorch, x, message):
    trainer, _, _ = trainer_of(poptorch, options=options_of(poptorch, 2, 3, 2))
    with pytest.raises((poptorch.Error, RuntimeError), match=message):
        trainer.compile(x, torch.zeros(12, dtype=torch.int64))


def test_shapes_are_fixed(poptorch):
    trainer, _, _ = trainer_of(poptorch)
    x, y = batch_of(4)
    trainer.compile(x, y)
    assert trainer.isAttachedToDevice()
    for batch in ((x[:2], y[:2]), (x.half(), y), (x, y, y)):
        with pytest.raises(poptorch.Error, match="fixed at compile time"):
            trainer(*batch)
    with pytest.raises(TypeError, match="every input must be a tensor"):
        trainer(x, 3)
    with pytest.raises(TypeError):
        trainer(x, y=y)
    with pytest.raises(poptorch.Error, match="compiled already"):
        trainer.compile(x, y)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda m, x: x * x.sum().item(), "no value to read"),
        (lambda m, x: x if x.sum() > 0 else -x, "no value to read"),
        (lambda m, x: x.cpu(), "no value to read"),
        (lambda m, x: x.nonzero(), "determined by the tensor values"),
        (lambda m, x: x[x > 0], "determined by the tensor values"),
        (lambda m, x: F.one_hot(x.long()), "num classes must be specified"),
        (lambda m, x: x.tril(), "constants only"),
        (lambda m, x: x.bfloat16(), "bfloat16"),
        (lambda m, x: torch.rand(2, 3, device=x.device, generator=torch.Generator()), "no torch.Generator"),
        (lambda m, x: x + m.plain, r"Expected an IPU tensor but got tensor\(device=cpu, shape=\[3\]"),
        (lambda m, x: x + torch.ones(3, device="cpu"), "Expected an IPU tensor"),
        (lambda m, x: m.plain.copy_(x[0]), "Expected an IPU tensor"),
        (lambda m, x: setattr(m, "kept", x + 1) or x, "left IPU tensors in kept"),
        (lambda m, x: setattr(m, "mask", m.mask + 1) or x, "'mask' was reassigned"),
    ],
)
def test_forward_is_traced(poptorch, function, message):
    model = Through(function, plain=torch.ones(3))
    model.register_buffer("mask", torch.ones(3))
    with pytest.raises((poptorch.Error, RuntimeError), match=message):
        poptorch.inferenceModel(model).compile(torch.ones(2, 3))
    assert model.mask.tolist() == [1, 1, 1] and model.mask.device.type == "cpu"


def test_forward_may(poptorch):
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
    inference = poptorch.inferenceModel(model)
    out, _ = inference(torch.zeros(2, 3))
    assert out[0].tolist() == [4.0, 5.0, 8.0]
    assert inference(torch.zeros(2, 3))[0][0].tolist() == [5.0, 6.0, 8.0]  # the buffer counted on
    assert model.mask.tolist() == [0, 0, 0]


def test_what_was_compiled_is_what_runs(poptorch):
    """A number that changes between calls would be ignored by a compiled graph."""
    model = Through(lambda m, x: x * m.factor)
    model.factor = 2.0
    inference = poptorch.inferenceModel(model)
    inference(torch.ones(2))
    inference.model.factor = 3.0
    with pytest.raises(poptorch.Error, match="another way than when it was compiled"):
        inference(torch.ones(2))


def test_buffers_of_two_modules(poptorch):
    """One tensor in two modules becomes two on the IPU; state_dict() decides whether they are made one again."""

    def shared(persistent):
        model = Through(lambda m, x: m.b(m.a(x)), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
        mask = torch.ones(1)
        model.a.register_buffer("mask", mask, persistent=persistent)
        model.b.register_buffer("mask", mask, persistent=persistent)
        return poptorch.inferenceModel(model)

    with pytest.raises(KeyError, match="b.mask: the same tensor as a.mask"):
        shared(False).compile(torch.ones(1, 2))
    shared(True).compile(torch.ones(1, 2))


def test_64_bits_are_narrowed(poptorch):
    out = infer(poptorch, lambda m, x: x + 1, torch.tensor([2**32 + 5]))
    assert out.dtype == torch.int32 and out.item() == 6
    out = infer(poptorch, lambda m, x: x.double() * 2, torch.ones(1, dtype=torch.float64) + 1e-12)
    assert out.dtype == torch.float32 and out.item() == 2


def test_host_weights_are_stale_until_read(poptorch):
    trainer, model, _ = trainer_of(poptorch)
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


def test_detaching(poptorch):
    trainer, model, _ = trainer_of(poptorch)
    before, batch = model.first.weight.clone(), batch_of(2)
    with pytest.raises(poptorch.Error, match="not compiled"):
        trainer.copyWeightsToHost()
    trainer(*batch)
    trainer.detachFromDevice()
    assert not torch.equal(model.first.weight, before) and not trainer.isAttachedToDevice()
    with torch.no_grad():
        model.second.bias.add_(100)
    trainer(*batch)  # attaches by itself and takes the host's weights
    assert trainer.isAttachedToDevice() and trainer.state_dict()["second.bias"].min() > 90
    trainer.detachFromDevice()
    trainer.attachToDevice()
    trainer(*batch)
    trainer.destroy()
    trainer_of(poptorch, model)[0](*batch)


def test_four_ipus_are_acquired_and_given_up(poptorch):
    """As a machine with four IPUs would: at compile and attach, until detach, destroy or deletion."""
    options = poptorch.Options().replicationFactor(3)
    first, second = poptorch.inferenceModel(nn.Linear(1, 1)), poptorch.inferenceModel(nn.Linear(1, 1), options)
    x, rows = torch.ones(1, 1), torch.ones(3, 1)
    first(x), second(rows)
    third = poptorch.inferenceModel(nn.Linear(1, 1))
    with pytest.raises(poptorch.Error, match=r"Failed to acquire 1 IPU\(s\)") as failed:
        third(x)
    assert not isinstance(failed.value, RuntimeError) and "Failed" in failed.value.message
    assert not third.isCompiled()
    second.detachFromDevice()
    third(x)
    with pytest.raises(poptorch.Error, match="Failed to acquire 3"):
        second(rows)
    first.destroy()
    del third
    second(rows)
    assert second.isCompiled() and not first.isCompiled()
    assert all(issubclass(kind, poptorch.Error) for kind in (poptorch.RecoverableError, poptorch.UnrecoverableError))
