"""The native trainer's faster layers and losses against the plain ones of models/, which they stand in for."""

import copy
import functools
import shutil

import pytest
import torch

from backends.native import compilation, fast_layers
from backends.native.backend import NativeTrainingBackend
from backends.native.compilation import fusible_row_losses
from backends.native.fast_layers import (
    AxialAttention,
    DenseAttention,
    HeadLosses,
    axial_bias,
    bias_of,
    compute_losses,
    row_losses,
    use_fast_layers,
)
from models.transformer import PATTERNS, KeyValueCache, attend, pattern_mask
from tests.backends.native.test_backend import settings
from tests.builders import small_dalle

CPU = torch.device("cpu")
TEXT, SIDE = 6, 4


def dalle(vae, **changes):
    return small_dalle(vae, weight_std=0.3, **{"depth": len(PATTERNS), "attn_types": PATTERNS, **changes})


def batch(rows=3):
    text = torch.randint(1, 50, (rows, TEXT))
    text[1:, 3:] = 0
    return text, torch.randint(0, 32, (rows, SIDE**2))


def losses_and_gradients(model, text, codes, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    found = model(text, codes, return_loss=True)
    found.total.backward()
    return [*map(torch.Tensor.detach, found)], {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, expected, **tolerance):
    for loss, other in zip(ours[0], expected[0]):
        torch.testing.assert_close(loss, other, **tolerance)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, expected[1][name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ff_dropout": 0.3},
        {"rotary_emb": True, "shift_tokens": True, "stable": True, "shared_ff_ids": (0, 1)},
        {"reversible": True},
    ],
    ids=str,
)
def test_losses_and_gradients_equal_the_plain_ones(tiny_vae, changes, recompute):
    plain = dalle(tiny_vae, **changes).train()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, CPU, torch.float32, recompute)
    some = batch()
    expected = losses_and_gradients(plain, *some)
    ours = losses_and_gradients(fast, *some)
    assert_same(ours, expected, atol=2e-5, rtol=1e-4)
    again = losses_and_gradients(fast, *some)
    assert_same(again, ours, atol=0, rtol=0)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    fast.transformer.layers[2][0].fn.fn.to_out[0].weight.data.mul_(1.1)
    with pytest.raises(AssertionError):  # a small change does show at this tolerance
        assert_same(losses_and_gradients(fast, *some), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("queries", [128, 7])
def test_attention_has_its_own_gradient(pattern, queries, monkeypatch):
    monkeypatch.setattr(fast_layers, "QUERIES", queries)
    torch.manual_seed(0)
    mask = pattern_mask(pattern, 3, 3)
    qkv = torch.randn(2, len(mask), 3, 2, 4, dtype=torch.float64, requires_grad=True)

    def fast(qkv):
        if not pattern.startswith("axial"):
            return DenseAttention.apply(qkv, bias_of(mask).double())
        return AxialAttention.apply(qkv, axial_bias(3, 3).double(), 3, 3, pattern == "axial_col")

    plain = attend(*qkv.permute(2, 0, 3, 1, 4), mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(fast(qkv), plain, atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(fast, qkv)


@pytest.mark.parametrize("of_rows", [row_losses, fusible_row_losses])
@pytest.mark.parametrize("rows", [1024, 5])
def test_head_losses_have_their_own_gradient(rows, of_rows, monkeypatch):
    monkeypatch.setattr(fast_layers, "ROWS", rows)
    torch.manual_seed(0)
    shapes = (8, 4), (12, 4), (11, 4), (11,)
    floats = [torch.randn(shape, requires_grad=True) for shape in shapes]
    text, codes = torch.randint(0, 7, (8,)), torch.randint(0, 4, (12,))
    text_x, codes_x, weight, bias = floats
    expected = (
        torch.nn.functional.cross_entropy(text_x @ weight[:7].t() + bias[:7], text),
        torch.nn.functional.cross_entropy(codes_x @ weight[7:].t() + bias[7:], codes),
    )
    ours = HeadLosses.apply(*floats, text, codes, 7, True, of_rows)
    for one, other in zip(ours, expected):
        torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(2 * one + 3 * other, floats) for one, other in (ours, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(HeadLosses.apply(*floats, text, codes, 7, False, of_rows), expected)


def test_a_cache_and_a_caption_alone_go_the_plain_way(tiny_vae):
    plain = dalle(tiny_vae).eval()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, CPU, torch.float32, recompute=True)
    text, codes = batch()
    with torch.no_grad():
        for given in ((text,), (text, codes[:, :5]), (text, codes)):
            torch.testing.assert_close(fast(*given), plain(*given), atol=1e-5, rtol=1e-5)
        caches = [[KeyValueCache(TEXT + 1) for _ in model.transformer.layers] for model in (fast, plain)]
        embedded = plain.embed_text(plain.number_padding(text))
        torch.testing.assert_close(fast.transformer(embedded, caches[0]), plain.transformer(embedded, caches[1]))
    assert caches[0][0].keys is not None


def test_half_precision_is_near_and_keeps_gradients_fp32(tiny_vae):
    plain = dalle(tiny_vae).train()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, CPU, torch.bfloat16)
    some = batch()
    expected = losses_and_gradients(plain, *some)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain_half = (losses_and_gradients(model, *some) for model in (fast, plain))

    def error(found):
        differences = [(found[1][name] - gradient).norm() / gradient.norm() for name, gradient in expected[1].items()]
        return sum(differences) / len(differences)

    assert error(ours) < 1.2 * error(plain_half) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())
    torch.testing.assert_close(ours[0][0], expected[0][0], rtol=0.02, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_micro_batch_in_parts_trains_as_one(tiny_vae, recompute, monkeypatch):
    found = []
    for fitting in (1, 2, 99):
        monkeypatch.setattr("backends.native.trainer.WORKING_SET", fitting * 22 * 32)
        backend = NativeTrainingBackend(settings(batch_size=5, recompute=recompute))
        trainer = backend.trainer(dalle(tiny_vae))
        torch.manual_seed(0)
        some = batch(5)
        evaluated, trained = trainer.evaluate([[some]]), trainer.step([some])
        assert {name: trained[name] for name in evaluated} == pytest.approx(evaluated, rel=1e-6)
        found.append((trainer.evaluate([[some]]), {n: p.detach() for n, p in trainer.model.named_parameters()}))
    for losses, weights in found[:2]:
        assert losses == pytest.approx(found[2][0], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, found[2][1][name], atol=2e-5, rtol=0, msg=name)


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")


@pytest.mark.skipif(not hasattr(getattr(torch, "compiler", None), "set_stance"), reason="compiled from torch 2.6 on")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_a_compiler])])
def test_compiled_layers_and_losses_equal_the_plain_ones(tiny_vae, monkeypatch, logged, backend):
    """In the model that trains and in its average; if torch cannot compile, both stay as they were."""
    plain = dalle(tiny_vae, attn_types=("axial_row", "full"), depth=2).train()
    fast, average = copy.deepcopy(plain), copy.deepcopy(plain).eval()
    for model in (fast, average):
        model.compute_losses = functools.partial(compute_losses, dtype=torch.float32)
    some = batch()
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
    assert_same(losses_and_gradients(fast, *some), expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(average(*some, return_loss=True), plain.eval()(*some, return_loss=True))
    assert frames["ok"] == 5 and set(frames) == {"total", "ok"}  # without a gradient; nothing is left uncompiled
