"""What one open page has: what it draws, the pictures in its grid, its history and the picture that is chosen.

Kept by the server from when the page first asks for something until it is closed. How it looks is markup.py's business.
"""

import collections
import threading

from generation.output import encode_image, image_metadata
from service import markup

HISTORY = 60  # pictures a page keeps
THUMBNAIL = 128  # pixels a side, in the history
SESSIONS = 500  # pages that are remembered, where closing one went unnoticed


class Finished:
    """A picture as a page has it: what it was drawn from, its codes, the bytes of its PNG, and data URLs of smaller
    files for grid and history.
    """

    def __init__(self, loaded, picture, codes, image):
        self.picture, self.codes = picture, codes
        self.about = image_metadata(picture, loaded)
        self.png = encode_image(image, self.about, "png")
        self.tile, self.thumbnail = markup.small(image), markup.small(image, THUMBNAIL)


class Session:
    def __init__(self):
        self.job, self.shown, self.chosen = None, [], None  # shown: Finished or None a place of the grid
        self.history = collections.deque(maxlen=HISTORY)  # of Finished, the newest first

    def begin(self, job):
        """A job is the page's own from now on → the one that it draws no more, or None."""
        before, self.job = self.job, job
        self.shown, self.chosen = [None] * len(job.pictures), None
        return before

    def take(self, loaded, job):
        """Pictures of the page's job that became ready since, into grid and history."""
        if self.job is not job:
            return
        for place, drawn in enumerate(job.drawn):
            if drawn is not None and self.shown[place] is None:
                self.shown[place] = Finished(loaded, job.pictures[place], job.codes[place], drawn)
                self.history.appendleft(self.shown[place])


class Sessions:
    """Session of a page by its hash; the oldest are forgotten where there are too many."""

    def __init__(self):
        self.known, self.lock = collections.OrderedDict(), threading.Lock()

    def of(self, page):
        with self.lock:
            session = self.known.setdefault(page, Session())
            self.known.move_to_end(page)
            while len(self.known) > SESSIONS:
                self.known.popitem(last=False)
            return session

    def closed(self, page):
        """Forget a page → its session, or None."""
        with self.lock:
            return self.known.pop(page, None)
