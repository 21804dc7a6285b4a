"""Single operators and small modules, each with the verdict that check() must give."""

import math
from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch
from torch import from_numpy, nn
from torch import ones as imported_ones  # not moved to the IPU, unlike torch.ones
from torch.nn import functional as F

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


def to_computed_mask(x):
    mask = x > 0
    return x[mask]


def random_constant(x):
    return x[:, :4] @ torch.rand(4, 4).tril()


CE = F.cross_entropy
SDPA = F.scaled_dot_product_attention
ATTENTION = (QUERY, QUERY, QUERY)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
# Keywords that torch 2.0 does not know are only tried if the installed torch knows them.
NEWER = hasattr(nn, "RMSNorm")

CASES = {
    # attention and masks
    "attention": Case(SDPA, ATTENTION),
    "attention, boolean mask": Case(lambda *qkvm: SDPA(*qkvm), (*ATTENTION, CAUSAL)),
    "masked_fill": Case(lambda x, m: x.masked_fill(m, -math.inf), (X, MASK)),
    "where of three": Case(lambda x, m: torch.where(m, x, -x), (X, MASK)),
    "where of one": Case(lambda x, m: torch.where(m), (X, MASK), "nonzero"),
    "mask of an expression": Case(to_computed_mask, (X,), "index"),
    "mask as index": Case(lambda x, m: x[m], (X, MASK), "index"),
    "assignment by mask": Case(written(lambda x, m: put(x, m, 0.0), True), (X, MASK)),
    "masked_select": Case(torch.masked_select, (X, MASK), "masked_select"),
    "nonzero": Case(torch.nonzero, (X,), "nonzero"),
    "tril of a constant": Case(lambda x: x[:, :4] @ torch.ones(4, 4).tril(), (X,)),
    "tril of random numbers": Case(random_constant, (X,), "tril"),
    "tril of a value": Case(torch.tril, (X,), "tril"),
    "triu of a value": Case(lambda x: torch.triu(x, 1), (X,), "triu"),
    "tril of a boolean buffer": Case(Triangle(torch.bool), (X,)),
    "tril of a float buffer": Case(Triangle(torch.float32), (X,), "tril"),
    "diagonal": Case(torch.diagonal, (X,), "diagonal"),
    # products and shapes
    "linear": Case(nn.Linear(6, 3), (X,)),
    "repeat_interleave": Case(lambda x: x.repeat_interleave(2, dim=0), (X,), "repeat_interleave"),
    # indices
    "gather": Case(lambda x, i: x.gather(1, i[:, None]), (X, IDS)),
    "integers as index": Case(lambda x, i: x[i], (X, IDS)),
    "a number as index": Case(lambda x, i: x[i[0]], (X, IDS), "item"),
    "index_add": Case(lambda x, i: x.index_add(0, i, x), (X, IDS), "index_add"),
    "index_put_": Case(written(lambda x, i: x.index_put_((i,), x), True), (X, IDS)),
    "index_put_, accumulating": Case(
        written(lambda x, i: x.index_put_((i,), x, accumulate=True), True), (X, IDS), "index_put"
    ),
    "embedding": Case(nn.Embedding(9, 4), (IDS,)),
    "embedding, sparse": Case(nn.Embedding(9, 4, sparse=True), (IDS,), "embedding"),
    "embedding, max_norm": Case(nn.Embedding(9, 4, max_norm=1.0), (IDS,), "embedding_renorm"),
    "one_hot": Case(lambda i: F.one_hot(i, 5), (IDS,)),
    "one_hot, no count": Case(F.one_hot, (IDS,), "one_hot"),
    # order
    "topk": Case(lambda x: x.topk(2), (X,)),
    "topk, unsorted": Case(lambda x: x.topk(2, sorted=False), (X,), "topk"),
    "topk, k a tensor": Case(lambda x, i: x.topk(i[1]), (X, IDS), "item"),
    "argmax": Case(lambda x: x.argmax(-1), (X,)),
    "kthvalue": Case(lambda x: x.kthvalue(2), (X,), "kthvalue"),
    "unique": Case(torch.unique, (IDS,), "_unique2"),
    # random numbers
    "multinomial": Case(lambda x: torch.multinomial(x.softmax(-1), 1), (X,), "multinomial"),
    "gumbel": Case(lambda x: (x - torch.rand_like(x).log().neg().log()).argmax(-1), (X,)),
    "dropout": Case(lambda x: F.dropout(x, 0.1), (X,)),
    "dropout of everything": Case(lambda x: F.dropout(x, 1.0), (X,), "dropout"),
    # norms, activations, images
    "gelu": Case(F.gelu, (X,)),
    "nan_to_num": Case(torch.nan_to_num, (X,), "nan_to_num"),
    "logical_xor": Case(torch.logical_xor, (MASK, MASK), "logical_xor"),
    "bilinear, twice the size": Case(lambda p: F.interpolate(p, scale_factor=2.0, mode="bilinear"), (PIXELS,)),
    "bilinear, half as large again": Case(
        lambda p: F.interpolate(p, scale_factor=1.5, mode="bilinear"), (PIXELS,), "upsample_bilinear2d"
    ),
    "linear in one dimension": Case(
        lambda x: F.interpolate(x[None], scale_factor=2.0, mode="linear"), (X,), "upsample_linear1d"
    ),
    "max pooling, indices": Case(
        lambda p: F.max_pool2d(p, 2, return_indices=True), (PIXELS,), "max_pool2d_with_indices"
    ),
    # losses
    "cross_entropy": Case(CE, (X, IDS)),
    "cross_entropy, smoothed": Case(lambda x, i: CE(x, i, label_smoothing=0.1), (X, IDS), "cross_entropy_loss"),
    "cross_entropy, smoothed sum": Case(lambda x, i: CE(x, i, label_smoothing=0.1, reduction="sum"), (X, IDS)),
    "cross_entropy of shares": Case(lambda x: CE(x, x.softmax(-1), label_smoothing=0.1), (X,)),
    "cross_entropy, weights": Case(lambda x, i, w: CE(x, i, weight=w), (X, IDS, torch.ones(6)), "nll_loss_forward"),
    "nll_loss, weights": Case(lambda x, i, w: F.nll_loss(x, i, w), (X, IDS, torch.ones(6)), "nll_loss_forward"),
    # writes
    "column assigned": Case(written(lambda x: put(x, (slice(None), 0), 5.0), True), (X,)),
    "column increased": Case(written(lambda x: increase(x, (slice(None), 0)), True), (X,)),
    "slice assigned": Case(written(lambda x: put(x, slice(0, 2), x[2:]), True), (X,)),
    "every other column assigned": Case(
        written(lambda x: put(x, (slice(None), slice(None, None, 2)), 5.0), True), (X,), "copy_"
    ),
    "column of an input, add_": Case(written(lambda x: x[:, 0].add_(1)), (X,)),
    "column of a value, add_": Case(written(lambda x: x[:, 0].add_(1), True), (X,), "add_"),
    "transposed, add_": Case(written(lambda x: x.t().add_(1)), (X,), "add_"),
    "transposed, add_, not used again": Case(lambda x: (x * 2).t().add_(1) + 1, (X,)),
    "transposed, assigned": Case(written(lambda x: put(x.t(), 0, 5.0), True), (X,), "copy_"),
    "another view read": Case(lambda x: (x[:, 1], x.t().mul_(2), x[:, 1] + 1)[2], (X,), "mul_"),
    # tensors
    "bfloat16": Case(lambda x: x + 1, (X.bfloat16(),), "tensor"),
    "complex": Case(lambda x: x * 1j, (X,), "tensor"),
    "nothing": Case(lambda x: x.sum(), (X[:, :0],), "tensor"),
    "item": Case(lambda x: x * x.sum().item(), (X,), "item"),
    "if of a tensor": Case(lambda x: x if x.sum() > 0 else -x, (X,), "is_nonzero"),
    "int of a tensor": Case(lambda x: x[: int(x.sum())], (X,), "item"),
    "to the host": Case(lambda x: x.cpu() + 1, (X,), "_to_copy"),
    "a constant out of numpy": Case(lambda x: x + from_numpy(X.numpy()), (X,), "add"),
    "the same, moved": Case(lambda x: x + from_numpy(X.numpy()).to(x.device), (X,)),
    "ones by another name": Case(lambda x: x + imported_ones(6), (X,), "add"),
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
