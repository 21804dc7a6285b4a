"""What a machine can do at best, measured where a row is measured; how much work a row is; and which machine it was.

The limit of a row is the time that its matrix products take at the best rate seen in its precision, or the reading of
its weights if that takes longer. Attention's own products and what lies between products are left out, so that a limit
is a little lower than what any program could reach.
"""

import copy
import os
import platform
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from backends.native.backend import fast_in_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def seconds_of(function, device):
    """Seconds of one call, up to the end of what it started on `device`."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def repeated(function, device, quick=False, at_least=3, enough_seconds=5.0):
    """Seconds of each call, after one that does not count: `at_least`, and up to ten while they are short."""
    if quick:
        at_least, enough_seconds = 1, 0.0
    function()
    found = []
    while len(found) < at_least or (len(found) < 10 and sum(found) < enough_seconds):
        found.append(seconds_of(function, device))
    return found


def matrix_rate(precision, device, quick=False):
    """Operations a second of the best of a few square matrix products."""
    best = 0.0
    for side in (512,) if quick else (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        one, other = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
        seconds = repeated(partial(nn.functional.linear, one, other), device, at_least=5, enough_seconds=0.5)
        best = max(best, 2 * side**3 / min(seconds))
    return best


def read_rate(device):
    """Bytes a second that a sum reads from memory."""
    large = torch.randn((32 if device.type == "cpu" else 256) * 2**20, device=device)
    return 4 * large.numel() / min(repeated(large.sum, device, at_least=5, enough_seconds=0.5))


def limit_of(work, device, quick=False):
    """The least seconds a sample can take, and what sets them.

    work, all of one sample: precision, operations and, where memory may be the limit, bytes; or seconds and of, where a
    row knows its limit.
    """
    if "seconds" in work:
        return work["seconds"], work["of"]
    multiplying = work["operations"] / matrix_rate(work["precision"], device, quick)
    reading = work["bytes"] / read_rate(device) if work.get("bytes") else 0.0
    return (reading, "memory bandwidth") if reading > multiplying else (multiplying, "matrix products")


def layer_weights(model):
    """Elements of the matrices that every position of a DALLE is multiplied with."""
    return sum(parameter.numel() for parameter in model.transformer.layers.parameters() if parameter.dim() == 2)


def image_head(model):
    """Elements of the head's part for codes."""
    return model.num_image_tokens * model.text_emb.weight.shape[1]


def training_operations(model):
    """Of one sample: forward and twice that backward, two operations an element; text positions predict text alone."""
    width = model.text_emb.weight.shape[1]
    text_head = model.text_seq_len * model.num_text_tokens * width
    products = (model.text_seq_len + model.image_seq_len) * layer_weights(model)
    return 6 * (products + text_head + model.image_seq_len * image_head(model))


def convolution_operations(network, *inputs):
    """Of network(*inputs), all convolutions; nothing is computed, shapes are followed on the meta device."""
    counted = []

    def count(module, given, out):
        counted.append(2 * out.numel() * module.weight[0].numel())

    network = copy.deepcopy(network).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(*(tensor.to("meta") for tensor in inputs))
    return sum(counted)


def machine(device):
    """What results.json says of where it was measured."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(r"model name\s*:\s*(.*)", text)
    flags = set(re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_bf16)\b", text))
    return {
        "cpu": found.group(1) if found else name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(flags),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "fast_in_bf16": fast_in_bf16(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit():
    """Of the working tree, with + where it was changed; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except OSError:
        return None
    return said[0].stdout.strip() + ("+" if said[1].stdout.strip() else "") if said[0].returncode == 0 else None
