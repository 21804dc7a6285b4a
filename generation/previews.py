"""Pictures while they form: the rows of codes that there are, decoded, at most at a tenth of what drawing takes."""

import time

from generation.output import to_image

MOVING = 16  # pictures of an animation
SHARE = 0.06  # of the time of drawing that previews may take; what they push out of caches comes on top, to a tenth


class Preview:
    """draw()'s `on_code`: calls show(PIL pictures of the whole size, rows done) every `every` rows of codes.

    What is not drawn yet is grey. A preview that would cost too much, after how long the one before took, is left out.
    """

    def __init__(self, loaded, every, show, share=SHARE, most=9):
        """most: pictures of a batch that are shown."""
        self.loaded, self.every, self.show, self.share, self.most = loaded, every, show, share, most
        self.spent, self.cost, self.began = 0.0, 0.0, time.monotonic()  # seconds; cost: of a row, by the last preview

    def __call__(self, codes):
        side = self.loaded.side
        row, more = divmod(codes.shape[1], side)
        if more or row % self.every or row == side:
            return
        started = time.monotonic()
        drawing = (started - self.began - self.spent) * side / row  # as long as it will take in all
        if self.spent + self.cost * row > self.share * drawing:
            return
        self.show(decode_upper_rows(self.loaded, codes[: self.most], row), row)
        took = time.monotonic() - started
        self.spent += took
        self.cost = took / row


def decode_upper_rows(loaded, codes, rows):
    """Codes (B, rows × side) of the first rows → PIL pictures of the whole size, grey below."""
    from torch.nn import functional as F

    pixels = loaded.decode(codes[:, : rows * loaded.side].cpu(), rows)
    below = loaded.model.vae.image_size - pixels.shape[2]
    return [to_image(one) for one in F.pad(pixels, (0, 0, 0, below), value=0.5)]


def animation_frames(loaded, codes):
    """How the first MOVING pictures of codes (B, L) formed: a list of PIL pictures after each row."""
    return [decode_upper_rows(loaded, codes[:MOVING], rows) for rows in range(1, loaded.side + 1)]
