"""Triton kernels for a few positions, where launching PyTorch's operators takes longer than their work."""

import functools
import logging
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.packed_sampler import LayerKernels, Norm

logger = logging.getLogger("minidalle")
ROWS = 16  # queries of an image that a program computes: what matrix units multiply at least
KEYS = 64  # keys at a time


@triton.jit
def _attend(
    qkv,
    cache,
    slots,
    mask,
    out,
    width,
    text_len,
    capacity,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
):
    image, head = tl.program_id(0), tl.program_id(1)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    is_row = rows < width
    row = image * width + rows
    at = qkv + (row * 3 * HEADS + head)[:, None] * DIM + dims[None, :]
    query = tl.load(at, is_row[:, None], 0.0)
    keys = cache + (image * HEADS + head).to(tl.int64) * capacity * DIM
    values = keys + tl.num_programs(0).to(tl.int64) * HEADS * capacity * DIM
    slot = tl.load(slots + row, is_row, 0) + text_len
    to = slot[:, None] * DIM + dims[None, :]
    tl.store(keys + to, tl.load(at + HEADS * DIM, is_row[:, None], 0.0), is_row[:, None])
    tl.store(values + to, tl.load(at + 2 * HEADS * DIM, is_row[:, None], 0.0), is_row[:, None])
    tl.debug_barrier()  # the program reads what it wrote
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, NUM_KEYS, KEYS):
        columns = start + tl.arange(0, KEYS)
        is_key = columns < NUM_KEYS
        at_key = columns[:, None] * DIM + dims[None, :]
        key = tl.load(keys + at_key, is_key[:, None], 0.0)
        hidden = tl.load(
            mask + row[:, None] * NUM_KEYS + columns[None, :], is_row[:, None] & is_key[None, :], float("-inf")
        )
        scores = tl.dot(query, tl.trans(key)) * scale + hidden.to(tl.float32)
        # The text comes first, so every row sees a key of the first block; rows past the window see zeros.
        scores = tl.where(is_row[:, None], scores, 0.0)
        before = most
        most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - most[:, None])
        shrink = tl.exp(before - most)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + at_key, is_key[:, None], 0.0)
        result = result * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
    result = result / total[:, None]
    place = (row * HEADS + head)[:, None] * DIM + dims[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), is_row[:, None])


@triton.jit
def _add_and_normalize(x, added, weight, bias, sums, normed, dim, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    at = tl.program_id(0) * dim + columns
    value = tl.load(x + at, inside, 0.0)
    if HAS_ADDED:
        value += tl.load(added + at, inside, 0.0).to(tl.float32)
        tl.store(sums + at, value, inside)
    mean = tl.sum(value, 0) / dim
    centered = tl.where(inside, value - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, 0) / dim + 1e-5)
    result = centered * scale * tl.load(weight + columns, inside, 0.0) + tl.load(bias + columns, inside, 0.0)
    tl.store(normed + at, result.to(normed.dtype.element_ty), inside)


@triton.jit
def _geglu(wide, out, dim, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    value = tl.load(wide + row * 2 * dim + columns, inside, 0.0).to(tl.float32)
    gate = tl.load(wide + row * 2 * dim + dim + columns, inside, 0.0).to(tl.float32)
    result = value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * dim + columns, result.to(out.dtype.element_ty), inside)


class TritonKernels(LayerKernels):
    """LayerKernels in one kernel each.

    Args:
        dtype: bfloat16 or float16, of the caches and the products' inputs.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def add_and_normalize(self, x: Tensor, added: Optional[Tensor], norm: Norm) -> Tuple[Tensor, Tensor]:
        """See LayerKernels."""
        rows, dim = x.shape
        sums, normed = x if added is None else torch.empty_like(x), torch.empty_like(x, dtype=self.dtype)
        given = x.contiguous(), x if added is None else added.contiguous()
        block = triton.next_power_of_2(dim)
        _add_and_normalize[(rows,)](*given, *norm, sums, normed, dim, HAS_ADDED=added is not None, BLOCK=block)
        return sums, normed

    def attend(self, qkv: Tensor, cache: Tensor, images: Tensor, slots: Tensor, mask: Tensor, text_len: int) -> Tensor:
        """See LayerKernels."""
        batch, width, _, heads, dim = qkv.shape
        if width > ROWS or dim < 16 or dim & (dim - 1):  # windows are at most 16 unless a user asks for more
            return super().attend(qkv, cache, images, slots, mask, text_len)
        out = qkv.new_empty(batch * width, heads * dim)
        given = qkv.contiguous(), cache, slots, mask.contiguous(), out, width, text_len, cache.shape[3], dim**-0.5
        _attend[(batch, heads)](*given, HEADS=heads, DIM=dim, ROWS=ROWS, NUM_KEYS=mask.shape[-1], KEYS=KEYS)
        return out

    def geglu(self, wide: Tensor) -> Tensor:
        """See LayerKernels."""
        rows, dim = len(wide), wide.shape[1] // 2
        out = wide.new_empty(rows, dim)
        _geglu[(rows, triton.cdiv(dim, 1024))](wide.contiguous(), out, dim, BLOCK=1024)
        return out


@functools.lru_cache(maxsize=None)
def kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels give here what PyTorch's operators give; compiles them, which takes seconds."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    batch, width, heads, dim, text_len, slots = 3, 2, 2, 32, 70, 20
    qkv, cache = draw(batch, width, 3, heads, dim).to(dtype), draw(2, batch, heads, text_len + slots, dim).to(dtype)
    hidden = torch.zeros(batch, 1, width, text_len + slots, dtype=dtype, device=device)
    hidden[:, :, 0, text_len + 5 :] = float("-inf")
    images = torch.arange(batch, device=device)[:, None]
    at = torch.tensor([[3, 4], [0, 1], [18, 19]], device=device)
    x, added, norm = draw(5, 96), draw(5, 96).to(dtype), (draw(96), draw(96))
    results = []
    for kernels in (LayerKernels(), TritonKernels(dtype)):
        used = cache.clone()
        out = kernels.attend(qkv, used, images, at, hidden, text_len)
        results.append(
            [out, used, *kernels.add_and_normalize(x, added, norm), *kernels.add_and_normalize(x, None, norm)]
        )
    differences = [float((a.float() - b.float()).abs().max()) for a, b in zip(*results)]
    if max(differences) < 0.05:
        return True
    logger.warning("Triton kernels differ by %.3f from PyTorch's operators here; they are not used", max(differences))
    return False
