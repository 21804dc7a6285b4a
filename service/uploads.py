"""Images that people send: checked before they are decoded, so that no small file becomes gigabytes of pixels."""

import base64
import io

from PIL import Image

from data.images import crop_square

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 24_000_000  # what phones photograph
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def decode(text: str, size: int) -> Image.Image:
    """Return the middle square of a base64 image's first frame, with `size` pixels a side; ValueError is a sentence."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("The image is not base64.") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"The file has {len(data) / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are accepted.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"The image is too large; at most {MAX_PIXELS // 10**6} megapixels are accepted.") from None
    except Exception:  # a damaged header makes PIL raise anything
        raise ValueError("The file is not a readable image; PNG, JPEG, WebP, BMP and GIF are accepted.") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"The image is {width} × {height} pixels, {width * height / 1e6:.1f} megapixels; at most "
            f"{MAX_PIXELS // 10**6} are accepted."
        )
    try:
        image.load()
        return Image.fromarray(crop_square(image, size))
    except Exception:
        raise ValueError("The image file is damaged or incomplete.") from None
