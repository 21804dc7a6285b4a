"""A native step against loops written out with torch alone: accumulation, clipping, decay, Muon, resuming, loading."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

import backends
from backends.native import backend as native
from backends.native.backend import NativeBackend, NativeTrainingBackend, pick_device, pick_precision
from backends.native.inference import _container_memory, packer
from backends.native.trainer import build_optimizers
from data.loader import EpochOrder, GeneratedDataset, RunOrder
from models.packed_sampler import LayerKernels
from models.sampling import Sampling, sample_codes
from tests.builders import WholePassStepper, cpu_only, samples, small_dalle, train_settings
from utils.muon import Muon

OPTIMIZERS = ["Adam", "AdamW", "Muon"]
COMPARABLE = ["Adam", "AdamW", pytest.param("Muon", marks=cpu_only("GPUs compute Muon's updates in bf16"))]
LR = 1e-3


def settings(**changes):
    return train_settings("--batch-size 2", **{"learning_rate": LR, **changes})


def trained(vae, steps, **changes):
    """A trainer after `steps` steps over the same samples however they are cut, and the losses of each step."""
    backend = NativeTrainingBackend(settings(**changes))
    assert backend.samples_per_step == 12
    trainer = backend.trainer(small_dalle(vae))
    trainer.set_lr(LR)
    return trainer, [trainer.step(micro_batches(backend, samples(12, seed))) for seed in range(steps)]


def micro_batches(backend, whole):
    return list(zip(*(part.split(backend.settings.batch_size) for part in whole)))


def weights_of(model):
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def by_hand(model, batches, optimizer, lr, decay, limit=None):
    """Train in plain torch, one whole batch a step; decay what has two dimensions; return weights and losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() == 2], "weight_decay": decay}]
    groups += [{"params": [p for p in trained if p.dim() != 2], "weight_decay": 0}]
    optimizer, losses = optimizer(groups, lr=lr, eps=1e-6, betas=(0.9, 0.98)), []
    for text, codes in batches:
        optimizer.zero_grad()
        found = model(text, codes, return_loss=True)
        found.total.backward()
        norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()  # before clipping
        losses.append({**{name: loss.item() for name, loss in found._asdict().items()}, "grad_norm": norm.item()})
        for parameter in trained if limit is not None else ():
            parameter.grad *= (limit / (norm + 1e-6)).clamp(max=1)
        optimizer.step()
    return weights_of(model), losses


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("limit", [None, 0.02])
def test_steps_equal_a_loop_in_plain_torch(tiny_vae, name, limit):
    given = dict(adam_betas=[0.9, 0.98], weight_decay=0.1, max_grad_norm=limit, optimizer=name)
    trainer, losses = trained(tiny_vae, 4, batch_size=2, gradient_accumulation=2, replication_factor=3, **given)
    batches = [samples(12, seed) for seed in range(4)]
    expected, expected_losses = by_hand(small_dalle(tiny_vae), batches, getattr(torch.optim, name), LR, 0.1, limit)
    assert_close(weights_of(trainer.model), expected, atol=1e-5, rtol=0)
    for ours, theirs in zip(losses, expected_losses):
        assert ours == pytest.approx(theirs, rel=1e-4) and all(type(loss) is float for loss in ours.values())
    other_limit = 0.05 if limit is None else None
    other, _ = by_hand(small_dalle(tiny_vae), batches, getattr(torch.optim, name), LR, 0.1, other_limit)
    with pytest.raises(AssertionError):
        assert_close(weights_of(trainer.model), other, atol=1e-5, rtol=0)


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest(tiny_vae):
    model = small_dalle(tiny_vae)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = build_optimizers(model, settings(optimizer="Muon", weight_decay=0.3, adam_betas=[0.8, 0.9]))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    sets = [{names[id(p)] for p in group["params"]} for group in (*muon.param_groups, *adamw.param_groups)]
    blocks = {"0.fn.fn.to_qkv", "0.fn.fn.to_out.0", "1.fn.fn.net.0", "1.fn.fn.net.3"}
    assert sets[0] == {f"transformer.layers.{layer}.{block}.weight" for layer in "01" for block in blocks}
    assert sets[1] == {"text_emb.weight", "image_emb.weight", "text_pos_emb.weight", "to_logits.1.weight"}
    assert sum(map(len, sets)) == len(names) and set().union(*sets) == set(names.values())
    decays = [group["weight_decay"] for group in (*muon.param_groups, *adamw.param_groups)]
    assert decays == [0.3, 0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in adamw.param_groups)


def test_a_resumed_run_keeps_the_flags_it_was_given(tiny_vae):
    first, _ = trained(tiny_vae, 2, batch_size=12, optimizer="AdamW", weight_decay=0.5)
    given = dict(batch_size=12, optimizer="Adam", weight_decay=0.1, adam_betas=[0.8, 0.9])
    (adam,) = NativeTrainingBackend(settings(**given)).trainer(small_dalle(tiny_vae)).optimizers
    expected = [{name: value for name, value in group.items() if name != "params"} for group in adam.param_groups]
    trainer = NativeTrainingBackend(settings(**given)).trainer(small_dalle(tiny_vae))
    trainer.load_state_dict(copy.deepcopy(first.state_dict()))
    (adam,) = trainer.optimizers
    assert [{name: group[name] for name in own} for group, own in zip(adam.param_groups, expected)] == expected
    assert adam.param_groups[0]["weight_decay"] == 0.1
    moments = [state["exp_avg"] for state in first.state_dict()["opt_state"][0]["state"].values()]
    assert all(torch.equal(state["exp_avg"], m) for state, m in zip(adam.state_dict()["state"].values(), moments))


@pytest.mark.parametrize("before, after", [("Muon", "Adam"), (None, "Adam")])
def test_the_state_of_another_optimizer_is_left_aside_with_a_warning(tiny_vae, before, after, logged):
    first, _ = trained(tiny_vae, 2, batch_size=12, optimizer=before or after)
    state = copy.deepcopy(first.state_dict())
    if before is None:
        state["opt_state"] = []
    trainer = NativeTrainingBackend(settings(optimizer=after)).trainer(small_dalle(tiny_vae))
    trainer.load_state_dict(state)
    (warning,) = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert "another optimizer" in warning and "afresh" in warning
    assert_close(weights_of(trainer.model), weights_of(first.model), atol=0, rtol=0)
    fresh = NativeTrainingBackend(settings(optimizer=after)).trainer(small_dalle(tiny_vae))
    fresh.load_state_dict({**state, "opt_state": None})
    assert [record.levelname for record in logged.records].count("WARNING") == 1  # there was nothing to leave aside
    for each in (trainer, fresh):
        each.step([samples(2, 9)])
    assert_close(weights_of(trainer.model), weights_of(fresh.model), atol=0, rtol=0)


@cpu_only("it asks for devices by name")
def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="^--device cuda: .* use --device cpu, or auto$"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="^--device ipu: "):
        backends.for_training(settings(device="ipu"))
    assert isinstance(backends.for_training(settings(device="auto")), NativeTrainingBackend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")


def test_each_process_has_a_gpu_of_its_own_or_is_told(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("WORLD_SIZE", "3")
    drawing = ("auto", "fp32")  # of generate.py
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert NativeBackend(*drawing).device == torch.device("cuda", rank)
    assert taken == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="^3 processes but only 2 GPUs: use --nproc-per-node 2, or --device cpu$"):
        NativeBackend(*drawing)


def test_precision_is_the_flag_then_what_fp16_means_then_what_is_fast(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(native, "fast_in_fp16", lambda device: False)
    for fast in (True, False):
        monkeypatch.setattr(native, "fast_in_bf16", lambda device, fast=fast: fast)
        best = "bf16" if fast else "fp32"
        for device in (cpu, cuda):
            assert pick_precision("auto", device) == best  # generate.py has no --fp16
            assert pick_precision("auto", device, None) == best
            assert pick_precision("auto", device, True) == best
            assert pick_precision("auto", device, False) == "fp32"
            assert pick_precision("fp32", device, True) == "fp32"
            assert pick_precision("bf16", device, False) == "bf16"
    assert pick_precision("fp16", cuda) == "fp16"
    with pytest.raises(ValueError, match="^--precision fp16: CPUs .* use bf16 or fp32$"):
        pick_precision("fp16", cpu)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_each_step_its_samples_in_order(workers):
    dataset = GeneratedDataset(20, text_seq_len=6, num_text_tokens=50, num_image_codes=32, image_seq_len=16)
    backend = NativeTrainingBackend(settings(dataloader_workers=workers, gradient_accumulation=3))
    order = list(RunOrder(EpochOrder(len(dataset), backend.samples_per_step, seed=1), 0, 3))
    steps = [list(batch) for batch in backend.loader(dataset, order)]
    assert [len(step) for step in steps] == [3, 3, 3]
    for step, keys in zip(steps, order):
        assert all(text.shape == (2, 6) and codes.shape == (2, 16) for text, codes in step)
        text, codes = (torch.cat(parts) for parts in zip(*step))
        assert torch.equal(text, torch.stack([dataset[key][0] for key in keys]))
        assert torch.equal(codes, torch.stack([dataset[key][1] for key in keys]))


@pytest.mark.parametrize("precision, tolerance, terms", [("fp32", 1e-5, 64), ("fp32", 1e-5, 320), ("bf16", 2e-2, 64)])
def test_packed_weights_multiply_as_plain_ones(precision, tolerance, terms):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    torch.manual_seed(0)
    pack = packer(torch.device("cpu"), dtype)
    weight, bias = torch.randn(96, terms) / terms**0.5, torch.randn(96)
    for scale in (1, 1e-7, 1e6):
        for rows in (1, 4, 9):
            x = torch.randn(rows, terms)
            for given in (bias * scale, None):
                out = torch.nn.functional.linear(x, weight * scale, given)
                close = {"atol": tolerance * scale, "rtol": tolerance, "check_dtype": False}
                found = pack(weight * scale, given)(x)
                assert found.dtype == dtype
                assert_close(found, out, **close)
                value, gate = out.chunk(2, dim=-1)
                expected = value * torch.nn.functional.gelu(gate)
                close["atol"] *= max(1, scale)  # of a product
                assert_close(pack(weight * scale, given, LayerKernels().geglu)(x), expected, **close)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
def test_a_row_has_the_same_product_whatever_the_batch(rows):
    """But for the last bit of a few bf16 numbers in a thousand, where fp32 sums are taken in another order."""
    for dtype, differ in ((torch.bfloat16, 5e-3), (torch.float32, 0)):
        for terms in (256, 512):
            torch.manual_seed(0)
            weight, bias, x = torch.randn(512, terms) / 16, torch.randn(512), torch.randn(64, terms)
            whole = packer(torch.device("cpu"), dtype)(weight, bias)(x)
            found = packer(torch.device("cpu"), dtype)(weight, bias)(x[:rows])
            assert (found != whole[:rows]).float().mean() <= differ
            assert_close(found, whole[:rows], atol=0, rtol=2**-7)


def test_the_sampler_gives_the_codes_of_the_plain_loop(tiny_vae):
    model = small_dalle(tiny_vae, weight_std=0.3)
    text, sample = samples(4)[0], NativeBackend("cpu", "fp32").sampler(model.train(), 4)
    for sampling in (Sampling(), Sampling(top_k=None, top_p=0.9, temperature=0.9, cond_scale=1.5)):
        first, other = ([torch.Generator().manual_seed(i) for i in range(start, start + 4)] for start in (0, 4))
        codes = sample(text, sampling, generator=first)
        assert not model.training and codes.dtype == torch.int64
        again = [torch.Generator().manual_seed(i) for i in range(4)]
        on_device = text.to(model.text_emb.weight.device)
        expected = sample_codes(model, on_device, WholePassStepper(model), sampling, again)
        assert torch.equal(codes.cpu(), expected.cpu())
        assert sampling.top_k or not torch.equal(codes, sample(text, sampling, generator=other))


def test_the_average_of_the_weights_follows_them(tiny_vae):
    given = dict(batch_size=4, gradient_accumulation=3)
    trainer, _ = trained(tiny_vae, 0, ema_decay=0.4, **given)
    average = weights_of(trainer.model)
    for seed in range(4):
        trainer.step(micro_batches(trainer.backend, samples(12, seed)))
        decay = min(0.4, (2 + seed) / (11 + seed))  # 2/11, 3/12, 4/13, 5/14
        now = weights_of(trainer.model)
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in average}
    state = trainer.state_dict()
    assert_close({name: state["ema_weights"][name].cpu() for name in average}, average, atol=1e-6, rtol=0)
    plain, _ = trained(tiny_vae, 4, **given)
    assert_close(weights_of(trainer.model), weights_of(plain.model), atol=0, rtol=0)  # training is as without it

    batch = [micro_batches(trainer.backend, samples(12, 9))]
    by_hand = small_dalle(tiny_vae).eval()
    by_hand.load_state_dict({**by_hand.state_dict(), **average})
    with torch.no_grad():
        expected = by_hand(*samples(12, 9), return_loss=True)
    assert trainer.evaluate(batch)["total"] == pytest.approx(float(expected.total), rel=1e-5)


def test_evaluation_weighs_every_sample_alike(tiny_vae):
    trainer, _ = trained(tiny_vae, 0, batch_size=4, gradient_accumulation=3)
    text, codes = samples(7)
    model = small_dalle(tiny_vae).eval()
    with torch.no_grad():
        each = [float(model(text[i : i + 1], codes[i : i + 1], return_loss=True).total) for i in range(7)]
    losses = trainer.evaluate([[(text[:4], codes[:4]), (text[4:6], codes[4:6])], [(text[6:], codes[6:])]])
    assert losses["total"] == pytest.approx(sum(each) / 7, rel=1e-5)
    assert trainer.model.training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("limit", [None, 0.02])
def test_an_update_without_a_finite_gradient_is_left_out(tiny_vae, optimizer, limit):
    given = dict(batch_size=4, gradient_accumulation=3, optimizer=optimizer, max_grad_norm=limit, ema_decay=0.9)
    trainer, _ = trained(tiny_vae, 2, **given)
    before = copy.deepcopy(trainer.state_dict())
    with torch.no_grad():
        scale = trainer.model.transformer.layers[0][0].scale
        kept, scale[0, 0, 0] = float(scale[0, 0, 0]), float("nan")
    losses = trainer.step(micro_batches(trainer.backend, samples(12, 3)))
    with torch.no_grad():
        scale[0, 0, 0] = kept
    assert not math.isfinite(losses["grad_norm"]) and not math.isfinite(losses["total"])
    after = trainer.state_dict()
    for part in ("weights", "ema_weights"):
        assert_close(dict(after[part]), dict(before[part]), atol=0, rtol=0)
    assert str(after["opt_state"]) == str(before["opt_state"]) and after["updates"] == before["updates"] == 2
    assert math.isfinite(trainer.step(micro_batches(trainer.backend, samples(12, 4)))["grad_norm"])


def test_a_gpu_computes_in_what_it_does_not_emulate(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *given: True)  # as torch says of all of them
    gpus = ((9, "bf16", "bf16"), (8, "bf16", "bf16"), (7, "fp16", "fp32"), (6, "fp32", "fp32"))
    for version, training, sharded in gpus:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, version=version: (version, 0))
        assert pick_precision("auto", cuda) == training
        assert pick_precision("auto", cuda, loss_scaling=False) == sharded
        assert pick_precision("auto", cuda, False) == "fp32" and pick_precision("bf16", cuda) == "bf16"


def test_a_containers_caches_of_files_count_as_free(tmp_path):
    for name, text in (("max", "8000\n"), ("current", "3000\n"), ("stat", "anon 2000\ninactive_file 900\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _container_memory(tmp_path) == [(8000, 2100)]
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_memory(tmp_path) == []
