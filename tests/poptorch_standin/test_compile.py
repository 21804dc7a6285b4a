"""Compilation: fixed shapes, what forward may do and may not, and shared buffers and weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.poptorch_standin.helpers import Through, assert_same_weights, batch_of, options_of, trainer_of

from_torch_import_ones = torch.ones


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
