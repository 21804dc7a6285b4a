"""Pictures that people send: looked at before they are decoded, so that no small file becomes gigabytes of pixels."""

import io
import os

from PIL import Image

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 24_000_000  # what phones photograph
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SAID = "PNG, JPEG, WebP, BMP and GIF are accepted"


def opened(source):
    """A file's path, or its bytes → PIL picture, decoded (the first one, where it moves). ValueError with a sentence
    for what is no picture, too large or damaged.
    """
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size > MAX_BYTES:
        raise ValueError(f"The picture's file has {size / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are accepted.")
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"The picture is too large; at most {MAX_PIXELS // 10**6} megapixels are accepted.") from None
    except Exception:  # PIL raises whatever a damaged header makes it stumble over
        raise ValueError(f"The file is no picture that can be read; {SAID}.") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"The picture is {width} × {height} pixels, {width * height / 1e6:.1f} megapixels; at most "
            f"{MAX_PIXELS // 10**6} are accepted."
        )
    try:
        picture.load()
    except Exception:
        raise ValueError("The picture's file is damaged or incomplete.") from None
    return picture
