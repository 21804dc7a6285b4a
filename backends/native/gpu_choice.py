"""Triton kernels for sampling: the choice of codes, and the CPU's random numbers.

PyTorch's operators take longer to launch than to choose a few codes.
"""

import functools
import logging
from typing import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from models import sampling as operators
from models.sampling import Sampling, SamplingState

logger = logging.getLogger("minidalle")
WORDS, STEP = 624, 227  # of the Mersenne Twister's state; words from one to the next that it needs
# Bytes of torch.Generator.get_state(): how many words are left plus 1, how many are given, and all, each in 8 bytes.
STATE = (
    (slice(8, 12), torch.int32),
    (slice(16, 24), torch.int64),
    (slice(24, 24 + 8 * WORDS), torch.int64),
)


@triton.jit
def _are_among_largest(keys, weights, least):
    """Return which keys (uint32) have larger ones whose weights add up to less than `least`."""
    bound = tl.full((), 0, tl.uint32)  # the largest with enough weight above it, found bit by bit
    for bit in range(32):
        candidate = bound | (tl.full((), 0x80000000, tl.uint32) >> bit)
        is_enough = tl.sum(tl.where(keys > candidate, weights, 0.0), 0) >= least
        bound = tl.where(is_enough, candidate, bound)
    return keys > bound


@triton.jit
def _choose(
    logits,
    noise,
    places,
    answers,
    length,
    num_codes,
    scale,
    count,
    mass,
    HAS_COUNT: tl.constexpr,
    HAS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do what Sampling.choose does for one place of one image."""
    image, ahead = tl.program_id(0), tl.program_id(1)
    row, columns = image * tl.num_programs(1) + ahead, tl.arange(0, BLOCK)
    is_code = columns < num_codes
    value = tl.load(logits + row * num_codes + columns, is_code, float("-inf")).to(tl.float32) * scale
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)  # −0 is 0
    keys = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # in the order of the values
    is_kept = is_code
    if HAS_COUNT:
        is_kept &= _are_among_largest(keys, tl.where(is_code, 1.0, 0.0), count)
    if HAS_MASS:
        weights = tl.where(is_kept, tl.exp(value - tl.max(value, 0)), 0.0)
        is_kept &= _are_among_largest(keys, weights, mass * tl.sum(weights, 0))
    place = tl.minimum(tl.load(places + image) + ahead, length - 1)
    added = tl.load(noise + (image * length + place) * num_codes + columns, is_code, 0.0)
    answer = tl.argmax(tl.where(is_kept, value + added, float("-inf")), 0)
    tl.store(answers + row, answer.to(tl.int64))


@triton.jit
def _accept(codes, places, answers, outcome, length, window, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Do what models.sampling.settle does with the answers for one image; each program writes a column of `outcome`."""
    image, inside, ahead = tl.program_id(0).to(tl.int64), tl.arange(0, WINDOW), tl.arange(0, BLOCK)
    place = tl.load(places + image)
    codes += image * 2 * length + place
    answers += image * window
    is_guess = inside < window - 1
    is_wrong = tl.load(codes + inside, is_guess, 0) != tl.load(answers + inside, is_guess, 0)
    confirmed = tl.min(tl.where(is_wrong | (inside >= window - 1), inside, WINDOW), 0)
    tl.debug_barrier()  # the guesses were read
    tl.store(codes + ahead, tl.load(answers + tl.minimum(ahead, window - 1)), ahead < length)
    possible = tl.minimum(length - place, window)
    accepted = tl.minimum(confirmed + 1, possible)
    tl.store(places + image, place + accepted)
    outcome += image
    tl.store(outcome, place + accepted)
    tl.store(outcome + tl.num_programs(0), tl.maximum(accepted - 1, 0))
    tl.store(outcome + 2 * tl.num_programs(0), (accepted < possible).to(tl.int64))


def settle(state: SamplingState, logits: Tensor, sampling: Sampling, num_tokens: int) -> Tensor:
    """Do what models.sampling.settle does, in two kernels."""
    codes, places, noise, _ = state
    batch, window, num_codes = logits.shape
    length, count = noise.shape[1], sampling.codes_to_keep(num_tokens)
    answers = codes.new_empty(batch, window)
    outcome = codes.new_empty(3, batch)
    has_count, has_mass = count is not None and count < num_codes, sampling.top_p is not None
    given = length, num_codes, 1 / sampling.temperature, float(count or 0), sampling.top_p or 0.0
    flags = {"HAS_COUNT": has_count, "HAS_MASS": has_mass, "BLOCK": triton.next_power_of_2(num_codes)}
    _choose[(batch, window)](logits.contiguous(), noise, places, answers, *given, **flags)
    blocks = {"WINDOW": triton.next_power_of_2(window), "BLOCK": triton.next_power_of_2(length)}
    _accept[(batch,)](codes, places, answers, outcome, length, window, **blocks)
    return outcome


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


@functools.lru_cache(maxsize=None)
def settle_works(device: torch.device) -> bool:
    """Return whether settle gives here what PyTorch's operators give."""
    random = torch.Generator().manual_seed(0)
    length, num_codes, places = 12, 50, torch.tensor([1, 7, 11, 12])
    noise = torch.rand(len(places), length, num_codes, generator=random)
    codes = torch.randint(4, (len(places), 2 * length), generator=random)
    for window, sampling in ((1, Sampling(0.9)), (4, Sampling(7, 0.6, 0.5)), (3, Sampling(None, temperature=2))):
        logits = torch.randint(-6, 6, (len(places), window, num_codes), generator=random) / 4  # many are equal
        logits[..., :4] += 4  # so that some guesses are right
        results = []
        for function, where in ((operators.settle, torch.device("cpu")), (settle, device)):
            state = SamplingState(*(x.to(where, copy=True) for x in (codes, places, noise, places)))
            results.append([function(state, logits.to(where), sampling, 60), *state[:2]])
        if not all(torch.equal(expected, found.cpu()) for expected, found in zip(*results)):
            logger.warning("Triton chooses other codes than PyTorch's operators here; it is not used for that")
            return False
    return True


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
