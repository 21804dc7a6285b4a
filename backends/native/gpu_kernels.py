"""Triton kernels for sampling: layers at a few positions, and the CPU's random numbers.

PyTorch's operators take longer to launch than to compute a few positions.
"""

import functools
import logging
from typing import Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.packed_sampler import LayerKernels, Norm

logger = logging.getLogger("minidalle")
ROWS = 16  # queries of an image that a program computes: what matrix units multiply at least
KEYS = 64  # keys at a time
WORDS, STEP = 624, 227  # of the Mersenne Twister's state; words from one to the next that it needs
# Bytes of torch.Generator.get_state(): how many words are left plus 1, how many are given, and all, each in 8 bytes.
STATE = (
    (slice(8, 12), torch.int32),
    (slice(16, 24), torch.int64),
    (slice(24, 24 + 8 * WORDS), torch.int64),
)


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


@triton.jit
def _continue_twister(words, LENGTH: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr):
    # A word needs others that are STEP or more before it, so a program computes STEP of them at once.
    row, lanes = words + tl.program_id(0).to(tl.int64) * LENGTH, tl.arange(0, LANES)
    for start in range(WORDS, LENGTH, STEP):
        at = start + lanes
        inside = (lanes < STEP) & (at < LENGTH)
        upper = tl.load(row + at - WORDS, inside, 0).to(tl.uint32, bitcast=True)
        lower = tl.load(row + at - WORDS + 1, inside, 0).to(tl.uint32, bitcast=True)
        near = tl.load(row + at - STEP, inside, 0).to(tl.uint32, bitcast=True)
        mixed = (upper & 0x80000000) | (lower & 0x7FFFFFFF)
        new = near ^ (mixed >> 1) ^ ((mixed & 1) * 0x9908B0DF)
        tl.store(row + at, new.to(tl.int32, bitcast=True), inside)
        tl.debug_barrier()  # the program reads what it wrote


@triton.jit
def _temper(words, numbers, first, count, length, BLOCK: tl.constexpr):
    image, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(words + image * length + first + at, at < count, 0).to(tl.uint32, bitcast=True)
    x ^= x >> 11
    x ^= (x << 7) & 0x9D2C5680
    x ^= (x << 15) & 0xEFC60000
    x ^= x >> 18
    tl.store(numbers + image * count + at, (x & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08, at < count)


def uniform_numbers(generators: Sequence[torch.Generator], count: int, device: torch.device) -> Tensor:
    """Generate on a GPU what torch.rand(count, generator=g) gives on the CPU for each generator g: float32 (B, count).

    The CPU's generator is the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). The generators' states advance.

    Raises:
        ValueError: the generators are not different ones of the CPU, or have given different amounts of numbers.
    """
    if any(generator.device.type != "cpu" for generator in generators) or len({*map(id, generators)}) < len(generators):
        raise ValueError("generators of a GPU, or one that is there twice")
    states = torch.stack([generator.get_state() for generator in generators])
    left, given, twister = (states[:, part].clone().view(dtype) for part, dtype in STATE)
    firsts = torch.where(left == 1, WORDS, given).unique().tolist()
    if len(firsts) > 1:
        raise ValueError("generators that have given different amounts of numbers")
    first = firsts[0]
    length = -(-(first + count) // WORDS) * WORDS
    words = torch.empty(len(states), length, dtype=torch.int32, device=device)
    words[:, :WORDS] = twister.int().to(device)
    # Without stages, so that no load is moved before the store that it needs.
    _continue_twister[(len(states),)](words, length, WORDS, STEP, LANES=256, num_warps=8, num_stages=1)
    numbers = torch.empty(len(states), count, device=device)
    _temper[(len(states), triton.cdiv(count, 1024))](words, numbers, first, count, length, BLOCK=1024)
    used = first + count - (length - WORDS)  # of the last state
    last = words[:, -WORDS:].cpu().long() & 0xFFFFFFFF
    for (part, dtype), value in zip(STATE, (torch.tensor([WORDS + 1 - used]), torch.tensor([used]), last)):
        states[:, part] = value.to(dtype).view(torch.uint8)
    for generator, state in zip(generators, states):
        generator.set_state(state.clone())  # torch 2.13 crashes on a part of a tensor
    return numbers


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


@functools.lru_cache(maxsize=None)
def numbers_work(device: torch.device) -> bool:
    """Return whether uniform_numbers gives here what the CPU gives, and leaves generators as the CPU does."""
    ours, expected = ([torch.Generator().manual_seed(seed) for seed in (0, 1, 2**31 - 1)] for _ in range(2))
    for count in (700, 548, 1000):  # within a state, to its end, and over the next one's
        numbers = torch.stack([torch.rand(count, generator=generator) for generator in expected])
        if not torch.equal(uniform_numbers(ours, count, device).cpu(), numbers):
            logger.warning("Triton's random numbers differ from PyTorch's here; they are not used")
            return False
    return all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, expected))
