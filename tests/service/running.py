"""What the service's tests share: a loaded model whose drawing can be watched and held up, and a server that runs."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time

from PIL import Image

from generation.loading import load
from tests.builders import until


class Drawing:
    """A LoadedModel's sampler, with a record of what is drawn together and a gate that every code passes.

    batches: a list of seeds for each drawing that began. codes: how many codes were drawn in all. hold() makes drawing
    stop before its next code until release(). before(seeds) is called where a drawing begins; what it raises fails it.
    """

    def __init__(self, loaded):
        self.loaded, self.plain = loaded, loaded.sampler
        self.batches, self.codes, self.seconds = [], 0, 0.0
        self.open, self.before = threading.Event(), lambda seeds: None
        self.open.set()
        loaded.sampler = self.sample

    hold = property(lambda self: self.open.clear)
    release = property(lambda self: self.open.set)

    def sample(self, text, sampling, *, generator, on_code=None, **options):
        seeds = [one.initial_seed() for one in generator]
        self.batches.append(seeds)
        self.before(seeds)

        def seen(codes):
            assert self.open.wait(20)
            time.sleep(self.seconds)
            self.codes += 1
            if on_code is not None:
                on_code(codes)

        return self.plain(text, sampling, generator=generator, on_code=seen, **options)

    def began(self, count):
        """Wait until so many drawings have begun."""
        until(lambda: len(self.batches) >= count)

    def remove(self):
        self.open.set()
        self.loaded.sampler = self.plain


def loaded_for_tests(checkpoint, batch_size=4):
    return load(str(checkpoint), device="cpu", precision="fp32", batch_size=batch_size)


@contextlib.contextmanager
def running(loaded, *flags, port=0):
    """Page and API of app.py on a port of this machine, 0: a free one, in a thread → the port."""
    import app
    from app import app_arguments
    from service.queue import GenerationQueue

    settings = app_arguments(list(map(str, flags)))
    queue = GenerationQueue(loaded, settings.queue_size, settings.queue_size * settings.max_images)
    queue.start()
    with app.listen("127.0.0.1", port) as listening:
        server = app.make_server(queue, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def file_of(image, kind="PNG", **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_of(text):
    """Open an image file in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def answer_to(port, method, path, body=None, **headers):
    """Return status, headers in small letters and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, {**kind, **headers})
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()


def call(port, method="GET", path="/health", body=None, kind="application/json"):
    """Return the status of an answer and its JSON. body: bytes, or what becomes JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    status, _, text = answer_to(port, method, path, data, **({"Content-Type": kind} if data is not None else {}))
    return status, json.loads(text)


def generate(port, **wanted):
    return call(port, "POST", "/api/generate", wanted)


def read_events(port, identity, after=None, root=""):
    """Read a job's events to the end: [(number, event, data)]."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    status, headers, text = answer_to(port, "GET", f"{root}/api/jobs/{identity}/events", **headers)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    found = []
    for block in text.decode().split("\n\n"):
        if block and not block.startswith(":"):
            number, event, data = (line.partition(": ")[2] for line in block.split("\n"))
            found.append((int(number), event, json.loads(data)))
    return found
