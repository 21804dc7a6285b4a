"""The native trainer's faster layers and losses against the plain ones of models/, which they stand in for."""

import copy
import functools
import shutil

import pytest
import torch
from torch.testing import assert_close

from backends.native import compilation, fast_layers
from backends.native.backend import NativeTrainingBackend
from backends.native.fast_layers import compute_losses, use_fast_layers
from models.transformer import PATTERNS, KeyValueCache
from tests.backends.native.test_backend import settings
from tests.builders import cpu_only, samples, small_dalle

CPU = torch.device("cpu")
OPTIONS = {"rotary_emb": True, "shift_tokens": True, "stable": True, "shared_ff_ids": (0, 1)}


def dalle(vae, **changes):
    return small_dalle(vae, weight_std=0.3, **{"depth": len(PATTERNS), "attn_types": PATTERNS, **changes})


def losses_and_gradients(model, text, codes, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    found = model(text, codes, return_loss=True)
    found.total.backward()
    return [*map(torch.Tensor.detach, found)], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute, chunk", [(False, 1024), (True, 1024), (False, 5)])
@pytest.mark.parametrize("changes", [{}, {"ff_dropout": 0.3}, OPTIONS, {"reversible": True}], ids=str)
def test_losses_and_gradients_equal_the_plain_ones(tiny_vae, changes, recompute, chunk, monkeypatch):
    for name in ("QUERIES", "ROWS"):  # of attention and of the head, whose backward passes are written by hand
        monkeypatch.setattr(fast_layers, name, chunk)
    plain = dalle(tiny_vae, **changes).train()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, CPU, torch.float32, recompute)
    some = samples(3)
    expected = losses_and_gradients(plain, *some)
    ours = losses_and_gradients(fast, *some)
    assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    again = losses_and_gradients(fast, *some)
    assert_close(again, ours, atol=0, rtol=0)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    fast.transformer.layers[2][0].fn.fn.to_out[0].weight.data.mul_(1.1)
    with pytest.raises(AssertionError):  # a small change does show at this tolerance
        assert_close(losses_and_gradients(fast, *some), expected, atol=2e-5, rtol=1e-4)


def test_a_cache_and_a_caption_alone_go_the_plain_way(tiny_vae):
    plain = dalle(tiny_vae).eval()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, CPU, torch.float32, recompute=True)
    text, codes = samples(3)
    with torch.no_grad():
        for given in ((text,), (text, codes[:, :5]), (text, codes)):
            assert_close(fast(*given), plain(*given), atol=1e-5, rtol=1e-5)
        caches = [[KeyValueCache(text.shape[1] + 1) for _ in model.transformer.layers] for model in (fast, plain)]
        embedded = plain.embed_text(plain.number_padding(text))
        assert_close(fast.transformer(embedded, caches[0]), plain.transformer(embedded, caches[1]))
    assert caches[0][0].keys is not None


def test_half_precision_is_near_and_keeps_gradients_fp32(tiny_vae):
    plain = dalle(tiny_vae).train()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, CPU, torch.bfloat16)
    some = samples(3)
    expected = losses_and_gradients(plain, *some)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain_half = (losses_and_gradients(model, *some) for model in (fast, plain))

    def error(found):
        differences = [(found[1][name] - gradient).norm() / gradient.norm() for name, gradient in expected[1].items()]
        return sum(differences) / len(differences)

    assert error(ours) < 1.2 * error(plain_half) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())
    assert_close(ours[0][0], expected[0][0], rtol=0.02, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_micro_batch_in_parts_trains_as_one(tiny_vae, recompute, monkeypatch):
    found = []
    for fitting in (1, 2, 99):
        monkeypatch.setattr("backends.native.trainer.WORKING_SET", fitting * 22 * 32)
        backend = NativeTrainingBackend(settings(batch_size=5, recompute=recompute))
        trainer = backend.trainer(dalle(tiny_vae))
        torch.manual_seed(0)
        some = samples(5)
        evaluated, trained = trainer.evaluate([[some]]), trainer.step([some])
        assert {name: trained[name] for name in evaluated} == pytest.approx(evaluated, rel=1e-6)
        found.append((trainer.evaluate([[some]]), {n: p.detach() for n, p in trainer.model.named_parameters()}))
    for losses, weights in found[:2]:
        assert losses == pytest.approx(found[2][0], rel=1e-5)
        assert_close(weights, found[2][1], atol=2e-5, rtol=0)


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")


@cpu_only("the stand-in for a GPU has no compiler")
@pytest.mark.skipif(not hasattr(getattr(torch, "compiler", None), "set_stance"), reason="compiled from torch 2.6 on")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_a_compiler])])
def test_compiled_layers_and_losses_equal_the_plain_ones(tiny_vae, monkeypatch, logged, backend):
    """In the model that trains and in its average; if torch cannot compile, both stay as they were."""
    plain = dalle(tiny_vae, attn_types=("axial_row", "full"), depth=2).train()
    fast, average = copy.deepcopy(plain), copy.deepcopy(plain).eval()
    for model in (fast, average):
        model.compute_losses = functools.partial(compute_losses, dtype=torch.float32)
    some = samples(3)
    used = [[layer.compute for layer in model.transformer.layers] for model in (fast, average)]
    used.append([fast.compute_losses, average.compute_losses])

    def pass_both_ways():
        fast(*some, return_loss=True).total.backward()

    def no_compiler(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(compilation, "WORTH_COMPILING", 0)
    monkeypatch.setattr(fast_layers, "ROWS", 20)  # of 48 positions of codes
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=no_compiler))
    compilation.compile_model([fast, average], pass_both_ways)
    now = [[layer.compute for layer in model.transformer.layers] for model in (fast, average)]
    assert [*now, [fast.compute_losses, average.compute_losses]] == used
    (record,) = logged.records
    assert record.message.startswith("the model is not compiled, which only costs speed: ")
    assert record.message.endswith("OSError: no compiler")

    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=backend))
    compilation.compile_model([fast, average], pass_both_ways)
    assert len(logged.records) == 1 and frames["ok"] == 3  # layers of one kind, losses of text, losses of codes
    expected = losses_and_gradients(plain, *some)
    assert_close(losses_and_gradients(fast, *some), expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        assert_close(average(*some, return_loss=True), plain.eval()(*some, return_loss=True))
    assert frames["ok"] == 5 and set(frames) == {"total", "ok"}  # without a gradient; nothing is left uncompiled
