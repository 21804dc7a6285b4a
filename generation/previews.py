"""Images while they form: the rows of codes so far, decoded, in at most a tenth of the time that sampling takes."""

import time
from typing import Any, Callable, List

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from generation.images import to_image
from generation.loading import LoadedModel

ANIMATED = 16  # images of an animation
SHARE = 0.06  # of the sampling time for previews; they also push data out of caches, which makes it up to a tenth


class Preview:
    """A generate_batch on_code that shows up to `most` images of a batch after `every` few rows of codes.

    A preview is skipped if it would take more than `share` of the time, judging by the previous one.

    Args:
        show: called with images of full size, gray where codes are missing, and the number of rows so far.
        row_cost: seconds that a row of one image takes, known from an earlier batch.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        every: int,
        show: Callable[[List[Image.Image], int], Any],
        share: float = SHARE,
        most: int = 9,
        row_cost: float = 0.0,
    ):
        self.loaded, self.every, self.show, self.share, self.most = loaded, every, show, share, most
        self.start = time.monotonic()
        self.spent = 0.0  # seconds in previews so far
        self.row_cost = row_cost

    def __call__(self, codes: Tensor) -> None:
        """Show codes so far, int64 (B, n), if they are complete rows and a preview is due."""
        side = self.loaded.side
        row, rest = divmod(codes.shape[1], side)
        if rest or row % self.every or row == side:
            return
        started = time.monotonic()
        expected = (started - self.start - self.spent) * side / row  # seconds of sampling for the whole image
        shown = codes[: self.most]
        if self.spent + self.row_cost * row * len(shown) > self.share * expected:
            return
        self.show(decode_upper_rows(self.loaded, shown, row), row)
        seconds = time.monotonic() - started
        self.spent += seconds
        self.row_cost = seconds / (row * len(shown))


def decode_upper_rows(loaded: LoadedModel, codes: Tensor, rows: int) -> List[Image.Image]:
    """Decode the first rows of codes (B, L or fewer) to images of full size, gray below."""
    pixels = loaded.decode(codes[:, : rows * loaded.side].cpu(), rows)
    missing = loaded.model.vae.image_size - pixels.shape[2]
    return [to_image(one) for one in F.pad(pixels, (0, 0, 0, missing), value=0.5)]


def animation_frames(loaded: LoadedModel, codes: Tensor) -> List[List[Image.Image]]:
    """Return the first ANIMATED images of codes (B, L) after each row."""
    return [decode_upper_rows(loaded, codes[:ANIMATED], rows) for rows in range(1, loaded.side + 1)]
