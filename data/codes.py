"""Encode a folder's images once: the VQGAN is frozen and the crop is fixed, so their codes never change.

The caller passes the function from pixels to codes; this module never sees a model.
"""

import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from data.array_cache import ArrayCache, Computed, MappedRows
from data.files import File, printable
from data.images import ImagePath, read_images

PRECISION = "fp32"  # of the encoder on every machine; TF32 changes one code in 1,500, bf16 one in 220
CROP = "upright, middle square, bilinear"  # what load_image does; a change there must change this

Encode = Callable[[torch.Tensor], torch.Tensor]  # float32 (B, 3, S, S) in [0, 1] -> integers (B, image_seq_len)


def open_code_cache(folder: Union[str, Path], cache_dir: Union[str, Path], vae: Any) -> ArrayCache:
    """Open the cache in `cache_dir` with an image tokenizer's codes of `folder`'s images; it may be empty.

    Raises:
        OSError: `cache_dir` exists and cannot be read.
    """
    fingerprint = vae.fingerprint()
    key = {"version": 2, "vqgan": fingerprint, "precision": PRECISION, "crop": CROP}
    key.update(image_size=vae.image_size, num_codes=vae.num_tokens)
    vqgan = re.sub("[^A-Za-z0-9]", "", fingerprint)[:12]
    dtype = np.uint16 if vae.num_tokens <= 65536 else np.uint32
    return ArrayCache(cache_dir, f"codes-{vqgan}-{vae.image_size}", folder, dtype, vae.image_seq_len, key)


def load_codes(
    images: Sequence[File],
    encode: Encode,
    cache: ArrayCache,
    *,
    paths: Optional[Sequence[ImagePath]] = None,
    batch_size: int = 16,
    workers: int = 0,
) -> Tuple[MappedRows, np.ndarray]:
    """Return the codes of every image, after encoding those that the cache lacks.

    An image whose size in bytes or modification time changed is encoded again. `workers` processes decode images (0:
    this one); `encode` runs in this process. Several processes that call this at once divide the work.

    Args:
        paths: where each image can be read; None: under its name in the cache's folder.

    Returns:
        The rows of the cache, and the row of each image: int64 (images,), -1 for an image that cannot be read.

    Raises:
        ValueError: no image can be read, or `encode` returned something else than codes.
        OSError: the cache cannot be written.
    """
    if not images:
        raise ValueError(f"{printable(cache.folder)}: no image to encode")
    reasons: Dict[int, str] = {}

    def compute(batches: Iterator[List[int]]) -> Iterator[Computed]:
        places = paths or [os.path.join(cache.folder, name) for name, _, _ in images]
        for batch in read_images(places, cache.key["image_size"], batches, workers):
            reasons.update(batch.unreadable)
            if batch.pixels is not None:
                codes = encode(batch.pixels.float().div_(255))
                yield batch.indices, _check_codes(codes, (len(batch.indices), cache.width), cache.key["num_codes"])

    cache.fill(images, compute, batch_size=batch_size, title="encoding images", unit="image")
    if not any(image in cache for image in images):
        reason = next(iter(reasons.values()))
        raise ValueError(f"{printable(cache.folder)}: none of {len(images)} images can be read ({reason})")
    return cache.load(images)


def _check_codes(codes: torch.Tensor, shape: Tuple[int, int], num_codes: int) -> np.ndarray:
    if tuple(codes.shape) != shape or codes.is_floating_point():
        raise ValueError(f"encode returned {codes.dtype} {tuple(codes.shape)} instead of integers {shape}")
    if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(
            f"encode returned codes {int(codes.min())} to {int(codes.max())}; the codebook has {num_codes}"
        )
    return codes.cpu().numpy()
