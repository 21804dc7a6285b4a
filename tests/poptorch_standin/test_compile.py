"""Compilation, what a call returns, and how weights pass between host and device."""

import copy
from typing import NamedTuple

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
    trainer_of,
)

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


def test_modes_are_those_of_compile_time(poptorch):
    x = torch.ones(100)
    model = Through(lambda m, x: m.inner(x), inner=nn.Dropout(0.5)).eval()
    inference = poptorch.inferenceModel(model)
    inference.compile(x)
    model.train()
    assert torch.equal(inference(x), x) and model.inner.training
    inference = poptorch.inferenceModel(model)
    inference.compile(x)
    model.eval()
    assert not torch.equal(inference(x), x) and not model.inner.training


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


def test_tied_weights_stay_tied(poptorch):
    model = Through(lambda m, x: F.mse_loss(m.b(m.a(x)), x), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.b.weight = model.a.weight
    oracle = copy.deepcopy(model)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    trainer, _, _ = trainer_of(poptorch, model)
    trainer(x)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2)
    oracle(x).backward()
    optimizer.step()
    assert_same_weights(trainer.state_dict(), oracle.state_dict())
    assert model.b.weight is model.a.weight


def test_state_dict_must_not_compute(poptorch):
    class Joined(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if not keep_vars or self.always:
                destination[prefix + "weight"] = torch.cat([self.weight, self.weight])

    model = Joined(2, 2)
    model.always = True
    with pytest.raises(poptorch.Error, match="outside of forward"):
        poptorch.inferenceModel(model).compile(torch.ones(1, 2))
    model.always = False
    poptorch.inferenceModel(model).compile(torch.ones(1, 2))
    assert model.state_dict()["weight"].shape == (4, 2)


def test_output_modes(poptorch):
    x, modes = torch.arange(24.0)[:, None], poptorch.OutputMode

    def call(mode, replicas):
        options = options_of(poptorch, iterations=2, accumulation=2, replicas=replicas).outputMode(mode)
        model = Through(
            lambda m, x: (poptorch.identity_loss(m.weight * x[:, 0], "mean"), [x[:, 0]]),
            weight=nn.Parameter(torch.ones(1)),
        )
        trainer, _, _ = trainer_of(poptorch, model, options, lr=0.0)
        loss, (rows,) = trainer(x)
        trainer.destroy()
        return loss, rows

    means = x[:, 0].view(8, 3).mean(1)
    loss, rows = call(modes.Default, 2)
    assert loss.tolist() == means[6:].tolist() and rows.tolist() == list(range(18, 24))
    loss, rows = call(modes.All, 2)
    assert loss.tolist() == means.tolist() and rows.tolist() == list(range(24))
    loss, rows = call(modes.Sum, 2)
    assert loss.tolist() == [means[0::2].sum(), means[1::2].sum()]
    assert rows.tolist() == x[:, 0].view(4, 6).sum(0).tolist()
    assert call(modes.Final, 1)[0].dim() == call(modes.Sum, 1)[0].dim() == 0
    assert call(modes.All, 1)[0].shape == (4,)


def test_outputs_are_tuples_and_lists(poptorch):
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    x = torch.ones(2, 3)
    out = infer(poptorch, lambda m, x: (x, [x + 1, (x + 2,)]), x)
    assert type(out) is tuple and type(out[1]) is list and out[1][1][0][0, 0] == 3
    for function in (lambda m, x: Pair(x, x), lambda m, x: {"x": x}, lambda m, x: None, lambda m, x: (x, 1)):
        with pytest.raises(TypeError, match="forward returned"):
            infer(poptorch, function, x)
    with pytest.raises(TypeError, match="refuses; return a plain tuple"):
        infer(poptorch, lambda m, x: Pair(x, x), x)


def test_outputs_have_no_gradient(poptorch):
    loss, _ = trainer_of(poptorch)[0](*batch_of(2))
    with pytest.raises(RuntimeError):
        loss.backward()


def test_64_bits_are_narrowed(poptorch):
    out = infer(poptorch, lambda m, x: x + 1, torch.tensor([2**32 + 5]))
    assert out.dtype == torch.int32 and out.item() == 6
    out = infer(poptorch, lambda m, x: x.double() * 2, torch.ones(1, dtype=torch.float64) + 1e-12)
    assert out.dtype == torch.float32 and out.item() == 2


def test_synthetic_data(poptorch):
    out = infer(poptorch, lambda m, x: x, torch.ones(2), options=poptorch.Options().enableSyntheticData(True))
    assert out.isnan().all()


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


def test_device_weights_change_on_demand_only(poptorch):
    x, y = batch_of(4)
    model = Net()
    inference = poptorch.inferenceModel(model)
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


def test_inference_follows_training(poptorch):
    x, y = batch_of(4)
    trainer, model, _ = trainer_of(poptorch)
    inference = poptorch.inferenceModel(model)
    outs = [inference(x, y)[1]]
    for _ in range(2):
        trainer(x, y)
        outs.append(inference(x, y)[1])
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    model.state_dict()
    oracle = Net()
    oracle.load_state_dict(trainer.state_dict())
    torch.testing.assert_close(outs[2], oracle.scores(x))
    with pytest.raises(poptorch.Error, match="wrapped for training already"):
        trainer_of(poptorch, model)


def test_random_numbers_are_the_devices_own(poptorch):
    x = torch.zeros(2, 3)

    def draw(seed):
        options = poptorch.Options()
        model = poptorch.inferenceModel(
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


def test_offline_targets_compile_only(poptorch):
    trainer, _, _ = trainer_of(poptorch, options=poptorch.Options().useOfflineIpuTarget(ipu_version=2))
    trainer.compile(*batch_of(2))
    assert not trainer.isAttachedToDevice()
    with pytest.raises(poptorch.Error, match="offline device"):
        trainer(*batch_of(2))


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


def test_executables_are_cached_by_all_that_makes_them(poptorch, tmp_path):
    cache, profile = tmp_path / "cache", tmp_path / "profile"

    def hit(rows=4, seed=3, model=None, lr=1e-2):
        options = options_of(poptorch).randomSeed(seed).enableProfiling(str(profile / str(rows)))
        trainer, _, _ = trainer_of(poptorch, model, options.enableExecutableCaching(str(cache)), lr=lr)
        trainer.compile(*batch_of(rows))
        return trainer.trace.cache_hit

    assert not hit() and hit() and hit(lr=0.5)  # a variable is not part of the graph
    assert not hit(rows=2) and not hit(seed=4) and not hit(model=Net(dropout=0.5))
    assert len(list(cache.iterdir())) == 4 and (profile / "2" / "profile.pop").stat().st_size
