"""What all image tokenizers have in common: VQGANs (models/vae.py) and others (models/discrete_vae.py)."""

import contextlib
import hashlib
import json
import math
from typing import Any, ContextManager, Dict, Iterator, Optional

import torch
from torch import nn


class ImageTokenizer(nn.Module):
    """A frozen network that encodes images as codes and decodes codes; calling it with images returns their codes.

    A subclass defines find_codes and decode_grid.

    Args:
        hparams: plain values that describe the network: {"target": name, "params": its sizes}. See build_tokenizer.
        image_size: side of the images in pixels.
        num_layers: log2 of the downsampling factor f.
        num_tokens: number of codes.
        largest: values of an image's largest activation, which decides how many images are encoded at once.

    Attributes:
        fmap_size: side of the code grid, image_size / f.
        image_seq_len: fmap_size².
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: Dict[str, Any],
        *,
        image_size: int,
        num_layers: int,
        num_tokens: int,
        largest: int,
    ):
        super().__init__()
        self.hparams, self.image_size, self.num_layers, self.num_tokens = hparams, image_size, num_layers, num_tokens
        self.fmap_size = image_size // 2**num_layers
        self.image_seq_len = self.fmap_size**2
        self.largest = largest
        self.model: Any = model.requires_grad_(False).eval()

    def find_codes(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels float32 (B, 3, H, W) in [0, 1] as codes int64 (B, h, w)."""
        raise NotImplementedError

    def decode_grid(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes int64 (B, h, w) to pixels (B, 3, H, W), about in [0, 1]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "ImageTokenizer":
        """Stay in evaluation mode, because dropout would change an image's codes."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See get_codebook_indices."""
        return self.get_codebook_indices(images)

    @torch.no_grad()
    def get_codebook_indices(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, image_size, image_size) in [0, 1] as codes int64 (B, image_seq_len), row by row.

        Runs in the parameters' precision, without autocast and TF32; the nearest codes are found in fp32.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a VQGAN that takes (batch, %d, %d, %d)" % expected
            )
        with _no_autocast(images.device), _no_tf32():
            return self.find_codes(images.float()).flatten(1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, rows: Optional[int] = None) -> torch.Tensor:
        """Decode codes int64 (B, h·w), row by row, to pixels float32 (B, 3, h·f, w·f) in [0, 1].

        Args:
            rows: h, for the upper part of an image; None means a square.
        """
        side = math.isqrt(codes.shape[-1])
        if codes.dim() != 2 or (rows is None and side**2 != codes.shape[-1]):
            raise ValueError(f"codes of shape {tuple(codes.shape)} are not (batch, side * side)")
        rows = side if rows is None else rows
        with _no_autocast(codes.device):
            return self.decode_grid(codes.reshape(len(codes), rows, -1)).clamp(0, 1)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the configuration and all weights as fp32."""
        digest = hashlib.sha256(json.dumps(self.hparams, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _no_autocast(device: torch.device) -> ContextManager[Any]:
    # torch 2.0.1 refuses to switch off autocast of other devices.
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device_type=device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Compute in fp32 on GPUs, too; from Ampere on, torch's convolutions round to TF32, which changes codes."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def size_in(mapping: Dict[str, Any], name: str, default: Optional[int] = None) -> int:
    value = mapping.get(name, default)
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 20:
        raise ValueError(f"{name} must be a whole number from 1 to {1 << 20}, not {value!r}")
    return value
