"""Inference on CPUs and CUDA GPUs: sampling with packed weights, and the VQGAN in a fast layout and precision.

Codes are what a DALL-E is trained on, so they are always computed in fp32: in bf16, one in two hundred changed for a
trained VQGAN on photographs. Features newer than torch 2.0 are used only after a check.
"""

import contextlib
import copy
import functools
import logging
import os
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
from taming.modules.diffusionmodules.model import ResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

from backends.native.compilation import CompiledLater
from backends.native.gpu_sampler import CapturedStepper, fastest_kernels
from models.dalle import DALLE
from models.packed_sampler import CachedStepper, LayerKernels, Pack, PackedStepper, PlainProduct, Product
from models.sampling import CodeCallback, Generators, Sampling, Stepper, sample_codes
from models.vae import ImageTokenizer, VQGanVAE

logger = logging.getLogger("minidalle")
ROWS = 4  # for fewer rows oneDNN takes other kernels, which are not faster and differ in the last bits
# Sums of at most this many terms in fp32 are left to MKL, with columns stored together, because a call of oneDNN takes
# 15 µs more. MKL divides longer sums in ways that depend on the number of rows.
SHORT = 256
WINDOWS = (1, 2, 3, 4, 6, 8, 16)  # codes that a pass may compute for each image
GPU_WINDOWS = (1, 2, 4, 8, 16)  # each is captured once for a batch size
CACHE_BYTES = 16 * 2**20  # a layer's output that fits a CPU's cache; larger batches are slower than one by one
AT_ONCE = {"cpu": 32, "cuda": 256}  # images from which on larger batches are no faster
GPU_BATCH = 32  # images; the widest layer of the official network then takes 0.5 GB in bf16


class NativeSampler:
    """The function that Backend.sampler of a NativeBackend returns."""

    def __init__(self, model: DALLE, backend: Any, window: Optional[int] = None):
        self.model, self.device = model.eval(), backend.device
        on_cpu = backend.device.type == "cpu"
        cache_dtype = torch.float32 if on_cpu else backend.dtype  # CPUs attend five times slower in bf16
        pack = packer(backend.device, backend.dtype)
        windows: Sequence[int] = WINDOWS if on_cpu else GPU_WINDOWS
        if window is not None:
            windows = (min(window, model.image_seq_len),)
        self.stepper: Stepper
        if model.transformer.is_plain:
            kind = PackedStepper if on_cpu else CapturedStepper
            kernels = None if on_cpu else fastest_kernels(backend.device, cache_dtype)
            self.stepper = kind(model, pack, cache_dtype, backend.autocast, windows, kernels)
        else:
            self.stepper = CachedStepper(model, backend.autocast)

    def __call__(
        self,
        text: Tensor,
        sampling: Sampling = Sampling(),
        *,
        generator: Generators = None,
        image_codes: Optional[Tensor] = None,
        on_code: Optional[CodeCallback] = None,
    ) -> Tensor:
        image_codes = None if image_codes is None else image_codes.to(self.device)
        text = text.to(self.device)
        return sample_codes(self.model, text, self.stepper, sampling, generator, image_codes, on_code).cpu()


def packer(device: torch.device, dtype: torch.dtype) -> Pack:
    """Return the fastest PackedStepper.pack of this machine.

    Every packed product rounds x (B, in) to dtype and returns dtype; its sums are fp32.
    """
    if device.type == "cpu":
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):  # not in every build of torch
            pack = onednn_packer(dtype)
            pack(torch.ones(8, 8), torch.ones(8), LayerKernels().geglu)(torch.ones(2, 8))
            return pack
    return functools.partial(PlainProduct, dtype)


def onednn_packer(dtype: torch.dtype) -> Pack:
    """Return a pack for oneDNN's weight layout, two to three times as fast as F.linear for a few rows.

    The operators are those of torch.compile, from torch 2.1 on.

    Raises:
        AttributeError: torch lacks them.
    """
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        reorder, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    else:
        raise AttributeError("this build of torch has no packed linear operator")

    def pack(weight: Tensor, bias: Optional[Tensor], geglu: Optional[Product] = None) -> Product:
        if dtype == torch.float32 and weight.shape[1] <= SHORT:
            return pad_rows(PlainProduct(dtype, weight.t().contiguous().t(), bias, geglu), weight.shape[1], dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        parts = [reorder(part.contiguous(), ROWS) for part in weight.chunk(1 if geglu is None else 2)]
        biases = (None, None) if bias is None else bias.chunk(len(parts))

        def product(x: Tensor) -> Tensor:
            out = multiply(x, parts[0], biases[0], "none", [], "")
            if len(parts) == 2:  # GEGLU within the products
                out = out * multiply(x, parts[1], biases[1], "gelu", [], "none")
            return out

        return pad_rows(product, weight.shape[1], dtype)

    return pack


def pad_rows(product: Product, terms: int, dtype: torch.dtype) -> Product:
    """Return a product of x (B, terms) that computes at least ROWS rows."""
    few = torch.zeros(ROWS, terms, dtype=dtype)

    def padded(x: Tensor) -> Tensor:
        count = len(x)
        if count >= ROWS:
            return product(x.to(dtype))
        few[:count] = x
        return product(few)[:count]

    return padded


class FusedResnetBlock(ResnetBlock):
    """Taming's block for inference: x · sigmoid(x) in one pass over memory, sums in place."""

    def forward(self, x: Tensor, temb: Optional[Tensor]) -> Tensor:
        """Compute what ResnetBlock computes, without dropout; x (B, C, H, W) is overwritten."""
        out = self.conv1(F.silu(self.norm1(x), inplace=True))
        out = self.conv2(F.silu(self.norm2(out), inplace=True))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return out.add_(x)


def encoder(vae: ImageTokenizer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels to codes, see `Backend.encode`."""
    fast = fast_copy(vae, "decoder", torch.float32, device)
    at_once = max(1, CACHE_BYTES // (4 * vae.largest)) if device.type == "cpu" else GPU_BATCH

    def encode(pixels: Tensor) -> Tensor:
        return torch.cat([fast(part.to(device)).cpu() for part in pixels.split(at_once)])

    return encode


def decoder(vae: ImageTokenizer, device: torch.device, precision: str) -> Callable[..., Tensor]:
    """Return a function from codes to pixels, see `Backend.decode`.

    On a CPU an image does not depend on the others in its batch. For a trained VQGAN, bf16 differs from fp32 by 0.2 of
    255 in the mean (60 dB). fp16 is not used because attention could overflow.
    """
    fast = fast_copy(vae, "encoder", torch.bfloat16 if precision == "bf16" else torch.float32, device)
    at_once = 1 if device.type == "cpu" else GPU_BATCH  # the rounding of convolutions depends on the batch size

    def decode(codes: Tensor, rows: Optional[int] = None) -> Tensor:
        return torch.cat([fast.decode(part.to(device), rows).cpu() for part in codes.split(at_once)])

    return decode


def fast_copy(vae: ImageTokenizer, without: str, dtype: torch.dtype, device: torch.device) -> ImageTokenizer:
    """Return a copy of a VQGAN with fused blocks, and on CPUs channels-last weights; `without` names the half to omit.

    Other image tokenizers are copied as they are, in fp32.
    """
    if not isinstance(vae, VQGanVAE):
        return copy.deepcopy(vae).to(device)
    left_out = {id(getattr(vae.model, without)): nn.Identity()}  # deepcopy believes that it has copied these
    fast = copy.deepcopy(vae, left_out).to(device, dtype)
    if device.type == "cpu":  # on an H200, cuDNN and PyTorch's norms take 1.2 to 1.4 times as long with channels last
        fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in fast.modules():
        if type(module) is ResnetBlock:
            module.__class__ = FusedResnetBlock
    if device.type == "cuda":
        half = "encoder" if without == "decoder" else "decoder"
        setattr(fast.model, half, CompiledLater(getattr(fast.model, half)))
    return fast


def images_at_once(model: DALLE, device: torch.device) -> int:
    """Return how many images are fast and fit half of the free memory."""
    attention = model.transformer.layers[0].attention
    keys_and_values = 2 * len(model.transformer.layers) * attention.heads * attention.dim_head  # of one position
    positions = model.text_seq_len + model.image_seq_len
    noise = model.image_seq_len * model.num_image_tokens
    image = 4 * (2 * keys_and_values * positions + 2 * noise + 64 * 3 * model.vae.image_size**2)  # with guidance
    return int(max(1, min(AT_ONCE[device.type], free_memory(device) // 2 // image)))


def total_memory(device: torch.device) -> int:
    """Return the most bytes that this process can have: the GPU's, or the machine's within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([_of_machine("SC_PHYS_PAGES"), *(limit for limit, _ in _container_memory())])


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    measured = read_status("MemAvailable", "/proc/meminfo")
    free = _of_machine("SC_AVPHYS_PAGES") if measured is None else measured
    return max(0, min([free, *(limit - used for limit, used in _container_memory())]))


def _container_memory(folder: Union[str, Path] = "/sys/fs/cgroup") -> List[Tuple[int, int]]:
    """Return the limit of this container's memory and how much is used without caches of files, if it has a limit."""
    found = []
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file "),  # of cgroups, version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file "),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            most, in_use = (int(Path(folder, name).read_text()) for name in (limit, used))
            stat = Path(folder, limit).with_name("memory.stat").read_text().splitlines()
            found.append((most, in_use - sum(int(line.split()[1]) for line in stat if line.startswith(cache))))
    return found


def _of_machine(pages: str) -> int:
    """Return an amount that the system counts in pages, in bytes; 4 GiB on systems that do not say."""
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def read_status(name: str, path: str = "/proc/self/status") -> Optional[int]:
    """Return the bytes of a line `name: number kB`, or None without such a line."""
    found: List[str] = []
    with contextlib.suppress(OSError), open(path) as file:
        found = [line.split()[1] for line in file if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
