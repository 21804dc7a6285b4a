"""The stand-in refuses what PopTorch would. tests/cpu_ipu_test.py shows that it trains as plain torch does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

poptorch = pytest.fixture(lambda poptorch_standin: poptorch_standin)


class Through(nn.Module):
    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def trainer_of(poptorch, model, options=None):
    return poptorch.trainingModel(model, options, poptorch.optim.AdamW(model.parameters(), lr=1e-2))


def test_forward_is_traced(poptorch):
    for function, message in (
        (lambda m, x: x * x.sum().item(), "no value to read"),
        (lambda m, x: x if x.sum() > 0 else -x, "no value to read"),
        (lambda m, x: x.cpu(), "no value to read"),
        (lambda m, x: x.nonzero(), "determined by the tensor values"),
        (lambda m, x: x[x > 0], "determined by the tensor values"),
        (lambda m, x: F.one_hot(x.long()), "num classes must be specified"),
        (lambda m, x: x.tril(), "no handler for aten::tril"),
        (lambda m, x: x.nan_to_num(), "no handler for aten::nan_to_num"),
        (lambda m, x: x.t().add_(1), "goes through a view"),
        (lambda m, x: x.bfloat16(), "bfloat16"),
        (lambda m, x: torch.rand(2, 3, device=x.device, generator=torch.Generator()), "no torch.Generator"),
        (lambda m, x: x + m.plain, r"Expected an IPU tensor but got tensor\(device=cpu, shape=\[3\]"),
        (lambda m, x: x + torch.ones(3, device="cpu"), "Expected an IPU tensor"),
        (lambda m, x: m.plain.copy_(x[0]), "Expected an IPU tensor"),
        (lambda m, x: setattr(m, "kept", x + 1) or x, "left IPU tensors in kept"),
        (lambda m, x: setattr(m, "mask", m.mask + 1) or x, "'mask' was reassigned"),
    ):
        model = Through(function, plain=torch.ones(3))
        model.register_buffer("mask", torch.ones(3))
        with pytest.raises((poptorch.Error, RuntimeError), match=message):
            poptorch.inferenceModel(model).compile(torch.ones(2, 3))
        assert model.mask.tolist() == [1, 1, 1] and model.mask.device.type == "cpu"


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


def test_pipelines_are_refused(poptorch):
    for ids, accumulation, message in (
        ([("a", 0), ("b", 1), ("c", 2)], 4, "gradientAccumulation of at least 5, not 4"),
        ([("a", 0), ("b", 1), ("a", 0)], 9, "cannot go backwards"),
        ([("a", 0), ("b", 1), ("a", 1)], 9, "on IPU 0 and on IPU 1"),
        ([None, ("b", 1), ("c", 2)], 9, "linear comes before the first block"),
    ):
        layers = nn.Sequential(*(nn.Linear(3, 3) for _ in ids))
        for layer, pair in zip(layers, ids):
            if pair is not None:
                poptorch.BeginBlock(layer, *pair)
        options = poptorch.Options().autoRoundNumIPUs(True)
        options.Training.gradientAccumulation(accumulation)
        options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
        trainer = trainer_of(poptorch, Through(lambda m, x: F.mse_loss(m.layers(x), x), layers=layers), options)
        with pytest.raises(poptorch.Error, match=message):
            trainer.compile(torch.ones(accumulation, 3))


def test_loops_and_updates_refuse(poptorch):
    for loop, error in (
        (lambda p, m, x: p.for_loop(x, lambda a: [a], [x]), TypeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [a, a], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [torch.cat([a, a])], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [m.cache.add_(1) * a], [x]), RuntimeError),
        (lambda p, m, x: p.for_loop(2, lambda a: [m.host * a], [x]), RuntimeError),
        (lambda p, m, x: [p.dynamic_update(x, x, 0, 1, 2)], TypeError),
        (lambda p, m, x: [p.dynamic_update(x, x.half(), 0, x[:1].long(), 2)], RuntimeError),
        (lambda p, m, x: [p.dynamic_update(x, x, 0, x[:1].long(), 1)], RuntimeError),
    ):
        model = Through(lambda m, x, loop=loop: loop(poptorch, m, x)[0], host=torch.ones(2))
        model.register_buffer("cache", torch.zeros(2))
        with pytest.raises(error):
            poptorch.inferenceModel(model).compile(torch.ones(2))


def test_asynchronous_batches_must_be_cloned(poptorch):
    def stay_as_they_were(mode):
        loader = poptorch.DataLoader(poptorch.Options(), list(range(20)), batch_size=2, mode=mode)
        kept = [(batch, batch.tolist()) for batch in loader]
        return [batch.tolist() == was for batch, was in kept]

    assert all(stay_as_they_were(poptorch.DataLoaderMode.Sync))
    assert stay_as_they_were(poptorch.DataLoaderMode.Async) == 7 * [False] + 3 * [True]


def test_losses_are_refused(poptorch):
    for loss, message in (
        (lambda p, a, b: a + b, "Couldn't find a loss"),
        (lambda p, a, b: F.mse_loss(a, b) + F.l1_loss(a, b), "Multiple independent losses.*mse_loss, l1_loss"),
        (lambda p, a, b: [p.identity_loss(a, "sum"), p.identity_loss(b, "sum")], "Multiple independent losses"),
        (lambda p, a, b: p.identity_loss(a, "none"), "must be reduced"),
        (lambda p, a, b: F.cross_entropy(a, b.argmax(1), label_smoothing=0.1), "must go through identity_loss"),
        (lambda p, a, b: F.cross_entropy(a, b.argmax(1), weight=a.detach()[0]), "weight is unsupported"),
        (lambda p, a, b: p.identity_loss(a.sum(), "none").backward(), "no value to read"),
    ):
        model = Through(lambda m, x, loss=loss: loss(poptorch, m.a(x), x), a=nn.Linear(3, 3))
        with pytest.raises((poptorch.Error, RuntimeError), match=message):
            trainer_of(poptorch, model).compile(torch.ones(2, 3))
