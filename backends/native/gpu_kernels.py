"""Triton kernels for sampling: layers at a few positions.

PyTorch's operators take longer to launch than to compute a few positions.
"""

import functools
import logging
from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.packed_sampler import LayerKernels, Norm, PlainProduct, Product, SlotTable
from models.transformer import pattern_mask

logger = logging.getLogger("minidalle")
ROWS = 16  # that a program computes at once: what matrix units multiply at least
COLUMNS = 16  # of a product that a program computes
MOST_NORMED = 1024  # columns of rows that each program of a product normalizes


@triton.jit
def _attend(
    qkv,
    cache,
    inputs,
    sharers,
    slots,
    ends,
    hidden,
    out,
    batch,
    width,
    text_len,
    capacity,
    keys_size,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Do what LayerKernels.attend does for one head of GROUP images.

    Columns of the scores are the text's keys, once if all of the group share it, and then the slots of each image, as
    far as they are used. Keys that no row sees are not read.
    """
    head, rows, dims = tl.program_id(1), tl.arange(0, ROWS), tl.arange(0, DIM)
    first = tl.program_id(0).to(tl.int64) * GROUP
    member = tl.minimum(rows // width, GROUP - 1)
    image = tl.minimum(first + member, batch - 1)  # rows and images past the last repeat it
    row = image * width + rows % width
    place, shared = tl.load(inputs + row), tl.load(sharers + image)
    values = cache + keys_size
    at = qkv + (row * 3 * HEADS + head)[:, None] * DIM + dims[None, :]
    query, new_key, new_value = tl.load(at), tl.load(at + HEADS * DIM), tl.load(at + 2 * HEADS * DIM)
    is_row = (rows < GROUP * width)[:, None]
    to = ((image * HEADS + head) * capacity + text_len + tl.load(slots + place))[:, None] * DIM + dims[None, :]
    tl.store(cache + to, new_key, is_row)
    tl.store(values + to, new_value, is_row)
    tl.debug_barrier()  # the program reads what it wrote
    is_shared = tl.max(shared, 0) == tl.min(shared, 0)
    text_end = tl.where(is_shared, 1, GROUP) * text_len
    used = tl.max(tl.load(ends + place), 0).to(tl.int32)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    start = 0
    while start < text_end + GROUP * used:
        column = start + tl.arange(0, KEYS)
        is_text = column < text_end
        column -= tl.where(is_text, 0, text_end)
        length = tl.where(is_text, text_len, used)
        owner, slot = column // length, column % length + tl.where(is_text, 0, text_len)
        key_image = tl.minimum(first + owner, batch - 1)  # of the owner, whose number in the group is less than GROUP
        key_image = tl.where(is_text, tl.load(sharers + key_image), key_image)
        can_see = (member[:, None] == owner[None, :]) | (is_text & is_shared)[None, :]
        bias = tl.load(hidden + place[:, None] * capacity + slot[None, :], can_see, float("-inf")).to(tl.float32)
        is_seen = (tl.max(bias, 0) == 0)[:, None]
        at_key = ((key_image * HEADS + head) * capacity + slot)[:, None] * DIM + dims[None, :]
        key = tl.load(cache + at_key, is_seen, 0.0)
        value = tl.load(values + at_key, is_seen, 0.0)
        scores = tl.dot(query, tl.trans(key)) * scale + bias
        before = most
        most = tl.maximum(most, tl.max(scores, 1))
        highest = tl.where(most == float("-inf"), 0.0, most)  # of a row that has seen no key yet
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(before - highest)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        start += KEYS
    to = out + (row * HEADS + head)[:, None] * DIM + dims[None, :]
    tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), is_row)


@triton.jit
def _moments(x, inside, dim):
    """Return the mean of rows x (R, BLOCK), of which `dim` columns are inside, and 1 / their deviation: (R, 1) each."""
    mean = tl.sum(x, 1)[:, None] / dim
    centered = tl.where(inside, x - mean, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centered * centered, 1)[:, None] / dim + 1e-5)


@triton.jit
def _add_and_normalize(x, added, weight, bias, sums, normed, dim, BLOCK: tl.constexpr):
    """Do what LayerKernels.add_and_normalize does for one row."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < dim
    at = tl.program_id(0) * dim + columns
    value = tl.load(x + at, inside, 0.0)
    if added is not None:
        value += tl.load(added + at, inside, 0.0).to(tl.float32)
        tl.store(sums + at, value, inside)
    mean, factor = _moments(value, inside, dim)
    result = (value - mean) * factor * tl.load(weight + columns, inside, 0.0) + tl.load(bias + columns, inside, 0.0)
    tl.store(normed + at, result.to(normed.dtype.element_ty), inside)


@triton.jit
def _gate(value, gate):
    """Compute GEGLU."""
    return value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def _geglu(wide, out, dim, BLOCK: tl.constexpr):
    """Do what LayerKernels.geglu does for a part of one row."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    value = tl.load(wide + row * 2 * dim + columns, inside, 0.0).to(tl.float32)
    gate = tl.load(wide + row * 2 * dim + dim + columns, inside, 0.0).to(tl.float32)
    result = _gate(value, gate)
    tl.store(out + row * dim + columns, result.to(out.dtype.element_ty), inside)


@triton.jit
def _multiply(
    x,
    scale,
    shift,
    weight,
    bias,
    residual,
    out,
    count,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Compute COLUMNS columns of residual + GEGLU(norm(x) · weightᵀ + bias); parts of it may be None.

    Args:
        x: (count, IN), at most ROWS rows; rows past them repeat the last one.
        scale, shift: of the norm.
        weight: (OUT, IN), or (2 · OUT, IN) for GEGLU, whose second half are the gates.
        WHOLE, TERMS: columns of x that are read at once for the norm, IN or more, and for the sums.
    """
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.minimum(rows, count - 1)[:, None]
    if scale is not None:
        whole = tl.arange(0, WHOLE)[None, :]
        mean, factor = _moments(tl.load(x + row * IN + whole, whole < IN, 0.0), whole < IN, IN)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, IN, TERMS):
        terms = start + tl.arange(0, TERMS)[None, :]
        inside = terms < IN
        at = weight + columns[:, None] * IN + terms
        factors = tl.load(at, inside, 0.0)
        value = tl.load(x + row * IN + terms, inside, 0.0)
        if scale is not None:
            value = (value - mean) * factor * tl.load(scale + terms, inside, 0.0) + tl.load(shift + terms, inside, 0.0)
        value = value.to(factors.dtype)
        sums = tl.dot(value, tl.trans(factors), sums)
        if HAS_GATE:
            gates = tl.dot(value, tl.trans(tl.load(at + OUT * IN, inside, 0.0)), gates)
    if bias is not None:
        sums += tl.load(bias + columns).to(tl.float32)[None, :]
        if HAS_GATE:
            gates += tl.load(bias + OUT + columns).to(tl.float32)[None, :]
    if HAS_GATE:
        sums = _gate(sums, gates)
    if residual is not None:
        sums += tl.load(residual + row * OUT + columns[None, :])
    tl.store(out + row * OUT + columns[None, :], sums.to(out.dtype.element_ty), (rows < count)[:, None])


class TritonKernels(LayerKernels):
    """LayerKernels in one kernel each; few rows take five kernels for a layer, its products included.

    Args:
        dtype: bfloat16 or float16, of the caches and the products' inputs.
        multiplies: whether products of few rows have a kernel, too.
        busy: programs from which on a GPU has enough to do, so that each attends for several images.
    """

    def __init__(self, dtype: torch.dtype, multiplies: bool = True, busy: int = 512):
        self.dtype, self.busy = dtype, busy
        # Triton does not use Turing's matrix units, and runs out of registers without them.
        self.has_units = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
        self.multiplies = multiplies and self.has_units

    def can_multiply(self, x: Tensor, product: Product) -> bool:
        """Return whether x (R, in) has so few rows that `multiply` is the fastest, and can compute the product."""
        if not (self.multiplies and len(x) <= ROWS and isinstance(product, PlainProduct)):
            return False
        return len(product.weight) % (2 * COLUMNS) == 0 and product.weight.is_contiguous()

    def multiply_normed(
        self, x: Tensor, added: Optional[Tensor], norm: Norm, product: Product
    ) -> Tuple[Tensor, Tensor]:
        """See LayerKernels."""
        if added is None and x.shape[1] <= MOST_NORMED and self.can_multiply(x, product):
            return x, multiply(x, product, norm, None)
        return super().multiply_normed(x, added, norm, product)

    def multiply_and_add(self, x: Tensor, inputs: Tensor, product: Product) -> Tuple[Tensor, Optional[Tensor]]:
        """See LayerKernels."""
        if self.can_multiply(inputs, product):
            return multiply(inputs, product, None, x.contiguous()), None
        return super().multiply_and_add(x, inputs, product)

    def add_and_normalize(self, x: Tensor, added: Optional[Tensor], norm: Norm) -> Tuple[Tensor, Tensor]:
        """See LayerKernels."""
        rows, dim = x.shape
        sums, normed = x if added is None else torch.empty_like(x), torch.empty_like(x, dtype=self.dtype)
        added, block = None if added is None else added.contiguous(), triton.next_power_of_2(dim)
        _add_and_normalize[(rows,)](x.contiguous(), added, *norm, sums, normed, dim, BLOCK=block)
        return sums, normed

    def look_up(self, table: SlotTable, inputs: Tensor, last: int, sharers: Tensor) -> Any:
        """See LayerKernels; the kernel reads the tables itself."""
        return table, inputs, sharers

    def attend(self, qkv: Tensor, cache: Tensor, images: Tensor, found: Any, text_len: int) -> Tensor:
        """See LayerKernels."""
        batch, width, _, heads, dim = qkv.shape
        table, inputs, sharers = found
        if width > ROWS or dim < 16 or dim & (dim - 1):  # windows are at most 16 unless a user asks for more
            found = super().look_up(table, inputs, len(table.ends) - 1, sharers)
            return super().attend(qkv, cache, images, found, text_len)
        out = qkv.new_empty(batch * width, heads * dim)
        tables = table.slots, table.ends_on_device, table.hidden
        most = 1 << max(1, batch * heads // self.busy).bit_length() - 1
        group = min(ROWS // triton.next_power_of_2(width), most)
        keys = (128 if dim <= 64 else 64) if self.has_units else 32
        sizes = {"HEADS": heads, "DIM": dim, "ROWS": ROWS, "KEYS": keys, "GROUP": group}
        given = qkv.contiguous(), cache, inputs, sharers, *tables, out, batch, width, text_len
        strides = cache.shape[3], cache.stride(0)
        _attend[(triton.cdiv(batch, group), heads)](*given, *strides, dim**-0.5, **sizes)
        return out

    def geglu(self, wide: Tensor) -> Tensor:
        """See LayerKernels."""
        rows, dim = len(wide), wide.shape[1] // 2
        out = wide.new_empty(rows, dim)
        _geglu[(rows, triton.cdiv(dim, 1024))](wide.contiguous(), out, dim, BLOCK=1024)
        return out


def multiply(x: Tensor, product: Any, norm: Optional[Norm], residual: Optional[Tensor]) -> Tensor:
    """Return residual + product(norm(x)) of x (R, in), in one kernel, for a PlainProduct; the others may be None."""
    weight, bias, has_gate = product.weight, product.bias, product.geglu is not None
    columns, terms = len(weight) // (2 if has_gate else 1), weight.shape[1]
    out = x.new_empty(len(x), columns, dtype=weight.dtype if residual is None else residual.dtype)
    blocks = {"ROWS": ROWS, "COLUMNS": COLUMNS, "WHOLE": triton.next_power_of_2(terms), "TERMS": 128 if norm else 256}
    given = *(norm or (None, None)), weight, bias, residual, out, len(x)
    # What five stages have in flight fits the shared memory.
    _multiply[(columns // COLUMNS,)](
        x.contiguous(), *given, IN=terms, OUT=columns, HAS_GATE=has_gate, **blocks, num_stages=5
    )
    return out


@functools.lru_cache(maxsize=None)
def kernels_work(device: torch.device, dtype: torch.dtype, multiplies: bool = True) -> bool:
    """Return whether TritonKernels give here what PyTorch's operators give; compiles them, which takes seconds."""
    random = torch.Generator().manual_seed(0)
    ours = TritonKernels(dtype, multiplies), TritonKernels(dtype, multiplies, busy=1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    batch, width, heads, dim, text_len = 3, 2, 2, 32, 70
    table = SlotTable(pattern_mask("conv_like", text_len, 4)[text_len:, text_len:], text_len, width, device, dtype)
    qkv = draw(batch, width, 3, heads, dim).to(dtype)
    cache = draw(2, batch, heads, text_len + table.num_slots, dim).to(dtype)
    cache[:, 1, :, :text_len] = cache[:, 0, :, :text_len]
    sharers, images = torch.tensor([[0, 0, 2], [0, 1, 2]], device=device)
    inputs = torch.tensor([[3, 4], [0, 1], [14, 15]], device=device)
    x, added, norm = draw(5, 600), draw(5, 600).to(dtype), (draw(600), draw(600))
    weight, bias = draw(640, 600) / 25, draw(640)
    results = []
    for kernels in (LayerKernels(), *ours):
        used = cache.clone()
        found = kernels.look_up(table, inputs, 15, sharers)
        result = [kernels.attend(qkv, used, images[:, None], found, text_len), used]
        result += [*kernels.add_and_normalize(x, added, norm), *kernels.add_and_normalize(x, None, norm)]
        for geglu in (None, kernels.geglu):
            product = PlainProduct(dtype, weight, bias, geglu)
            result.append(kernels.multiply_normed(x, None, norm, product)[1])
        sums, rest = kernels.multiply_and_add(x[:, :320], added, PlainProduct(dtype, weight[:320], None))
        results.append([*result, sums if rest is None else sums + rest])
    pairs = [(a.float(), b.float()) for other in results[1:] for a, b in zip(results[0], other)]
    differences = [float(((a - b).abs() / (1 + a.abs())).max()) for a, b in pairs]
    if max(differences) < 0.1:
        return True
    what = "kernels with products" if multiplies else "kernels"
    logger.warning(
        "Triton's %s differ by %.3f from PyTorch's operators here; they are not used", what, max(differences)
    )
    return False
