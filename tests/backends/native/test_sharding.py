"""Two processes do what one does, with --shard with half of the model each, and give and take the same states."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.testing import assert_close as assert_all_close

import backends
from backends.native.backend import NativeTrainingBackend, split_step
from tests.backends.native.test_backend import COMPARABLE, OPTIMIZERS, micro_batches, settings
from tests.builders import TORCHRUN, one_line, python, samples, small_dalle
from tests.conftest import ROOT, TinyTokenizer

PER_STEP, STEPS = 12, 3
SETTINGS = dict(batch_size=2, gradient_accumulation=6, max_grad_norm=0.02, weight_decay=0.1, ema_decay=0.9)
assert_close = functools.partial(assert_all_close, check_device=False)
needs_fsdp2 = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="fully_shard came with torch 2.6")


def dalle_with_vqgan():
    """A small DALLE whose image tokenizer has weights, as a VQGAN has."""
    vae = TinyTokenizer()
    vae.codebook = nn.Embedding(32, 6)
    nn.init.ones_(vae.codebook.weight)
    return small_dalle(vae, depth=3)  # matrices that two processes cannot share evenly


def pictures(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def alone(steps, start=None, **changes):
    """A trainer of one process after `steps`, from `start` (first step, state) on, and its losses."""
    backend = NativeTrainingBackend(settings(**{**SETTINGS, **changes}))
    trainer = backend.trainer(dalle_with_vqgan())
    first, state = start or (0, None)
    if state:
        trainer.load_state_dict(state)
    losses = [trainer.step(micro_batches(backend, samples(PER_STEP, seed))) for seed in range(first, first + steps)]
    return trainer, losses


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Run sharded_runs.py in two processes that share each model; return the folder of its results and its output."""
    folder = tmp_path_factory.mktemp("sharded")
    for optimizer in OPTIMIZERS:
        torch.save(alone(STEPS, optimizer=optimizer)[0].state_dict(), folder / f"start_{optimizer}.pt")
    ended = python(*TORCHRUN, "tests/backends/native/sharded_runs.py", folder, env={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


@pytest.fixture(scope="module")
def shared(launched):
    """What the two processes made of each model, by rank."""
    return [torch.load(launched[0] / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@needs_fsdp2
def test_no_thread_of_the_process_group_outlives_its_work(launched):
    """A thread that releases tensors after the interpreter has ended aborts the process, now and then."""
    before, after = (re.findall(f"^{when} (.*)", launched[1], re.M) for when in ("before", "after"))
    assert len(before) == len(after) == 2 and all("gloo" in names for names in before)
    assert not any("gloo" in names for names in after), after


@needs_fsdp2
@pytest.mark.parametrize("optimizer", COMPARABLE)
def test_two_processes_with_half_each_train_as_one(shared, optimizer):
    whole, losses = alone(2 * STEPS, optimizer=optimizer)
    first, second = (each[optimizer] for each in shared)
    for ours, theirs, expected in zip(first["losses"], second["losses"], losses[STEPS:]):
        assert ours == theirs == pytest.approx(expected, rel=1e-5)
    state = whole.state_dict()
    for kind in ("weights", "ema_weights"):
        assert_close(first["state"][kind], state[kind], atol=1e-6, rtol=0)
    assert any(not torch.equal(average, state["weights"][name]) for name, average in state["ema_weights"].items())
    assert len(first["state"]["opt_state"]) == len(state["opt_state"])
    for ours, expected in zip(first["state"]["opt_state"], state["opt_state"]):
        assert ours["param_groups"] == expected["param_groups"]
        for number, moments in expected["state"].items():
            assert_close(ours["state"][number], moments, atol=1e-7, rtol=1e-3)
    unclipped, _ = alone(2 * STEPS, optimizer=optimizer, max_grad_norm=None)
    if optimizer != "Muon":  # which heeds no gradient's size in its first steps
        with pytest.raises(AssertionError):
            assert_close(first["state"]["weights"], unclipped.state_dict()["weights"], atol=1e-6, rtol=0)
    expected, _ = alone(3 * STEPS, optimizer=optimizer)  # from their state one process goes on as if it had been alone
    resumed, _ = alone(STEPS, (2 * STEPS, first["state"]), optimizer=optimizer)
    assert_close(resumed.state_dict()["weights"], expected.state_dict()["weights"], atol=2e-6, rtol=0)


@needs_fsdp2
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_process_holds_half(shared, optimizer):
    model = dalle_with_vqgan()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = {id(parameter) for parameter in model.transformer.parameters() if parameter.dim() == 2}
    whole = sum(parameter.numel() for parameter in trained)
    for rank, each in enumerate(shared):
        parts = [(parameter, parameter.chunk(2)[rank]) for parameter in trained if len(parameter) > 1 or not rank]
        count = sum(part.numel() for _, part in parts)
        assert 0.45 * whole < count < 0.55 * whole  # what has one row is not divided
        assert each[optimizer]["parameters"] == each[optimizer]["gradients"] == 4 * count
        in_muon = sum(part.numel() for parameter, part in parts if id(parameter) in matrices)  # one moment, not two
        assert each[optimizer]["moments"] == 4 * (2 * count - in_muon * (optimizer == "Muon"))
    assert [each[optimizer]["vqgan"] for each in shared] == [4 * 32 * 6] * 2  # whole in both


@needs_fsdp2
def test_pictures_are_evaluated_as_by_one_and_one_process_may_have_more(shared):
    text, codes = samples(PER_STEP)
    for name, steps, images in (("evaluated", STEPS, pictures(PER_STEP)), ("unevenly", 2 * STEPS, codes)):
        trainer, _ = alone(steps, optimizer="Adam")
        expected = trainer.evaluate([micro_batches(trainer.backend, (text, images))])
        for each in shared:
            assert each["Adam"][name] == pytest.approx(expected, rel=1e-6)


@needs_fsdp2
def test_half_precision_is_that_of_one(shared):
    _, half = alone(STEPS, optimizer="AdamW", precision="bf16", max_grad_norm=None)
    _, full = alone(STEPS, optimizer="AdamW", max_grad_norm=None)
    for ours, expected, exact in zip(shared[0]["bf16"], half, full):
        assert ours["total"] == pytest.approx(expected["total"], rel=2e-4)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
        assert ours["total"] != exact["total"]


def test_what_cannot_be_shared_out_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(backends.native.backend, "has_cuda", lambda: True)
    monkeypatch.setattr(backends.native.backend, "claim_gpu", lambda rank: torch.device("cuda", rank))
    monkeypatch.setattr(backends.native.backend, "use_cudnn_attention", lambda *given: False)
    on_two = "not with --precision fp16" if hasattr(fsdp, "fully_shard") else "needs torch 2.6"
    for processes, reason in (("1", "there is only one process; start several with torchrun"), ("2", on_two)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with one_line(f"--shard: {reason}"):
            NativeTrainingBackend(settings(shard=True, precision="fp16", device="cuda"))


def test_processes_take_together_what_one_takes():
    for batch_size, count, size, expected in (
        (4, 6, 1, (4, 6)),
        (4, 6, 3, (4, 2)),
        (8, 1, 2, (4, 1)),  # smaller micro-batches if there is only one
        (4, 3, 2, (3, 2)),  # six samples each, in the largest micro-batches that fit
        (1, 8, 8, (1, 1)),
    ):
        assert split_step(batch_size, count, size) == expected
    with pytest.raises(ValueError, match="^one step takes 9 samples .* not a multiple of the 2 processes$"):
        split_step(3, 3, 2)
