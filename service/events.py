"""Jobs as the page sees them: each has an id and a list of server-sent events, which several readers may follow.

A job that has had no reader for some seconds is cancelled.
"""

import asyncio
import base64
import io
import json
import math
import secrets
import time
from typing import Any, AsyncIterator, Dict, Iterable, List, Optional, Set

from PIL import Image
from starlette.concurrency import run_in_threadpool

from generation.images import ImageSpec, encode_image, image_metadata
from generation.loading import LoadedModel
from service.queue import GenerationQueue, Job

UNREAD_SECONDS = 10  # without a reader, after which a job is cancelled
MAX_READERS = 4  # of a job: each holds a connection
KEEP_SECONDS = 60  # for which the events of an ended job are kept
KEEP_BYTES = 64 * 2**20  # of ended jobs' events in all
PING_SECONDS = 10
ROW_EVENTS = 8  # at most, of an image
PREVIEW_WIDTH = 96  # pixels


class Stream:
    """A job with its events."""

    def __init__(self, job: Job):
        self.id, self.job = secrets.token_urlsafe(16), job
        self.task: Optional[asyncio.Task] = None  # which turns the job's changes into events
        self.events: List[str] = []
        self.bytes, self.ended = 0, False
        self.readers, self.since = 0, time.monotonic()  # since when it has had no reader, or has ended
        self.changed = asyncio.Event()

    @property
    def is_crowded(self) -> bool:
        return self.readers >= MAX_READERS

    def emit(self, event: str, **data: Any) -> None:
        """Append an event, and wake the readers."""
        text = f"id: {len(self.events) + 1}\nevent: {event}\ndata: {json.dumps(data)}\n\n"
        self.events.append(text)
        self.bytes += len(text)
        self.changed.set()
        self.changed = asyncio.Event()

    async def read(self, after: int) -> AsyncIterator[str]:
        """Yield the events after number `after` until the last, with a comment whenever nothing happens for long."""
        if self.is_crowded:  # came at the same moment as others, after the route's check
            return
        self.readers += 1
        try:
            while after < len(self.events) or not self.ended:
                changed = self.changed
                if after < len(self.events):
                    after += 1
                    yield self.events[after - 1]
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), PING_SECONDS)
                except asyncio.TimeoutError:
                    yield ": ping\n\n"
        finally:
            self.readers -= 1
            if not self.ended:
                self.since = time.monotonic()


class Streams:
    """All streams by their id."""

    def __init__(self, queue: GenerationQueue):
        self.queue = queue
        self.streams: Dict[str, Stream] = {}

    def add(self, client: str, specs: List[ImageSpec]) -> Stream:
        """Queue a job and return its Stream; raise Busy if the queue is full."""
        every = math.ceil(self.queue.loaded.side / ROW_EVENTS)
        stream = Stream(self.queue.submit(client, specs, every))
        self.streams[stream.id] = stream
        stream.task = asyncio.create_task(self.follow(stream))
        return stream

    def sweep(self) -> None:
        """Cancel what nobody reads, and forget what ended a while ago; called every second."""
        now, kept = time.monotonic(), 0
        for stream in sorted(self.streams.values(), key=lambda one: one.since, reverse=True):
            if stream.ended:
                kept += stream.bytes
                if now - stream.since > KEEP_SECONDS or kept > KEEP_BYTES:
                    del self.streams[stream.id]
            elif not stream.readers and now - stream.since > UNREAD_SECONDS:
                self.queue.cancel(stream.job)  # follow() then ends the stream

    async def follow(self, stream: Stream) -> None:
        """Turn the changes of a stream's job into events, to its end."""
        loaded, job, began, ahead = self.queue.loaded, stream.job, time.monotonic(), -1
        every = job.every or 1
        sent: Set[int] = set()
        rows_sent: Dict[int, int] = {}
        try:
            async for _ in job.changes():
                if not job.started and not job.ended.is_set() and job.ahead != ahead:
                    ahead = job.ahead
                    stream.emit("queued", ahead=ahead)
                new = [index for index, image in enumerate(job.images) if image is not None and index not in sent]
                sent.update(new)
                for index, answer in zip(new, await describe_images(loaded, job, new)):
                    stream.emit("image", index=index, prompt=job.specs[index].prompt, **answer)
                row, previews = job.row, dict(job.previews)
                left = seconds_left(job, loaded.side)
                for index in job.active:
                    if row // every > rows_sent.get(index, -1) // every and row < loaded.side:
                        rows_sent[index] = row
                        rows, image = previews.get(index) or (0, None)
                        preview = encode_preview(image) if image and rows == row else None  # not an earlier row's
                        stream.emit("row", index=index, rows=row, of=loaded.side, preview=preview, seconds_left=left)
            if job.error:
                stream.emit("error", error=job.error)
            else:
                cancelled = {"cancelled": True} if job.cancelled else {}
                stream.emit("done", seconds=round(time.monotonic() - began, 3), **cancelled)
        finally:
            job.images, job.previews = [None] * len(job.specs), {}  # the events have them
            stream.ended, stream.since = True, time.monotonic()
            stream.changed.set()


async def describe_images(loaded: LoadedModel, job: Job, indices: Iterable[int]) -> List[Dict[str, Any]]:
    """Return finished images of a job as answers carry them."""

    def describe(spec: ImageSpec, image: Image.Image) -> Dict[str, Any]:
        metadata = image_metadata(spec, loaded)
        return {"png": to_base64(encode_image(image, metadata, "png")), "seed": spec.seed, "metadata": metadata}

    chosen = [(job.specs[index], image) for index in indices for image in [job.images[index]] if image is not None]
    return await run_in_threadpool(lambda: [describe(*one) for one in chosen]) if chosen else []


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def encode_preview(image: Image.Image) -> str:
    """Return a PIL image as a small WebP in base64."""
    if image.width > PREVIEW_WIDTH:
        image = image.resize((PREVIEW_WIDTH, max(1, image.height * PREVIEW_WIDTH // image.width)))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=50, method=0)
    return to_base64(file.getvalue())


def seconds_left(job: Job, rows: int) -> Optional[float]:
    """Estimate the seconds until a job is finished, from those since its first batch; None before its first row."""
    done = job.ready + len(job.active) * job.row / rows
    return round((time.monotonic() - job.started) * (len(job.specs) - done) / done, 1) if done else None
