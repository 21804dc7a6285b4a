"""The Triton kernels against PyTorch's operators, in Triton's interpreter; on a GPU the program checks itself."""

import os

import pytest

from tests.builders import python

pytest.importorskip("triton")
CODE = """
import torch
from backends.native.gpu_kernels import kernels_work, numbers_work, uniform_numbers
cpu = torch.device("cpu")
print(*(kernels_work(cpu, dtype) for dtype in (torch.float16, torch.float32)), numbers_work(cpu))
try:
    uniform_numbers([torch.Generator()] * 2, 4, cpu)
except ValueError:
    print("refused")
"""


def test_kernels_compute_what_operators_compute():
    ended = python("-c", CODE, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert ended.stdout.split() == ["True", "True", "True", "refused"], ended.stderr
