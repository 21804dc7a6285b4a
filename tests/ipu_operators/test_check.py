"""check() itself: its verdict on single operators, constants, losses and loops."""

import math
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Tuple

import pytest
import torch
from torch import from_numpy, nn
from torch.nn import functional as F

from tests.ipu_operators.check import check
from tests.ipu_operators.standins import standins

POPTORCH = standins()
X = torch.linspace(-1, 1, 24).view(4, 6)  # floats
IDS = torch.tensor([0, 2, 1, 3])
MASK = X > 0
PIXELS = torch.zeros(1, 4, 8, 8)
QUERY = torch.zeros(1, 2, 5, 8)  # (batch, heads, positions, width)


class Case(NamedTuple):
    """What to run, and the operator that check() must refuse, or None."""

    run: Callable
    inputs: Tuple[Any, ...]
    refused: Optional[str] = None


class Holder(nn.Module):
    """Adds a tensor that is a buffer or a plain attribute."""

    def __init__(self, buffer):
        super().__init__()
        if buffer:
            self.register_buffer("own", torch.ones(6))
        else:
            self.own = torch.ones(6)

    def forward(self, x):
        return x + self.own


class Counting(nn.Module):
    """Counts its calls in a buffer, in place or with a new tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return x * self.calls


class Triangle(nn.Module):
    """A triangular mask of a buffer, which counts as a constant unless it holds floats."""

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("square", torch.ones(6, 6, dtype=dtype))

    def forward(self, x):
        return x @ self.square.tril().to(x.dtype)


def written(write, derive=False):
    """Return a function that writes to its input, or to a value computed from it, and then uses it."""

    def run(x, *rest):
        x = x * 2 if derive else x
        write(x, *rest)
        return x + 1

    return run


def put(x, key, value):
    x[key] = value


def increase(x, key):
    x[key] += 1


def random_constant(x):
    return x[:, :4] @ torch.rand(4, 4).tril()


CE = F.cross_entropy
SDPA = F.scaled_dot_product_attention
ATTENTION = (QUERY, QUERY, QUERY)
# Keywords that torch 2.0 does not know are only tried if the installed torch knows them.
NEWER = hasattr(nn, "RMSNorm")

CASES = {
    # attention and masks
    "attention": Case(SDPA, ATTENTION),
    "masked_fill": Case(lambda x, m: x.masked_fill(m, -math.inf), (X, MASK)),
    "where of one": Case(lambda x, m: torch.where(m), (X, MASK), "nonzero"),
    "mask as index": Case(lambda x, m: x[m], (X, MASK), "index"),
    "assignment by mask": Case(written(lambda x, m: put(x, m, 0.0), True), (X, MASK)),
    "tril of a constant": Case(lambda x: x[:, :4] @ torch.ones(4, 4).tril(), (X,)),
    "tril of random numbers": Case(random_constant, (X,), "tril"),
    "tril of a value": Case(torch.tril, (X,), "tril"),
    "tril of a boolean buffer": Case(Triangle(torch.bool), (X,)),
    "tril of a float buffer": Case(Triangle(torch.float32), (X,), "tril"),
    "diagonal": Case(torch.diagonal, (X,), "diagonal"),
    # indices
    "gather": Case(lambda x, i: x.gather(1, i[:, None]), (X, IDS)),
    "a number as index": Case(lambda x, i: x[i[0]], (X, IDS), "item"),
    "index_put_, accumulating": Case(
        written(lambda x, i: x.index_put_((i,), x, accumulate=True), True), (X, IDS), "index_put"
    ),
    "embedding": Case(nn.Embedding(9, 4), (IDS,)),
    "one_hot": Case(lambda i: F.one_hot(i, 5), (IDS,)),
    "one_hot, no count": Case(F.one_hot, (IDS,), "one_hot"),
    # order
    "topk": Case(lambda x: x.topk(2), (X,)),
    "topk, unsorted": Case(lambda x: x.topk(2, sorted=False), (X,), "topk"),
    "kthvalue": Case(lambda x: x.kthvalue(2), (X,), "kthvalue"),
    # random numbers
    "multinomial": Case(lambda x: torch.multinomial(x.softmax(-1), 1), (X,), "multinomial"),
    "dropout": Case(lambda x: F.dropout(x, 0.1), (X,)),
    # images
    "bilinear, twice the size": Case(lambda p: F.interpolate(p, scale_factor=2.0, mode="bilinear"), (PIXELS,)),
    "bilinear, half as large again": Case(
        lambda p: F.interpolate(p, scale_factor=1.5, mode="bilinear"), (PIXELS,), "upsample_bilinear2d"
    ),
    # losses
    "cross_entropy": Case(CE, (X, IDS)),
    "cross_entropy, smoothed": Case(lambda x, i: CE(x, i, label_smoothing=0.1), (X, IDS), "cross_entropy_loss"),
    "cross_entropy, smoothed sum": Case(lambda x, i: CE(x, i, label_smoothing=0.1, reduction="sum"), (X, IDS)),
    "cross_entropy, weights": Case(lambda x, i, w: CE(x, i, weight=w), (X, IDS, torch.ones(6)), "nll_loss_forward"),
    # writes
    "column assigned": Case(written(lambda x: put(x, (slice(None), 0), 5.0), True), (X,)),
    "column increased": Case(written(lambda x: increase(x, (slice(None), 0)), True), (X,)),
    "column of a value, add_": Case(written(lambda x: x[:, 0].add_(1), True), (X,), "add_"),
    "transposed, add_": Case(written(lambda x: x.t().add_(1)), (X,), "add_"),
    # tensors
    "bfloat16": Case(lambda x: x + 1, (X.bfloat16(),), "tensor"),
    "nothing": Case(lambda x: x.sum(), (X[:, :0],), "tensor"),
    "item": Case(lambda x: x * x.sum().item(), (X,), "item"),
    "if of a tensor": Case(lambda x: x if x.sum() > 0 else -x, (X,), "is_nonzero"),
    "to the host": Case(lambda x: x.cpu() + 1, (X,), "_to_copy"),
    "a constant out of numpy": Case(lambda x: x + from_numpy(X.numpy()), (X,), "add"),
    "arange": Case(lambda x: x + torch.arange(6), (X,)),
    "a buffer": Case(Holder(buffer=True), (X,)),
    "a plain attribute": Case(Holder(buffer=False), (X,), "add"),
    "a buffer changed": Case(Counting(in_place=True), (X,)),
    "a buffer replaced": Case(Counting(in_place=False), (X,), "attribute"),
}
if NEWER:
    CASES["attention, scaled"] = Case(lambda *qkv: SDPA(*qkv, scale=1.0), ATTENTION, "scaled_dot_product_attention")
    CASES["attention, grouped"] = Case(
        lambda *qkv: SDPA(*qkv, enable_gqa=True), ATTENTION, "scaled_dot_product_attention"
    )
    CASES["rms_norm"] = Case(nn.RMSNorm(6), (X,), "rms_norm")
    CASES["float8"] = Case(lambda x: x.to(torch.float8_e4m3fn), (X,), "tensor")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", CASES)
def test_a_case_gets_its_verdict(name):
    run, inputs, refused = CASES[name]
    report = check(run, inputs)
    assert set(report.refused) == ({refused} if refused else set()), report.refused
    assert report.operators or refused


def test_all_refusals_are_listed_with_the_line_of_the_model():
    report = check(lambda x: (x.nan_to_num() + x.index_add(0, x.argmin(1) * 0, x)).tril(), (X,))
    assert set(report.refused) == {"nan_to_num", "index_add", "tril"}
    assert all(f"[tests/ipu_operators/{Path(__file__).name}:" in reason for reason in report.refused.values())
    assert "RuntimeError" in check(nn.Linear(5, 2), (X,)).refused["forward pass"]
    assert set(check(lambda x: x + 1, (X.clone().requires_grad_(),)).refused) == {"input"}


def test_constants_are_followed():
    def masked(x, first_row):
        square = torch.ones(6, 6)
        square[0] = first_row
        return x @ square.tril()

    assert not check(lambda x: masked(x, 2.0), (X,)).refused
    assert set(check(lambda x: masked(x, x[0]), (X,)).refused) == {"tril"}
    overwritten = check(lambda x: x.copy_(torch.ones(4, 6)).tril() + x, (X,))
    assert overwritten.refused == {} and overwritten.folded["tril"] == 1


def one_loss(x, ids):
    return F.cross_entropy(x, ids)


def two_losses(x, ids):
    return F.cross_entropy(x, ids) + F.mse_loss(x, x * 2)


def joined_losses(x, ids):
    return POPTORCH.identity_loss(two_losses(x, ids), reduction="none")


def test_training_takes_one_final_loss():
    assert check(one_loss, (X, IDS), training=True) == check(one_loss, (X, IDS))
    assert check(one_loss, (X, IDS)).losses == ["nll_loss_forward"]
    report = check(two_losses, (X, IDS), training=True)
    assert set(report.refused) == {"loss"} and report.losses == ["nll_loss_forward", "mse_loss"]
    assert not check(two_losses, (X, IDS)).refused
    report = check(joined_losses, (X, IDS), training=True)
    assert not report.refused and report.losses == ["poptorch::identity_loss"]
    assert set(check(lambda x, ids: x + 1, (X, IDS), training=True).refused) == {"loss"}
    twice = check(lambda x, ids: (joined_losses(x, ids), one_loss(x, ids)), (X, IDS), training=True)
    assert set(twice.refused) == {"loss"}


def steps(body, *inputs, count=3):
    return lambda *given: POPTORCH.for_loop(count, body, [*inputs, *given])


def test_a_loop_is_run_once_and_folds_nothing():
    assert POPTORCH.for_loop(3, lambda x: x + 1, [torch.zeros(1)])[0] == 3
    report = check(steps(lambda x: [x + 1]), (X,))
    assert report.operators["add"] == 1 and not report.refused
    assert set(check(steps(lambda x: x @ torch.ones(6, 6).tril()), (X,)).refused) == {"tril"}
    outside = torch.ones(6, 6)

    def mask_outside(x):
        mask = torch.ones(6, 6).tril()
        return POPTORCH.for_loop(3, lambda x: [x @ mask], [x])

    assert not check(mask_outside, (X,)).refused
    assert set(check(steps(lambda x: [x @ outside]), (X,)).refused) == {"mm"}  # a tensor of the host


def test_dynamic_update_takes_a_tensor_as_start_and_a_source_that_fits():
    start = torch.ones(1, dtype=torch.int32)
    update = POPTORCH.dynamic_update
    expected = X.clone()
    expected[:, 1:3] = X[:, 4:]
    assert torch.equal(update(X, X[:, 4:], 1, start, 2), expected)
    report = check(lambda x, at: update(x, x[:, 4:], 1, at, 2), (X, start))
    assert not report.refused and report.operators["poptorch::dynamic_update"] == 1
    for error, run in (
        ("TypeError", lambda x, at: update(x, x[:, 4:], 1, 1, 2)),
        ("ValueError", lambda x, at: update(x, x[:, 3:], 1, at, 2)),
        ("ValueError", lambda x, at: update(x, x[:, 4:].half(), 1, at, 2)),
    ):
        assert error in check(run, (X, start)).refused["forward pass"]
