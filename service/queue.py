"""The queue of images to generate, and the one thread that runs the model.

A batch starts with the client that received the fewest images so far. It then takes one image at a time from the client
with the fewest among those whose images can share the batch. This module knows nothing of HTTP.
"""

import asyncio
import collections
import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from typing import Any, AsyncIterator, Callable, Deque, Dict, Hashable, List, Optional, Tuple

from PIL import Image

from generation.images import ImageSpec, OutOfMemory, batch_key, generate_batch, to_image
from generation.loading import LoadedModel
from generation.previews import SHARE, Preview

logger = logging.getLogger("minidalle")
PATIENCE = 0.1  # share of the last batch's time to wait for the next batch to fill
BUSY_SHARE = SHARE / 6  # of the sampling time for previews while further images wait
STOPPING = "The service is stopping."
FAILED = "The images could not be generated; the program's log says why."


class Busy(Exception):
    """The queue cannot take a job: a sentence for the user, and the HTTP status (429: for this client's jobs)."""

    def __init__(self, sentence: str, status: int = 503):
        super().__init__(sentence)
        self.status = status


class Abandoned(Exception):
    """No client waits for any image of the batch."""


class Job:
    """The images that one client waits for."""

    def __init__(self, client: Hashable, specs: List[ImageSpec], every: Optional[int] = None):
        """Begin with no image ready; `every` is the number of rows of codes between two previews, None without any."""
        self.client, self.specs, self.every = client, specs, every
        self.images: List[Optional[Image.Image]] = [None] * len(specs)  # None for each that is not ready
        self.previews: Dict[int, Tuple[int, Image.Image]] = {}  # of the current batch: index -> rows, image of these
        self.active: List[int] = []  # indices of the images in the current batch
        self.row, self.ahead = 0, 0  # row: rows of codes that the active images have
        self.started = 0.0  # time.monotonic() when its first batch began; 0 before
        self.error: Optional[str] = None  # a sentence if the job failed
        self.cancelled, self.ended = False, threading.Event()  # ended: ready, failed or cancelled
        self.on_change: Callable[[], None] = lambda: None  # called after each change, in the thread that made it

    @property
    def ready(self) -> int:
        return sum(image is not None for image in self.images)

    async def changes(self) -> AsyncIterator[None]:
        """Yield once at the start, after each change, and a last time when the job has ended."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake():
            with contextlib.suppress(RuntimeError):  # the loop has closed, so nobody listens
                loop.call_soon_threadsafe(changed.set)

        self.on_change = wake
        while True:
            ended = self.ended.is_set()
            yield
            if ended:
                return
            await changed.wait()
            changed.clear()


class GenerationQueue:
    """Generate the images of jobs in fair batches.

    One thread does all computation, because each thread gets its own OpenMP pool, and two pools on the same
    cores halve the speed.
    """

    def __init__(self, loaded: Optional[LoadedModel] = None, max_jobs: int = 64, max_images: int = 1024):
        """Create the queue; `loaded` may be set later, but before the first job."""
        self.loaded: LoadedModel = loaded  # type: ignore[assignment]
        self.max_jobs, self.max_images = max_jobs, max_images
        self.jobs: List[Job] = []  # not ended
        self.calls: Deque[Tuple[Future, Callable, tuple]] = collections.deque()
        self.waiting: Dict[Hashable, List[Tuple[Job, int, Any]]] = {}  # (job, index, batch key); no list is empty
        self.served: Dict[Hashable, int] = {}  # images generated for each client
        self.clock = 0  # images served to the client picked last; new clients start at this count
        self.images_generated, self.stopping = 0, False
        self.row_cost = 0.0  # of previews, see Preview
        self.condition = threading.Condition()  # guards all of the above
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self, seconds: Optional[float] = None) -> None:
        """End all jobs and calls with an error at once; wait for the thread if `seconds` says how long."""
        with self.condition:
            self.stopping = True
            for job in list(self.jobs):
                self._end(job, STOPPING)
            for future, _, _ in self.calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(Busy(STOPPING))
            self.calls.clear()
            self.condition.notify()
        if seconds is not None and self.thread.ident:
            self.thread.join(seconds)

    def call(self, function: Callable, *arguments: Any) -> Future:
        """Return a future of function(*arguments), which the thread calls before its next batch."""
        future: Future = Future()
        with self.condition:
            if self.stopping:
                raise Busy(STOPPING)
            self.calls.append((future, function, arguments))
            self.condition.notify()
        return future

    def submit(self, client: Hashable, specs: List[ImageSpec], every: Optional[int] = None) -> Job:
        """Queue the images of a client (any hashable) and return their Job. Raise Busy if the queue is full."""
        job = Job(client, specs, every)
        with self.condition:
            self.check_room(client, len(specs))
            if not self.jobs:  # counts from before a pause would be unfair
                self.served, self.clock = {}, 0
            self.jobs.append(job)
            if client not in self.waiting:
                self.served[client] = max(self.served.get(client, 0), self.clock)
            entries = [(job, index, batch_key(spec)) for index, spec in enumerate(specs)]
            self.waiting.setdefault(client, []).extend(entries)
            self._count_ahead()
            self.condition.notify()
        return job

    def check_room(self, client: Hashable, count: int) -> None:
        """Raise Busy if `count` more images of a client do not fit: a client may use half of the queue."""
        jobs = list(self.jobs)
        own = [job for job in jobs if job.client == client]
        if self.stopping or not self.thread.is_alive():
            raise Busy(STOPPING)
        for some, share, status in ((own, 2, 429), (jobs, 1, 503)):
            images = sum(len(job.specs) - job.ready for job in some)
            if some and (len(some) >= self.max_jobs / share or images + count > self.max_images / share):
                raise Busy("Too many images are being generated now; please try again in a little while.", status)

    def cancel(self, job: Job) -> None:
        """Drop the images of a job. The current batch is given up if no other job has a part in it."""
        with self.condition:
            if job.ended.is_set():
                return
            job.cancelled = True
        self._end(job)

    def _count_ahead(self):
        """Tell the jobs that have not started how many others are served before them."""
        started = sum(job.started > 0 for job in self.jobs)
        for place, job in enumerate([job for job in self.jobs if not job.started]):
            if job.ahead != started + place:
                job.ahead = started + place
                job.on_change()

    def _end(self, job, error=None):
        with self.condition:
            if job not in self.jobs:
                return
            self.jobs.remove(job)
            left = [entry for entry in self.waiting.pop(job.client, []) if entry[0] is not job]
            if left:
                self.waiting[job.client] = left
            self._count_ahead()
        job.error = error
        job.ended.set()
        job.on_change()

    def _next_batch(self):
        """Take images that can share a batch out of `waiting`, as [(job, index)]."""
        first = min(self.waiting, key=self.served.get)
        self.clock, key, batch = self.served[first], self.waiting[first][0][2], []
        while len(batch) < self.loaded.batch_size:
            fitting = [client for client, entries in self.waiting.items() if any(one[2] == key for one in entries)]
            if not fitting:
                break
            client = min(fitting, key=self.served.get)
            entries = self.waiting[client]
            job, index, _ = entries.pop(next(place for place, one in enumerate(entries) if one[2] == key))
            batch.append((job, index))
            self.served[client] += 1
            if not entries:
                del self.waiting[client]
        still = [client for client, count in self.served.items() if client in self.waiting or count > self.clock]
        self.served = {client: self.served[client] for client in still}
        return sorted(batch, key=lambda one: one[0].every is None)  # previews show the first images of a batch

    def _work(self):
        seconds = 0.0  # that the last batch took, if it finished a job
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.stopping or self.calls or self.waiting)
                if not self.calls:
                    # Clients just served may ask again at once; a half empty batch costs as much as a full one.
                    self.condition.wait_for(lambda: self.stopping or self.calls or self._is_full(), PATIENCE * seconds)
                calls = list(self.calls)
                self.calls.clear()
            for future, function, arguments in calls:
                if not future.set_running_or_notify_cancel():  # its client has gone
                    continue
                try:
                    future.set_result(function(*arguments))
                except Exception as error:
                    future.set_exception(error)
            with self.condition:
                if self.stopping:
                    return
                batch = self._next_batch() if self.waiting else None  # after some calls: more may come without end
            if batch:
                seconds = self._run_batch(batch)

    def _is_full(self):
        return sum(map(len, self.waiting.values())) >= self.loaded.batch_size

    def _run_batch(self, batch):
        """Generate a batch; return the seconds that it took, or 0 if no job ended with it."""
        started, jobs = time.monotonic(), len(self.jobs)
        try:
            self._generate(batch)
        except Abandoned:
            pass
        except OutOfMemory as error:
            self._halve(batch, error)
        except Exception:
            logger.exception("a batch failed")
            for job in {id(job): job for job, _ in batch}.values():
                self._end(job, FAILED)
        return time.monotonic() - started if len(self.jobs) < jobs else 0.0

    def _halve(self, batch, error):
        """Queue the images of a batch again, for batches of half its size; one image alone fails."""
        entries = [(job, index, batch_key(job.specs[index])) for job, index in batch if not job.ended.is_set()]
        if len(batch) == 1:
            logger.error("%s", error)
            for job, _, _ in entries:
                self._end(job, FAILED)
            return
        self.loaded.batch_size = len(batch) // 2
        logger.warning("%s; the service continues with that", error)
        with self.condition:
            for job, index, key in reversed(entries):
                self.waiting.setdefault(job.client, []).insert(0, (job, index, key))
                self.served[job.client] = self.served.get(job.client, self.clock + 1) - 1

    def _generate(self, batch):
        loaded, jobs = self.loaded, list({id(job): job for job, _ in batch}.values())
        rows = loaded.side
        shown = [(job, index) for job, index in batch if job.every is not None]

        def show(images, row):
            for (job, index), image in zip(shown, images):
                job.previews[index] = row, image.crop((0, 0, image.width, image.height * row // rows))

        share = BUSY_SHARE if self.waiting else SHARE
        every = min([job.every for job, _ in shown], default=rows)
        forming = Preview(loaded, every, show, share, len(shown), self.row_cost)

        def watch(codes):
            if self.stopping or all(job.ended.is_set() for job in jobs):
                raise Abandoned
            if codes.shape[1] % rows == 0:
                if any(not job.ended.is_set() for job, _ in shown):
                    forming(codes)
                    self.row_cost = forming.row_cost
                for job in jobs:
                    job.row = codes.shape[1] // rows
                    if job.every is not None:
                        job.on_change()

        for job in jobs:
            job.started = job.started or time.monotonic()
            job.row = len(batch[0][0].specs[batch[0][1]].given_codes) // rows
            job.active = [index for other, index in batch if other is job]
            job.on_change()
        with self.condition:
            self._count_ahead()
        codes = generate_batch(loaded, [job.specs[index] for job, index in batch], on_code=watch)
        for (job, index), pixels in zip(batch, loaded.decode(codes)):
            if not job.ended.is_set():  # else cancelled, and its events have let go of the images
                job.images[index] = to_image(pixels)
            job.previews.pop(index, None)
        self.images_generated += len(batch)
        for job in jobs:
            job.active, job.row = [], 0
            if job.ready == len(job.specs):
                self._end(job)
            else:
                job.on_change()
