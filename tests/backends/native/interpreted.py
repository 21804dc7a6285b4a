"""Checks of the kernels for sampling in Triton's interpreter (TRITON_INTERPRET=1); test_gpu_kernels.py runs them."""

import collections
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from backends.native import gpu_choice
from backends.native.gpu_kernels import TritonKernels, kernels_work
from models.packed_sampler import PackedStepper, PlainProduct
from models.sampling import Sampling, sample_codes
from tests.builders import small_dalle
from tests.conftest import TinyTokenizer

PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
LAUNCHES = collections.Counter()
run_kernel = InterpretedFunction.run


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that a GPU would launch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or "empty" in name or name in ("_unsafe_view", "detach")):
            LAUNCHES[name] += 1
        return func(*args, **(kwargs or {}))


def run_counted(kernel, *args, **options):
    LAUNCHES[kernel.fn.__name__] += 1
    with _disable_current_modes():
        return run_kernel(kernel, *args, **options)


class TritonStepper(PackedStepper):
    """Does on a CPU what CapturedStepper does on a GPU."""

    settle = staticmethod(gpu_choice.settle)

    def hold(self, state):
        for layer in self.layers:
            layer.cache = layer.cache.contiguous()
        return state

    def release(self, state):
        return state

    def last_place(self, inputs):
        return self.dalle.image_seq_len - 1

    def advance(self, state, sampling, window):
        LAUNCHES.clear()
        with Operators():
            return super().advance(state, sampling, window)


def sample(kind, kernels, model, window, sampling, given_count):
    random = torch.Generator().manual_seed(0)
    text, codes = (torch.randint(1, 32, (3, count), generator=random) for count in (6, given_count))
    text[1], text[2, 3:] = text[0], 0
    pack = functools.partial(PlainProduct, torch.float32)
    stepper = kind(model, pack, torch.float32, windows=(window,), kernels=kernels)
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return sample_codes(model, text, stepper, sampling, noise, codes)


def check_codes_and_launches():
    """In fp32 codes are those of PyTorch's operators; a pass of few rows takes five kernels for a layer."""
    for window, sampling, given_count, options in (
        (1, Sampling(), 13, {}),
        (4, Sampling(None, 0.9, 0.9, 1.5), 10, {}),
        (16, Sampling(8), 10, {"sandwich_norm": True}),
    ):
        model = small_dalle(TinyTokenizer(), 0.3, attn_types=PATTERNS, depth=4, dim_head=16, **options)
        rest = model, window, sampling, given_count
        expected = sample(PackedStepper, None, *rest)
        assert torch.equal(sample(TritonStepper, TritonKernels(torch.float32, busy=2), *rest), expected), window
        if not options:
            of_layers = LAUNCHES["_multiply"] + LAUNCHES["_attend"]
            assert of_layers == 4 * 5 and sum(LAUNCHES.values()) - of_layers <= 17, LAUNCHES


InterpretedFunction.run = run_counted
cpu = torch.device("cpu")
assert all(kernels_work(cpu, dtype) for dtype in (torch.float16, torch.float32))
assert gpu_choice.settle_works(cpu)
assert gpu_choice.numbers_work(cpu)
with pytest.raises(ValueError):
    gpu_choice.uniform_numbers([torch.Generator()] * 2, 4, cpu)
check_codes_and_launches()
