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
    on_cpu = backend.device.type == "cpu"
    cache_dtype = torch.float32 if on_cpu else backend.dtype  # CPUs attend from bf16 five times slower
    pack = packer(backend.device, backend.dtype, backend.settings.batch_size)
    decoder = Decoder(model, pack, cache_dtype, backend.autocast)

    @torch.no_grad()
    def sample(text, *, generator=None, image_codes=None, watch=None, **shaping):
        shaping = {"top_k": 0.99, "top_p": None, "temperature": 1.0, "cond_scale": 1.0, **shaping}
        image_codes = None if image_codes is None else image_codes.to(backend.device)
        given = {"generator": generator, "image_codes": image_codes, "watch": watch}
        return draw_codes(model, text.to(backend.device), decoder.logits, **shaping, **given).cpu()

    return sample


def packer(device, dtype, rows):
    """Decoder's pack for this machine and batches of `rows`.

    (weight (out, in), bias (out,) or None, geglu) → a function of x (B, in), fp32 or dtype, → dtype (B, out), or (B,
    out / 2) with GEGLU. x is rounded to dtype before and what comes out after, sums are fp32, in every one of them.
    """
    pack = plain_packer(dtype)
    if device.type == "cpu":
        for fits, other in ((True, onednn_packer), (dtype == torch.bfloat16 and rows == 1, fbgemm_packer)):
            with contextlib.suppress(RuntimeError, TypeError, AttributeError):  # builds differ in what they have
                if fits:
                    found = other(dtype, rows, pack)
                    found(torch.ones(8, 8), torch.ones(8), geglu=True)(torch.ones(2, 8))
                    pack = found
    return pack


def plain_packer(dtype):
    def pack(weight, bias, geglu=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

        def product(x):
            out = F.linear(x.to(dtype), weight, bias)
            if not geglu:
                return out
            value, gate = out.chunk(2, dim=-1)
            return value * F.gelu(gate)

        return product

    return pack


def onednn_packer(dtype, rows, otherwise):
    """Weights in a layout of oneDNN's own, two to three times as fast for a few rows; torch.compile's, from torch 2.1
    on.
    """
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        reorder, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    else:
        return otherwise
    least = ROWS if dtype == torch.bfloat16 else 1

    def pack(weight, bias, geglu=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        few = torch.zeros(least, weight.shape[1], dtype=dtype)
        parts = [reorder(part.contiguous(), max(rows, least)) for part in weight.chunk(1 + geglu)]
        biases = (None, None) if bias is None else bias.chunk(1 + geglu)

        def product(x):
            count = len(x)
            if count < least:
                few[:count] = x
                x = few
            else:
                x = x.to(dtype)
            out = multiply(x, parts[0], biases[0], "none", [], "")
            if geglu:
                out = out * multiply(x, parts[1], biases[1], "gelu", [], "none")
            return out[:count]

        return product

    return pack


def fbgemm_packer(dtype, rows, otherwise):
    """bf16 weights in fp16, which holds all of their bits but of the smallest, for FBGEMM: it reads them at nearly the
    memory's speed for a single row.
    """
    multiply = torch.ops.quantized.linear_dynamic_fp16

    def pack(weight, bias, geglu=False):
        rounded = weight.to(dtype).float()
        if not (rounded.half().float() - rounded).norm() <= 1e-5 * rounded.norm():
            return otherwise(weight, bias, geglu)
        packed = torch.ops.quantized.linear_prepack_fp16(rounded, None if bias is None else bias.to(dtype).float())

        def product(x):
            out = multiply(x.to(dtype).float(), packed)
            if not geglu:
                return out.to(dtype)
            value, gate = out.chunk(2, dim=-1)
            # Transposed, so that torch does not hand it to oneDNN, which takes 30 µs to begin.
            gate = F.gelu(gate.reshape(2, -1).T).T.reshape(gate.shape)
            return value.to(dtype) * gate.to(dtype)

        return product

    return pack
