"""Who draws next: batches of pictures of several people at once, one after the other.

A batch begins with the client who got the fewest pictures so far, and takes one picture at a time from whoever got
fewest of those whose pictures go together with it. Knows nothing of HTTP or of pages.
"""

import asyncio
import contextlib
import logging
import threading
import time

from generation.batching import batch_key, generate_batch
from generation.output import to_image
from generation.previews import Preview
from service.computing import compute

logger = logging.getLogger("minidalle")

PATIENCE = 0.1  # of the time of a batch, to wait for the next one to fill


class Busy(Exception):
    """The queue is full; the message is a sentence for the user."""


class Abandoned(Exception):
    """Nobody waits for a picture of the batch any more."""


class Job:
    """Pictures that one client waits for.

    codes and drawn are lists of int64 (L,) and of PIL pictures, None where a picture is not drawn yet. drawing: how
    many are in the batch that is being drawn, row: how many rows of codes they have; forming: PIL pictures of upper
    rows by places. error: a sentence, where the job failed. ended is set when everything is drawn, or failed, or was
    cancelled.
    """

    def __init__(self, client, pictures, every):
        self.client, self.pictures, self.every = client, pictures, every
        self.codes, self.drawn = [None] * len(pictures), [None] * len(pictures)
        self.forming, self.drawing, self.row, self.started = {}, 0, 0, False
        self.error, self.cancelled, self.ended = None, False, threading.Event()
        self.on_change = None  # called in the drawing thread, or in that of who cancels

    @property
    def done(self):
        """How many pictures are drawn."""
        return sum(one is not None for one in self.drawn)

    def changed(self):
        if self.on_change is not None:
            self.on_change()

    def end(self, error=None):
        self.error = error
        self.ended.set()
        self.changed()


async def changes(job):
    """Yields at once, whenever something of the job has changed, and for the last time when it has ended."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake():
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
            loop.call_soon_threadsafe(changed.set)

    job.on_change = wake
    while True:
        ended = job.ended.is_set()
        yield
        if ended:
            return
        await changed.wait()
        changed.clear()


class DrawingQueue:
    """Jobs → pictures, in batches that a thread of its own makes up between start() and stop()."""

    def __init__(self, loaded, max_jobs):
        self.loaded, self.max_jobs = loaded, max_jobs
        self.jobs = []  # that have not ended
        self.waiting = {}  # client → [(job, place, batch_key() of the image)], none of them empty
        self.served = {}  # client → pictures that were drawn for them, counted from when they came
        self.clock = 0  # what the client who was next last had been served; who comes new begins here
        self.pictures_drawn, self.stopping = 0, False
        self.something = threading.Condition()  # guards all of the above
        self.thread = threading.Thread(target=self._work, name="drawing", daemon=True)

    def start(self):
        self.thread.start()

    def give_up(self):
        """Give up what is being drawn and what waits; the thread then ends."""
        with self.something:
            self.stopping = True
            self.something.notify()

    def stop(self):
        """give_up(), and wait for the thread."""
        self.give_up()
        if self.thread.ident:
            self.thread.join()

    def submit(self, client, pictures, every=None):
        """Queue generation.batching.ImageSpec objects of a client (any hashable) → Job. every: rows between previews,
        None for none. Busy where the queue is full, or half full with jobs of this client.
        """
        job = Job(client, pictures, every)
        with self.something:
            own = sum(other.client == client for other in self.jobs)
            if self.stopping or not self.thread.is_alive():
                raise Busy("The service is stopping.")
            if len(self.jobs) >= self.max_jobs or own >= max(1, self.max_jobs // 2):
                raise Busy("Too many pictures are being drawn at the moment; please try again in a little while.")
            if not self.jobs:  # nobody remembers who drew how much before
                self.served, self.clock = {}, 0
            self.jobs.append(job)
            if client not in self.waiting:
                self.served[client] = max(self.served.get(client, 0), self.clock)
            entries = [(job, place, batch_key(one)) for place, one in enumerate(pictures)]
            self.waiting.setdefault(client, []).extend(entries)
            self.something.notify()
        return job

    def cancel(self, job):
        """Drop a job's pictures; the drawing itself is given up where nobody else waits for its batch."""
        with self.something:
            if job.ended.is_set():
                return
            job.cancelled = True
        self._end(job)

    def others(self, job):
        """How many other jobs are being drawn or wait."""
        return sum(other is not job for other in self.jobs)

    def _end(self, job, error=None):
        with self.something:
            if job not in self.jobs:
                return
            self.jobs.remove(job)
            left = [entry for entry in self.waiting.pop(job.client, []) if entry[0] is not job]
            if left:
                self.waiting[job.client] = left
        job.end(error)

    def _next_batch(self):
        """[(job, place)] of pictures that go together, taken out of what waits."""
        first = min(self.waiting, key=self.served.get)
        self.clock = self.served[first]
        wanted = self.waiting[first][0][2]
        fitting = {
            client: [entry for entry in entries if entry[2] == wanted] for client, entries in self.waiting.items()
        }
        batch, taken = [], set()
        while len(batch) < self.loaded.batch_size:
            offering = [client for client, entries in fitting.items() if entries]
            if not offering:
                break
            client = min(offering, key=self.served.get)
            job, place, _ = fitting[client].pop(0)
            self.served[client] += 1
            batch.append((job, place))
            taken.add((id(job), place))
        left = {
            client: [entry for entry in entries if (id(entry[0]), entry[1]) not in taken]
            for client, entries in self.waiting.items()
        }
        self.waiting = {client: entries for client, entries in left.items() if entries}
        self.served = {
            client: count for client, count in self.served.items() if client in self.waiting or count > self.clock
        }
        # Pictures that are to be seen while they form first: previews show the first ones of a batch.
        return sorted(batch, key=lambda one: one[0].every is None)

    def _is_full(self):
        return sum(map(len, self.waiting.values())) >= self.loaded.batch_size

    def _work(self):
        seconds = 0.0  # that the batch before took, where somebody was answered after it
        while True:
            with self.something:
                self.something.wait_for(lambda: self.stopping or self.waiting)
                # Whoever was just answered may ask again at once; a half empty batch costs as much as a full one.
                self.something.wait_for(lambda: self.stopping or self._is_full(), PATIENCE * seconds)
                batch = None if self.stopping else self._next_batch()
            if batch is None:
                for job in list(self.jobs):
                    self._end(job, "The service is stopping.")
                return
            started, jobs = time.monotonic(), len(self.jobs)
            try:
                compute(self._draw, batch)
            except Abandoned:
                pass
            except Exception:
                logger.exception("a drawing failed")
                for job in {id(job): job for job, _ in batch}.values():
                    self._end(job, "The drawing failed inside the program; its log says why.")
            seconds = time.monotonic() - started if len(self.jobs) < jobs else 0.0

    def _draw(self, batch):
        loaded, jobs = self.loaded, list({id(job): job for job, _ in batch}.values())
        side = loaded.side
        seen = [(job, place) for job, place in batch if job.every is not None]
        forming = None
        if seen:

            def show(pictures, rows):
                for (job, place), picture in zip(seen, pictures):
                    job.forming[place] = picture.crop((0, 0, picture.width, picture.height * rows // side))

            forming = Preview(loaded, min(job.every for job, _ in seen), show, most=len(seen))

        def watch(codes):
            if self.stopping or all(job.ended.is_set() for job in jobs):
                raise Abandoned
            if codes.shape[1] % side == 0:
                if forming is not None and any(not job.ended.is_set() for job, _ in seen):
                    forming(codes)
                for job in jobs:
                    job.row = codes.shape[1] // side
                    if job.every is not None:  # whoever sees nothing form is told at the end
                        job.changed()

        for job in jobs:
            job.started, job.row = True, len(batch[0][0].pictures[batch[0][1]].given_codes) // side
            job.drawing = sum(other is job for other, _ in batch)
            job.changed()
        codes = generate_batch(loaded, [job.pictures[place] for job, place in batch], on_code=watch)
        for (job, place), one, pixels in zip(batch, codes, loaded.decode(codes)):
            job.codes[place], job.drawn[place] = one, to_image(pixels)
            job.forming.pop(place, None)
        self.pictures_drawn += len(batch)
        for job in jobs:
            job.drawing = job.row = 0
            if job.done == len(job.pictures):
                self._end(job)
            else:
                job.changed()
