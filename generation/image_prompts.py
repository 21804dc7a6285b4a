"""Images to start from: the codes of an image's upper rows, which are kept while the rest is generated.

Only upper rows can be kept: the model reads codes row by row, so what is below or to the right of a place does not
influence it. A new region in the middle would not fit what follows it.
"""

import json
import math
from pathlib import Path
from typing import Union

import torch
from PIL import Image
from torch import Tensor

from data.images import crop_square, load_image
from generation.loading import LoadedModel

KEEP = 0.5  # default fraction of the rows


def encode_kept_rows(loaded: LoadedModel, image: Union[str, Path, Image.Image], keep_rows: float = KEEP) -> Tensor:
    """Return the codes int64 (n,) of the upper rows of an image's middle square; see count_kept_rows.

    Raises:
        ValueError, OSError: the image cannot be read, or keep_rows is out of its range; one line.
    """
    rows = count_kept_rows(loaded, keep_rows)
    size = loaded.model.vae.image_size
    if isinstance(image, Image.Image):
        try:
            pixels = crop_square(image, size)
        except Exception as error:  # whatever PIL raises for damaged data
            raise ValueError(f"the image cannot be read ({' '.join(str(error).split())})") from None
    else:
        pixels = load_image(image, size)
    codes = loaded.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    return codes[0, : rows * loaded.side]


def count_kept_rows(loaded: LoadedModel, keep_rows: float) -> int:
    """Return keep_rows, a number of rows from 1 or a fraction below 1, as a number of rows from 1 to side − 1."""
    is_count = keep_rows >= 1 and keep_rows == int(keep_rows)
    rows = int(keep_rows) if is_count else math.ceil(keep_rows * loaded.side)
    if not (is_count or 0 < keep_rows < 1) or not 1 <= rows < loaded.side:
        raise ValueError(
            f"keep_rows is {keep_rows:g}; it must be a number of rows from 1 to {loaded.side - 1}, or a fraction below "
            "1 that leaves a row to generate"
        )
    return rows


def read_prompt(path: str) -> str:
    """Return the prompt of an image that generate.py saved; ValueError if it has none, OSError if it does not exist."""
    if not Path(path).exists():
        raise FileNotFoundError(f"--variations {path}: no such file")
    try:
        with Image.open(Path(path)) as image:
            comment = image.info.get("Comment", image.info.get("comment", b""))
        prompt = json.loads(comment).get("prompt")
    except (OSError, ValueError, AttributeError, TypeError, SyntaxError, Image.DecompressionBombError):
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"--variations {path}: the image has no prompt in it; give it with --text")
    return prompt
