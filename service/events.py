"""Jobs as the page sees them: each has an id and a list of server-sent events, which any number of readers may follow.

A job enters the queue when its first reader comes, and is cancelled when it has had none for some seconds. So a job
that nobody listens to costs no computation.
"""

import asyncio
import base64
import io
import json
import math
import secrets
import time
from typing import Any, AsyncIterator, Dict, Iterable, List, Optional, Set

from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from generation.images import ImageSpec, encode_image, image_metadata
from generation.loading import LoadedModel
from service.queue import Busy, GenerationQueue, Job

UNREAD_SECONDS = 10  # without a reader, after which a job is cancelled
KEEP_SECONDS = 60  # for which the events of an ended job are kept
KEEP_BYTES = 64 * 2**20  # of ended jobs' events in all
PING_SECONDS = 10
ROW_EVENTS = 8  # at most, of an image
PREVIEW_WIDTH = 96  # pixels


class Stream:
    """A job with its events; `job` is None until the first reader comes."""

    def __init__(self, client: str, specs: List[ImageSpec]):
        self.id, self.client, self.specs = secrets.token_urlsafe(16), client, specs
        self.job: Optional[Job] = None
        self.task: Optional[asyncio.Task] = None
        self.events: List[str] = []
        self.bytes, self.ended = 0, False
        self.readers, self.since = 0, time.monotonic()  # since when it has had no reader, or has ended
        self.changed = asyncio.Event()

    def emit(self, event: str, **data: Any) -> None:
        """Append an event, and wake the readers."""
        text = f"id: {len(self.events) + 1}\nevent: {event}\ndata: {json.dumps(data)}\n\n"
        self.events.append(text)
        self.bytes += len(text)
        self.changed.set()
        self.changed = asyncio.Event()

    async def read(self, after: int) -> AsyncIterator[str]:
        """Yield the events after number `after` until the last, with a comment whenever nothing happens for long."""
        while True:
            changed = self.changed
            if after < len(self.events):
                text, after = "".join(self.events[after:]), len(self.events)
                yield text
            elif self.ended:
                return
            else:
                try:
                    await asyncio.wait_for(changed.wait(), PING_SECONDS)
                except asyncio.TimeoutError:
                    yield ": ping\n\n"


class EventResponse(StreamingResponse):
    """The answer to one reader of a stream, which counts as a reader until it is sent or its client goes away."""

    media_type = "text/event-stream"

    def __init__(self, streams: "Streams", stream: Stream, after: int):
        super().__init__(stream.read(after), headers={"X-Accel-Buffering": "no"})
        self.streams, self.stream = streams, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        stream = self.stream
        stream.readers += 1
        try:
            self.streams.start(stream)
            await super().__call__(scope, receive, send)
        finally:
            stream.readers -= 1
            if not stream.ended:
                stream.since = time.monotonic()


class Streams:
    """All streams by their id."""

    def __init__(self, queue: GenerationQueue, max_waiting: int):
        self.queue, self.max_waiting = queue, max_waiting
        self.streams: Dict[str, Stream] = {}

    def add(self, client: str, specs: List[ImageSpec]) -> Stream:
        """Return a new Stream; a client's oldest one that nobody reads yet makes room if there are too many."""
        self.queue.check_room(client, len(specs))
        unread = [one for one in self.streams.values() if one.job is None and not one.ended and not one.readers]
        own = [one for one in unread if one.client == client]
        for some, most in ((own, self.max_waiting // 2), (unread, self.max_waiting)):
            if len(some) >= max(1, most):
                self.streams.pop(some[0].id, None)
        stream = Stream(client, specs)
        self.streams[stream.id] = stream
        return stream

    def start(self, stream: Stream) -> None:
        """Queue the job of a stream at its first reader."""
        if stream.job is None and not stream.ended:
            try:
                every = math.ceil(self.queue.loaded.side / ROW_EVENTS)
                stream.job = self.queue.submit(stream.client, stream.specs, every)
            except Busy as error:
                stream.emit("error", error=str(error))
                self.end(stream)
            else:
                stream.task = asyncio.create_task(self.follow(stream, stream.job))

    def cancel(self, stream: Stream) -> None:
        """Cancel the job of a stream; an ended one stays as it is."""
        if stream.job is not None:
            self.queue.cancel(stream.job)  # follow() then ends the stream
        elif not stream.ended:
            stream.emit("done", seconds=0, cancelled=True)
            self.end(stream)

    def end(self, stream: Stream) -> None:
        """Note that a stream has all its events."""
        stream.ended, stream.specs, stream.since = True, [], time.monotonic()
        stream.changed.set()

    def sweep(self) -> None:
        """Cancel what nobody reads, and forget what ended a while ago; called every second."""
        now, kept = time.monotonic(), 0
        for stream in sorted(self.streams.values(), key=lambda one: one.since, reverse=True):
            if stream.ended:
                kept += stream.bytes
                if now - stream.since > KEEP_SECONDS or kept > KEEP_BYTES:
                    del self.streams[stream.id]
            elif not stream.readers and now - stream.since > UNREAD_SECONDS:
                self.cancel(stream)

    async def follow(self, stream: Stream, job: Job) -> None:
        """Turn the changes of a job into events, to its end."""
        loaded, every, began, ahead = self.queue.loaded, job.every or 1, time.monotonic(), -1
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
                left = seconds_left(job, time.monotonic() - began, loaded.side)
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
            job.images, job.previews = [], {}
            self.end(stream)


async def describe_images(loaded: LoadedModel, job: Job, indices: Iterable[int]) -> List[Dict[str, Any]]:
    """Return finished images of a job as answers carry them."""
    chosen = [(job.specs[index], image) for index in indices for image in [job.images[index]] if image is not None]
    return await run_in_threadpool(lambda: [describe_image(loaded, *one) for one in chosen]) if chosen else []


def describe_image(loaded: LoadedModel, spec: ImageSpec, image: Image.Image) -> Dict[str, Any]:
    """Return a finished image as answers carry it."""
    metadata = image_metadata(spec, loaded)
    return {"png": to_base64(encode_image(image, metadata, "png")), "seed": spec.seed, "metadata": metadata}


def to_base64(data: bytes) -> str:
    """Return bytes as base64 text."""
    return base64.b64encode(data).decode()


def encode_preview(image: Image.Image) -> str:
    """Return a PIL image as a small WebP in base64."""
    if image.width > PREVIEW_WIDTH:
        image = image.resize((PREVIEW_WIDTH, max(1, image.height * PREVIEW_WIDTH // image.width)))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=50, method=0)
    return to_base64(file.getvalue())


def seconds_left(job: Job, elapsed: float, rows: int) -> Optional[float]:
    """Estimate the seconds until a job is finished; None before its first row."""
    done = job.ready + len(job.active) * job.row / rows
    return round(elapsed * (len(job.specs) - done) / done, 1) if done else None
