"""A picture of the user's → the codes of its upper rows, which are kept while the rest is drawn.

Upper rows only: the model reads codes row by row, each after those before it, so that what lies below or to the right
of a place has no say in it. A region in the middle could be drawn anew, but would not fit what follows it.
"""

import json
import math
from pathlib import Path

import torch
from PIL import Image

from data.images import crop_square, load_image

KEEP = 0.5  # of the rows, unless told otherwise


def encode_kept_rows(loaded, picture, keep_rows=KEEP):
    """int64 (n,): codes of the upper rows of a picture's middle square. picture: a path, or PIL's.

    keep_rows: a number of rows of codes, from 1 on, or a fraction of them below 1. ValueError or OSError, in one line.
    """
    rows = count_kept_rows(loaded, keep_rows)
    size = loaded.model.vae.image_size
    if isinstance(picture, Image.Image):
        try:
            pixels = crop_square(picture, size)
        except Exception as error:  # whatever PIL raises for a damaged picture
            raise ValueError(f"the picture cannot be read ({' '.join(str(error).split())})") from None
    else:
        pixels = load_image(picture, size)
    codes = loaded.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    return codes[0, : rows * loaded.side]


def count_kept_rows(loaded, keep_rows):
    """keep_rows as a number of rows, 1 … side − 1; ValueError where it is none."""
    whole = keep_rows >= 1 and keep_rows == int(keep_rows)
    rows = int(keep_rows) if whole else math.ceil(keep_rows * loaded.side)
    if not (whole or 0 < keep_rows < 1) or not 1 <= rows < loaded.side:
        raise ValueError(
            f"keep_rows is {keep_rows:g}; it is a number of rows from 1 to {loaded.side - 1}, or a fraction below 1 "
            "that leaves a row to be drawn"
        )
    return rows


def read_prompt(path):
    """The prompt that a picture of ours was drawn from; None where the file does not say."""
    try:
        with Image.open(Path(path)) as image:
            said = image.info.get("Comment", image.info.get("comment", b""))
        prompt = json.loads(said).get("prompt")
    except (OSError, ValueError, AttributeError, TypeError, SyntaxError, Image.DecompressionBombError):
        return None
    return prompt if isinstance(prompt, str) else None
