"""The HTTP API: GET /health, POST /api/generate, GET /docs. Every wrong request gets a 4xx with {"error": a sentence}.

What a request may ask for is requests.py's business, who draws next queue.py's; the page is mounted beside these
routes by app.py.
"""

import asyncio
import base64
import json
import time
from typing import Optional

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from generation.output import encode_image, image_metadata
from service import uploads
from service.docs import page_of
from service.queue import Busy, changes
from service.requests import pictures_of

MAX_BODY = uploads.MAX_BYTES * 4 // 3 + 2**16  # a picture in base64, and the rest
BODY_SECONDS = 60  # that a body may take to arrive
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


class Generate(BaseModel):
    """The JSON of POST /api/generate; null is the same as leaving a key out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="what the pictures should show")
    count: int = Field(1, ge=1, description="how many pictures; 1 unless told")
    seed: Optional[int] = Field(
        None, ge=0, lt=2**63, description="of the first picture, the next one's is 1 more; by chance unless told"
    )
    top_k: Optional[float] = Field(
        None,
        allow_inf_nan=False,
        description="up to 1: share of the vocabulary that is cut; above: codes that are kept",
    )
    top_p: Optional[float] = Field(None, allow_inf_nan=False, description="keep the likeliest codes up to this sum")
    temperature: Optional[float] = Field(None, allow_inf_nan=False, description="below 1 is safer, above 1 wilder")
    cond_scale: Optional[float] = Field(None, allow_inf_nan=False, description="guidance by the prompt; 1 is none")
    image: Optional[str] = Field(None, description="a picture, base64: its upper rows are kept, the rest is drawn")
    keep: Optional[float] = Field(
        None, allow_inf_nan=False, description="rows of it, or a share below 1; 0.5 unless told"
    )


class Wrong(Exception):
    """A request that cannot be served: (HTTP status, a sentence)."""


class BodyLimit:
    """ASGI middleware: no route of the API or the page reads a body of more than MAX_BODY bytes."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        too_large = 413, f"The request is too large; at most {MAX_BODY // 2**20} MB are accepted."
        read = 0

        async def limited():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                raise Wrong(*too_large)
            return message

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif int(dict(scope["headers"]).get(b"content-length", 0)) > MAX_BODY:
            await refusal(*too_large)(scope, receive, send)
        else:
            await self.app(scope, limited, send)


def refusal(status, sentence, **headers):
    return JSONResponse({"error": sentence}, status, headers=headers)


def build(loaded, queue, limits):
    """The FastAPI application with the routes above; the caller starts and stops the queue."""
    app = FastAPI(title="Mini DALL-E", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit)
    started = time.monotonic()

    @app.exception_handler(Wrong)
    async def wrong(_, error):
        return refusal(*error.args)

    @app.exception_handler(HTTPException)
    async def no_such_thing(request, error):
        return refusal(error.status_code, f"{request.method} {request.url.path} is not served here; see /docs.")

    @app.exception_handler(Exception)
    async def unforeseen(*_):
        return refusal(500, "The request failed inside the program; its log says why.")

    @app.get("/health")
    async def health():
        alive = queue.thread.is_alive()
        about = {
            "status": "ok" if alive else "stopped",
            "checkpoint": loaded.fingerprint,
            "waiting": len(queue.jobs),
            "pictures_drawn": queue.pictures_drawn,
            "seconds_up": round(time.monotonic() - started),
        }
        return JSONResponse(about, 200 if alive else 503)

    @app.get("/docs")
    async def docs():
        return HTMLResponse(page_of(Generate, loaded, limits))

    @app.post("/api/generate")
    async def generate(request: Request):
        wanted = asked(await body_of(request))
        began = time.monotonic()
        pictures = await run_in_threadpool(pictures_for, loaded, limits, wanted)
        try:
            job = queue.submit(("api", request.client.host if request.client else ""), pictures)
        except Busy as error:
            return refusal(503, str(error), **{"Retry-After": "10"})
        if not await waited(request, queue, job):
            return refusal(499, "The client went away.")
        if job.error:
            return refusal(503 if queue.stopping else 500, job.error)
        drawn = await run_in_threadpool(answers, loaded, job)
        return JSONResponse({"pictures": drawn, "seconds": round(time.monotonic() - began, 3)})

    @app.api_route("/api/{rest:path}", methods=METHODS)
    @app.api_route("/health", methods=METHODS[1:])
    async def nothing_here(request: Request):
        known = request.url.path in ("/api/generate", "/health")
        raise HTTPException(405 if known else 404)

    return app


async def body_of(request):
    """The body's bytes; Wrong where it says that it is no JSON, or does not arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Wrong(415, "The request's Content-Type must be application/json.")
    try:
        return await asyncio.wait_for(request.body(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Wrong(408, "The request took too long to arrive.") from None


def asked(body):
    """A body → Generate; Wrong with what is the matter."""

    def unwanted(text):
        raise ValueError(text)

    try:
        said = json.loads(body, parse_constant=unwanted)
    except (ValueError, RecursionError):  # of the former: no UTF-8, NaN, a number of thousands of digits
        raise Wrong(400, "The request's body is not JSON.") from None
    if not isinstance(said, dict):
        raise Wrong(400, 'The request\'s body must be a JSON object such as {"prompt": "a red circle"}.')
    try:
        return Generate.model_validate({key: value for key, value in said.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise Wrong(422, sentence_about(first)) from None


def sentence_about(error):
    """One of pydantic's errors → a sentence."""
    key = str(error["loc"][0])[:40] if error["loc"] else "The body"
    key = key.encode("ascii", "backslashreplace").decode()
    if error["type"] == "missing":
        return f"{key} is missing."
    if error["type"] == "extra_forbidden":
        return f"{key} is not a key that is known; there are {', '.join(Generate.model_fields)}."
    names = {"string_type": "text", "string_unicode": "text of whole characters", "int_type": "a whole number"}
    names.update(float_type="a number", finite_number="a finite number", int_from_float="a whole number")
    if error["type"] in names:
        return f"{key} must be {names[error['type']]}."
    return f"{key}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def pictures_for(loaded, limits, wanted):
    """Generate → pictures to be drawn; Wrong with a sentence."""
    image = None
    if wanted.keep is not None and wanted.image is None:
        raise Wrong(422, "keep says how much of image is kept; give an image with it.")
    if wanted.image is not None:
        try:
            image = base64.b64decode(wanted.image, validate=True)
        except ValueError:
            raise Wrong(422, "image is not base64.") from None
    sampling = {key: getattr(wanted, key) for key in ("top_k", "top_p", "temperature", "cond_scale")}
    options = {"prompt": wanted.prompt, "count": wanted.count, "seed": wanted.seed, "sampling": sampling}
    try:
        keep = 0.5 if wanted.keep is None else wanted.keep
        return pictures_of(loaded, limits, **options, image=image, keep=keep)
    except ValueError as error:
        raise Wrong(422, str(error)) from None


async def waited(request, queue, job):
    """Wait until a job has ended → whether its client is still there; the job of one who left is cancelled."""

    async def until_drawn():
        async for _ in changes(job):
            pass

    async def until_gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawn, gone = asyncio.ensure_future(until_drawn()), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({drawn, gone}, return_when=asyncio.FIRST_COMPLETED)
        return drawn.done()
    finally:
        queue.cancel(job)  # does nothing where it has ended
        drawn.cancel()
        gone.cancel()


def answers(loaded, job):
    """The pictures of a job as they stand in the answer."""
    found = []
    for picture, drawn in zip(job.pictures, job.drawn):
        about = image_metadata(picture, loaded)
        png = base64.b64encode(encode_image(drawn, about, "png")).decode()
        found.append({"png": png, "seed": picture.seed, "metadata": about})
    return found
