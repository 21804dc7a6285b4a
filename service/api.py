"""The HTTP routes of app.py. Whatever is wrong with a request is answered by {"error": a sentence} and a 4xx status."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Dict, Optional, Union

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from data.tokenizer import encode_text
from generation.image_prompts import KEEP, encode_kept_rows
from generation.loading import LoadedModel
from service import uploads, validation
from service.events import Streams, describe_images
from service.guard import client_of, refuse
from service.queue import Busy, GenerationQueue, Job

logger = logging.getLogger("minidalle")
NO_JOB = "This job does not exist, or its images are no longer kept; generate them again."
PAGE = Path(__file__).with_name("page")
MESSAGES = {  # in place of FastAPI's own
    "There was an error parsing the body": "The request's body is not JSON.",
    "Not Found": "There is nothing at this address; see /openapi.json.",
    "Method Not Allowed": "This address does not accept this method; see /openapi.json.",
}
EVENTS = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
FAILURES: Dict[Union[int, str], Dict[str, Any]] = {
    status: {"model": validation.Error} for status in (400, 401, 403, 404, 413, 415, 421, 422, 429, 503)
}


def build(loaded: LoadedModel, queue: GenerationQueue, streams: Streams, limits: validation.Limits) -> FastAPI:
    """Return the FastAPI application with all routes; the caller starts and stops the queue."""
    app = FastAPI(title="Mini DALL-E", version="1", docs_url=None, redoc_url=None, responses=FAILURES)
    started, decoding = time.monotonic(), asyncio.Lock()  # one image is decoded at a time, since that takes memory

    def get(path, **options):
        """Register a route for GET, and for HEAD without a line in the documentation."""
        return lambda route: app.head(path, include_in_schema=False)(app.get(path, **options)(route))

    @app.exception_handler(HTTPException)
    async def refuse_route(_, error):
        return refuse(error.status_code, MESSAGES.get(error.detail, error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_values(_, error):
        first = error.errors()[0]
        return refuse(400 if first["type"] == "json_invalid" else 422, validation.describe_invalid(first))

    @app.exception_handler(ValueError)
    async def refuse_request(_, error):
        return refuse(422, validation.as_sentence(error))

    @app.exception_handler(Busy)
    async def refuse_for_now(_, error):
        return refuse(error.status, str(error))

    @app.exception_handler(Exception)
    async def unexpected(_, error):
        logger.error("a request failed", exc_info=error)
        return refuse(500, "The request failed inside the program; its log says why.")

    @get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE / "index.html")

    app.mount("/static", StaticFiles(directory=PAGE))

    @get("/health", response_model=validation.Health)
    async def health():
        """Say whether the service generates, with which checkpoint, and how many requests wait."""
        alive = queue.thread.is_alive()
        about = {
            "status": "ok" if alive else "stopped",
            "checkpoint": loaded.fingerprint,
            "waiting": len(queue.jobs),
            "images_generated": queue.images_generated,
            "seconds_up": round(time.monotonic() - started),
        }
        return JSONResponse(about, 200 if alive else 503)

    @get("/api/model", response_model=validation.ModelInfo)
    async def model(prompt: Optional[str] = Query(None, max_length=limits.prompt_characters)):
        """Describe the model and the limits; with ?prompt=TEXT also how the model reads a prompt."""
        about = {
            "name": Path(loaded.path).name,
            "fingerprint": loaded.fingerprint,
            "image_size": loaded.model.vae.image_size,
            "rows": loaded.side,
            "max_images": limits.images,
            "max_prompts": limits.prompts,
            "max_prompt_characters": limits.prompt_characters,
            "max_upload_bytes": uploads.MAX_BYTES,
            "text_seq_len": loaded.model.text_seq_len,
            "guidable": loaded.guidable,
            "recommended": loaded.recommended._asdict(),
            "examples": loaded.examples,
            "known_words": len(loaded.words),
        }
        if prompt is not None:
            tokens = len(encode_text(loaded.tokenizer, prompt))
            about["prompt"] = {"tokens": tokens, "unknown_words": loaded.unknown_words(prompt)}
        return JSONResponse(about)

    async def plan(request, wanted, prompts):
        """Return the ImageSpecs of a request."""
        given, keep = None, wanted.keep_rows
        if wanted.image is not None:
            queue.check_room(client_of(request.scope), len(prompts) * (wanted.num_images or 1))
            size = loaded.model.vae.image_size
            async with decoding:
                image = await run_in_threadpool(uploads.decode, wanted.image, size)
            rows = KEEP if keep is None else keep
            given = await asyncio.wrap_future(queue.call(encode_kept_rows, loaded, image, rows))
        elif keep is not None:
            raise ValueError("The number of rows to keep needs an image to keep them of.")
        return validation.plan_request(loaded, limits, wanted, prompts, given)

    @app.post("/api/generate", response_model=validation.Generated)
    async def generate(wanted: validation.GenerateRequest, request: Request):
        """Generate images of one prompt, and answer when they are ready; closing the connection cancels them."""
        began = time.monotonic()
        specs = await plan(request, wanted, [wanted.prompt])
        job = queue.submit(client_of(request.scope), specs)
        if not await finished(request, queue, job):
            return Response(status_code=499)
        if job.error:
            return refuse(503 if queue.stopping else 500, job.error)
        images = await describe_images(loaded, job, range(len(specs)))
        return JSONResponse({"images": images, "seconds": round(time.monotonic() - began, 3)})

    @app.post("/api/jobs", status_code=202, response_model=validation.JobCreated)
    async def create_job(wanted: validation.JobRequest, request: Request):
        """Accept a job. It is cancelled if nobody reads its events for 10 s."""
        specs = await plan(request, wanted, wanted.prompts)
        return JSONResponse({"id": streams.add(client_of(request.scope), specs).id, "images": len(specs)}, 202)

    def find(id):
        if id not in streams.streams:
            raise Busy(NO_JOB, 404)
        return streams.streams[id]

    @app.get("/api/jobs/{id}/events", response_class=Response, responses={200: EVENTS})
    async def events(id: str, request: Request):
        """Follow a job as server-sent events: queued, row, image, done, error. Last-Event-ID skips what was read."""
        last = request.headers.get("last-event-id", "")
        stream = find(id)
        if stream.is_crowded:
            raise Busy("This job's events are already being read; close another page.", 429)
        text = stream.read(int(last) if last.isdecimal() and len(last) < 10 else 0)
        return StreamingResponse(text, headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream")

    @app.delete("/api/jobs/{id}", status_code=204)
    async def cancel_job(id: str):
        """Cancel a job, or do nothing if it has ended."""
        queue.cancel(find(id).job)
        return Response(status_code=204)

    return app


async def finished(request: Request, queue: GenerationQueue, job: Job) -> bool:
    """Wait until a job has ended and return True; if its client goes away before, cancel it and return False."""

    async def wait():
        async for _ in job.changes():
            pass

    async def wait_for_leaving():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = ended, gone = asyncio.ensure_future(wait()), asyncio.ensure_future(wait_for_leaving())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return ended.done()
    finally:
        queue.cancel(job)  # does nothing if it has ended
        gone.cancel()
        ended.cancel()
