"""Training on the stand-in for PopTorch: means of losses, learning rate, precision, states and files, evaluation."""

import copy

import pytest
import torch

import backends
from models.vqgan_files import load_vqgan
from tests.backends.ipu.ipu_runs import settings, trainer_of
from tests.builders import samples, small_dalle
from training import checkpoints
from utils import checkpoint


def test_half_precision_only_where_it_is_asked_for(poptorch_standin, tiny_vae):
    half, single = torch.float16, torch.float32
    for flags, accumulator, momentum, scaling in (
        ("", single, single, 1),
        ("--loss-scaling 1024", single, single, 1024),
        ("--precision auto --fp16", half, single, 1),
        ("--precision auto --fp16 --enable-half-first-order-momentum --loss-scaling 64", half, half, 64),
        ("--precision fp16 --fp16 false", half, single, 1),
        ("--precision auto --fp16 false", single, single, 1),
    ):
        backend = backends.for_training(settings(flags))
        optimizer = backend.trainer(small_dalle(tiny_vae)).optimizer
        assert backend.half == (accumulator == half) and optimizer.accum_type == accumulator, flags
        assert optimizer.first_order_momentum_accum_type == momentum, flags
        assert (optimizer.second_order_momentum_accum_type, optimizer.loss_scaling) == (single, scaling)
        assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_half_precision_learns_what_single_does(poptorch_standin, tiny_vae):
    losses = []
    for flags in ("--precision fp16 --fp16 --enable-half-first-order-momentum --loss-scaling 4096", "--precision fp32"):
        trainer, batch = trainer_of(tiny_vae, flags)
        losses.append([trainer.step(batch)["total"] for _ in range(4)])
        trainer.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[1][3] < losses[1][0] - 0.1


def test_the_host_model_stays_as_it_was(poptorch_standin, tiny_vae):
    """Placement, precision and training happen to a copy; the fingerprint of its VQGAN is that of the run."""
    model = small_dalle(tiny_vae)
    before = copy.deepcopy(model)
    backend = backends.for_training(settings("--precision fp16 --embedding-serialization-factor 2"))
    trainer, batch = backend.trainer(model), samples(3)
    trainer.compile(batch)
    trainer.step(batch)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), atol=0, rtol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    weights = trainer.state_dict()["weights"]
    assert sorted(weights) == sorted(model.state_dict())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not torch.equal(weights["text_emb.weight"], model.text_emb.weight)


@pytest.mark.parametrize("flags", ["", "--embedding-serialization-factor 4 --optimizer AdamW --weight-decay 0.1"])
def test_a_state_that_went_through_a_file_goes_on_exactly(poptorch_standin, tiny_vae, tmp_path, flags, logged):
    trainer, batch = trainer_of(tiny_vae, flags)
    for _ in range(2):
        trainer.step(batch)
    state = trainer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    expected = [trainer.step(batch) for _ in range(3)]
    trainer.close()

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for compile_first in (False, True):
        again = backends.for_training(settings(flags)).trainer(small_dalle(tiny_vae))
        if compile_first:
            again.compile(batch)
        again.load_state_dict(saved)
        if not compile_first:
            again.compile(batch)
        assert [again.step(batch) for _ in range(3)] == expected
        again.close()
    assert "afresh" not in logged.text
    fresh = backends.for_training(settings(flags)).trainer(small_dalle(tiny_vae))
    fresh.load_state_dict({**saved, "opt_state": None})
    fresh.compile(batch)
    assert [fresh.step(batch) for _ in range(3)] != expected  # without moments it is another run


def test_states_go_from_machine_to_machine(poptorch_standin, tiny_vae, logged):
    on_ipu, batch = trainer_of(tiny_vae, "--embedding-serialization-factor 2")
    on_ipu.step(batch)
    on_cpu = backends.for_training(settings(device="cpu")).trainer(small_dalle(tiny_vae))
    micro_batches = list(zip(*(part.split(1) for part in batch)))
    for source, target in ((on_ipu, on_cpu), (on_cpu, on_ipu)):
        logged.clear()
        state = copy.deepcopy(source.state_dict())
        target.load_state_dict(state)
        assert ("starts afresh" in logged.text) == (target is on_ipu)  # PopTorch loads only its own optimizers' state
        for _ in range(3):
            losses = [trainer.evaluate([batch if trainer is on_ipu else micro_batches]) for trainer in (source, target)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
            if target is on_cpu:  # with the same moments, updates are the same, too
                on_ipu.step(batch)
                on_cpu.step(micro_batches)


def test_evaluation_changes_nothing(poptorch_standin, tiny_vae):
    """It draws no dropout, updates no weight, sees the weights of now, and training goes on as without it."""
    flags = "--replication-factor 2"
    dropouts = {"ff_dropout": 0.5, "attn_dropout": 0.5}
    backend = backends.for_training(settings(flags))
    plain, watched = (backend.trainer(small_dalle(tiny_vae, **dropouts)) for _ in range(2))
    batch = samples(6)
    plain.compile(batch)
    expected = [plain.step(batch) for _ in range(3)]
    plain.close()  # the machine has four IPUs, and each trainer wants them
    watched.compile(batch)
    for step in expected:
        losses = watched.evaluate([batch])
        by_hand = small_dalle(tiny_vae, **dropouts).eval()
        by_hand.load_state_dict(watched.state_dict()["weights"])
        with torch.no_grad():
            assert losses["total"] == pytest.approx(float(by_hand(*batch, return_loss=True).total), rel=1e-5)
        assert watched.evaluate([batch]) == losses
        assert step == watched.step(batch) != losses


def test_a_small_set_is_evaluated_exactly(poptorch_standin, tiny_vae):
    flags = "--gradient-accumulation 20 --replication-factor 2"  # 40 samples a step
    trainer, _ = trainer_of(tiny_vae, flags)
    text, codes = samples(10, seed=5)
    assert trainer.backend.evaluation_samples(10) == 10
    losses = trainer.evaluate(trainer.backend.loader(list(zip(text, codes)), [list(range(10))], 10))
    with torch.no_grad():
        expected = small_dalle(tiny_vae).eval()(text, codes, return_loss=True)
    assert losses == pytest.approx({name: float(loss) for name, loss in expected._asdict().items()}, rel=1e-5)


def test_files_have_the_canonical_names(poptorch_standin, tiny_vqgan):
    """Whatever the serialisation, from codes or pixels, with the VQGAN's weights untouched by fp16."""
    vae = load_vqgan(tiny_vqgan)
    model = small_dalle(vae)
    for flags in ("", "--no-codes-cache --byteio", "--no-codes-cache --precision fp16"):
        backend = backends.for_training(settings(flags, "--embedding-serialization-factor 4"))
        trainer, fingerprint = backend.trainer(model), vae.fingerprint()
        text, codes = samples(3)
        pixels = torch.rand(3, 3, 32, 32)
        batch = (text, codes) if not flags else (text, pixels if "byteio" not in flags else (pixels * 255).byte())
        trainer.compile(batch)
        trainer.step(batch)
        weights = checkpoints.canonical_weights(trainer.state_dict()["weights"])
        assert checkpoint.first_misfit(model, checkpoint.model_weights(weights)) is None
        assert vae.fingerprint() == fingerprint
        for name, tensor in vae.state_dict().items():
            assert torch.equal(weights[f"model.vae.{name}"], tensor)
        trainer.close()
