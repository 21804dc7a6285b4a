"""Drawing on CPUs and CUDA GPUs: models/decoder.py with weights in the form that the machine multiplies fastest.

Features newer than torch 2.0 stand behind a check.
"""

import contextlib

import torch
from torch.nn import functional as F

from models.decoder import Decoder
from models.sampling import draw_codes

ROWS = 4  # with fewer, oneDNN takes other bf16 kernels: a fifth slower, and their last bits differ


def sampler(model, backend):
    """Backend.sampler of a NativeBackend."""
    model = model.to(backend.device).eval()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[backend.precision]
    cache_dtype = torch.float32 if backend.device.type == "cpu" else dtype  # CPUs attend from bf16 five times slower
    pack = packer(backend.device, dtype, backend.settings.batch_size)
    decoder = Decoder(model, pack, cache_dtype, backend.autocast)

    @torch.no_grad()
    def sample(text, *, generator=None, image_codes=None, **shaping):
        shaping = {"top_k": 0.99, "top_p": None, "temperature": 1.0, "cond_scale": 1.0, **shaping}
        given = {"generator": generator, "image_codes": image_codes}
        return draw_codes(model, text.to(backend.device), decoder.logits, **shaping, **given).cpu()

    return sample


def packer(device, dtype, rows):
    """Decoder's pack for this machine: (weight (out, in), bias (out,) or None, gelu) → a function (B, in) → (B, out).

    oneDNN multiplies a few rows with weights in a layout of its own two to three times as fast as with plain ones.
    """

    def plain(weight, bias, gelu=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if gelu:
            return lambda x: F.gelu(F.linear(x.to(dtype), weight, bias))
        return lambda x: F.linear(x.to(dtype), weight, bias)

    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):  # what torch.compile uses, from torch 2.1 on
        reorder, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise

        def packed(weight, bias, gelu=False):
            weight, bias = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
            few = torch.zeros(ROWS if dtype == torch.bfloat16 else 1, weight.shape[1], dtype=dtype)
            weight = reorder(weight, max(rows, len(few)))
            after = ("gelu", [], "none") if gelu else ("none", [], "")

            def product(x):
                count = len(x)
                if count >= len(few):
                    return multiply(x.to(dtype), weight, bias, *after)
                few[:count] = x
                return multiply(few, weight, bias, *after)[:count]

            return product

        with contextlib.suppress(RuntimeError, TypeError):  # not every build has it for every dtype
            packed(torch.ones(8, 8), torch.ones(8), gelu=True)(torch.ones(2, 8, dtype=dtype))
            return packed
    return plain
