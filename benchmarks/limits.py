"""Time calls, measure what the machine can do at best, and count the work of a sample.

The limit of a row is the time that its matrix products take at the best rate measured in its precision or, if that is
longer, the time to read its weights. The products inside attention, softmax, norms and so on are not counted, so
the limit is slightly faster than any program could be.
"""

import os
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from backends.native.backend import fast_in_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Work = Dict[str, Any]  # of one sample: precision, operations and perhaps bytes to read; or seconds and limit_is
Measurement = Tuple[List[float], Optional[Work]]  # seconds per sample of each repetition, and the work of a sample


def time_call(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, including the work that it starts on `device`."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_calls(
    function: Callable[[], Any],
    device: torch.device,
    samples: int = 1,
    quick: bool = False,
    at_least: int = 3,
    enough_seconds: float = 5.0,
) -> List[float]:
    """Return the seconds per sample of each call, after a call for warm-up.

    Args:
        samples: number of samples in a call.
        at_least: number of calls; up to ten if they take less than enough_seconds together.
    """
    if quick:
        at_least, enough_seconds = 1, 0.0
    function()
    seconds: List[float] = []
    while len(seconds) < at_least or (len(seconds) < 10 and sum(seconds) < enough_seconds):
        seconds.append(time_call(function, device))
    return [taken / samples for taken in seconds]


def measure_matrix_rate(precision: str, device: torch.device, quick: bool = False) -> float:
    """Return operations per second of the best of a few square matrix products and a convolution.

    A convolution is a matrix product, too, and may use a faster kernel: in fp32, oneDNN's is faster than MKL's product.
    """
    dtype, best = DTYPES[precision], 0.0

    def measure(operations: float, function: Callable[..., Tensor], *operands: Tensor) -> None:
        nonlocal best
        seconds = time_calls(partial(function, *operands), device, at_least=5, enough_seconds=0.5)
        best = max(best, operations / min(seconds))

    for side in (512,) if quick else (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        measure(2 * side**3, nn.functional.linear, one, other)
    channels, side = (128, 32) if quick else (256, 64)
    x, weight = (
        torch.randn(1, channels, side, side, device=device),
        torch.randn(channels, channels, 3, 3, device=device),
    )
    x, weight = (tensor.to(dtype, memory_format=torch.channels_last) for tensor in (x, weight))
    measure(2 * weight.numel() * side**2, partial(nn.functional.conv2d, padding=1), x, weight)
    return best


def measure_read_rate(device: torch.device) -> float:
    """Return bytes per second that a sum reads from memory."""
    large = torch.randn((32 if device.type == "cpu" else 256) * 2**20, device=device)
    return 4 * large.numel() / min(time_calls(large.sum, device, at_least=5, enough_seconds=0.5))


def find_limit(work: Work, device: torch.device, quick: bool = False) -> Tuple[float, str]:
    """Return the least seconds that a sample can take, and what the limit is."""
    if "seconds" in work:
        return work["seconds"], work["limit_is"]
    multiplying = work["operations"] / measure_matrix_rate(work["precision"], device, quick)
    reading = work["bytes"] / measure_read_rate(device) if work.get("bytes") else 0.0
    return (reading, "memory bandwidth") if reading > multiplying else (multiplying, "matrix products")


def count_layer_weights(model: Any) -> int:
    """Count elements of the matrices that every position of a DALLE is multiplied with."""
    return sum(parameter.numel() for parameter in model.transformer.layers.parameters() if parameter.dim() == 2)


def count_head_weights(model: Any) -> int:
    """Count elements of the head that predicts codes."""
    return model.num_image_tokens * model.text_emb.weight.shape[1]


def count_training_operations(model: Any) -> int:
    """Count operations of one sample: two per element in the forward pass and four in the backward pass.

    Text positions predict text only, and image positions codes only.
    """
    text_head = model.text_seq_len * model.num_text_tokens * model.text_emb.weight.shape[1]
    products = (model.text_seq_len + model.image_seq_len) * count_layer_weights(model)
    return 6 * (products + text_head + model.image_seq_len * count_head_weights(model))


def describe_machine(device: torch.device) -> Dict[str, Any]:
    """Return what results.json says about the machine and the software."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    return {
        "cpu": name.group(1) if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(set(re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_bf16)\b", text))),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "fast_in_bf16": fast_in_bf16(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
