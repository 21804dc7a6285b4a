"""Attacks on the service: each must leave it healthy, honest clients served, and the machine's files unread."""

import base64
import contextlib
import json
import socket
import time
import zlib

import pytest
from PIL import Image

from tests.builders import png_chunk, png_of
from tests.service.running import answer_to, call, file_of, generate, running, until

pytest.importorskip("fastapi", exc_type=ImportError)
from service import connections, events, guard  # noqa: E402

PROMPT = "a red circle"
HEAD = "POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
TOKEN = "correct horse"
PATHS = ["/etc/passwd", "../../app.py", "..%2f..%2fapp.py", "%2e%2e/app.py", "/proc/self/environ", "x.html/../api.py"]


@pytest.fixture(scope="module")
def port(loaded):
    with running(loaded, "--max-images", 8) as port:
        yield port


def test_no_file_of_the_machine_is_read_or_revealed(port):
    for path in PATHS:
        for place in (f"/static/{path}", f"/{path}", f"/api/jobs/{path}/events", f"/gradio_api/file={path}"):
            status, _, body = answer_to(port, "GET", place)
            assert status == 404 and b"root:" not in body and b"import" not in body, place
    there, missing = (generate(port, prompt=PROMPT, image=path) for path in ("/etc/passwd", "/etc/no-such-file"))
    assert there == missing == (422, {"error": "The image is not base64."})
    files = {"path": "/etc/passwd"}, ["/dev/zero"], {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for image in files:
        assert generate(port, prompt=PROMPT, image=image)[0] == 422
        assert generate(port, prompt=image)[0] == 422
    for path in ("/upload", "/gradio_api/upload", "/config", "/queue/join", "/gradio_api/queue/join", "/deep_link"):
        assert answer_to(port, "POST", path, b"{}")[0] == 404


def test_only_own_host_names_are_served(port):
    for host, served in (
        *((host, True) for host in ("localhost", "LOCALHOST:80", "127.0.0.1:7860", "127.9.9.9", "[::1]:7860")),
        *((host, False) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.1.2.3", "")),
        *((host, False) for host in ("[::2]", "0x7f000001", "localhost@evil.example", "[", "localhost evil")),
    ):
        for path in ("/", "/health", "/api/model", "/openapi.json", "/static/style.css"):
            status, headers, body = answer_to(port, "GET", path, Host=host)
            assert (status not in (400, 421)) == served, (path, body)
            assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://localhost.evil.net", "http://["]
)
def test_posts_of_other_sites_are_refused(port, origin):
    body = json.dumps({"prompts": [PROMPT]})
    for method, path in (("POST", "/api/jobs"), ("POST", "/api/generate"), ("DELETE", "/api/jobs/x")):
        status, headers, _ = answer_to(port, method, path, body, Origin=origin, Host=f"localhost:{port}")
        assert status == 403 and not any(name.startswith("access-control") for name in headers)
    assert answer_to(port, "OPTIONS", "/api/jobs", Origin=origin)[0] in (403, 405)
    own = {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}
    assert answer_to(port, "POST", "/api/jobs", body, **own)[0] == 202


def test_every_answer_has_the_headers_that_protect_browsers(port):
    for method, path, more in (
        *(("GET", path, {}) for path in ("/", "/static/style.css", "/openapi.json", "/nowhere", "/health")),
        *(("HEAD", path, {}) for path in ("/", "/openapi.json", "/health", "/api/model")),
        *(("POST", "/api/jobs", {}), ("GET", "/", {"Host": "evil.example"}), ("BREW", "/", {})),
    ):
        _, headers, body = answer_to(port, method, path, **more)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers and b"Traceback" not in body


def test_a_token_is_needed_for_every_route_of_the_api(loaded):
    with running(loaded, "--token", TOKEN) as port:
        body = json.dumps({"prompts": [PROMPT]})
        right = {"Authorization": f"Bearer {TOKEN}"}
        identity = json.loads(answer_to(port, "POST", "/api/jobs", body, **right)[2])["id"]
        routes = [("POST", "/api/jobs", body), ("GET", "/api/model", None), ("POST", "/api/generate", body)]
        routes += [("DELETE", f"/api/jobs/{identity}", None), ("GET", f"/api/jobs/{identity}/events", None)]
        values = ("", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN)
        wrong = [{}, *({"Authorization": value} for value in values)]
        for method, path, data in routes:
            for headers in wrong:
                status, answer, text = answer_to(port, method, path, data, **headers)
                assert status == 401 and answer["www-authenticate"] == "Bearer" and TOKEN.encode() not in text
        assert answer_to(port, "GET", "/health")[0] == 200
        assert answer_to(port, "DELETE", f"/api/jobs/{identity}", **right)[0] == 204


def bombs():
    """Return small files that claim much: a PNG with further chunks, many pixels or large frames."""
    small, zeros = file_of(Image.new("RGB", (8, 8))), zlib.compress(bytes(200 * 2**20), 9)
    chunks = {"text": png_chunk(b"zTXt", b"Comment\0\0" + zeros), "profile": png_chunk(b"iCCP", b"profile\0\0" + zeros)}
    chunks["texts"] = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(60_000))) * 5000
    frames = [Image.new("P", (4000, 4000), index) for index in range(3)]
    return {
        **{name: small[:33] + chunk + small[33:] for name, chunk in chunks.items()},
        "pixels": png_of(60_000, 60_000),
        "one color": file_of(Image.new("1", (10_000, 10_000))),
        "frames": file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


def test_decompression_bombs_take_little_memory(port):
    statuses, made = {}, bombs()
    before = memory()
    for name, data in made.items():
        assert len(data) < 10 * 2**20
        status, answer = generate(port, prompt=PROMPT, image=base64.b64encode(data).decode())
        assert status in (200, 422), answer
        statuses[name] = status
    assert memory() - before < 250  # MB: the largest image that is accepted has 24 million pixels
    assert statuses["frames"] == 200 and {statuses[name] for name in statuses if name != "frames"} == {422}


def memory():
    """Return the largest memory of this process so far, in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def test_unfinished_uploads_are_bounded_as_a_whole(port):
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(30)]
        before = memory()
        for raw in raws:
            raw.setblocking(True)
            raw.settimeout(5)
            with contextlib.suppress(OSError):
                raw.sendall(HEAD.encode() + b'13000000\r\n\r\n{"prompts": ["' + b"x" * 12_000_000)
        assert memory() - before < 2 * guard.MAX_BODIES / 2**20
        raws[-1].settimeout(5)
        assert raws[-1].recv(4096).startswith(b"HTTP/1.1 503")
        assert generate(port, prompt=PROMPT)[0] == 200  # small requests are served meanwhile
    body = json.dumps({"prompts": [PROMPT], "image": "A" * 2**20})
    until(lambda: answer_to(port, "POST", "/api/jobs", body)[0] == 422)


def test_json_of_millions_of_values_is_not_parsed(port):
    for body in (b'{"prompts": [' + b'"a",' * 3_000_000 + b'"a"]}', b"[" * 10**7, b'{"a":' * 10**6):
        before, started = memory(), time.process_time()
        assert answer_to(port, "POST", "/api/jobs", body)[0] == 400
        assert memory() - before < 100 and time.process_time() - started < 2


@pytest.mark.parametrize("reader", [True, False], ids=["reader leaves", "no reader"])
def test_a_job_that_nobody_reads_is_cancelled(port, drawing, monkeypatch, reader):
    monkeypatch.setattr(events, "UNREAD_SECONDS", 1)
    monkeypatch.setattr(events, "MAX_READERS", 1)
    drawing.hold()
    body = json.dumps({"prompts": [PROMPT] * 8, "num_images": 8})
    events_of = f"/api/jobs/{json.loads(answer_to(port, 'POST', '/api/jobs', body)[2])['id']}/events"
    if reader:
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(f"GET {events_of} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            drawing.began(1)
            until(lambda: b"event" in raw.recv(4096))
            assert answer_to(port, "GET", events_of)[0] == 429
    assert call(port)[1]["waiting"] == 1
    until(lambda: call(port)[1]["waiting"] == 0)
    drawing.release()
    status, _, text = answer_to(port, "GET", events_of)
    assert status == 200 and b"cancelled" in text and b"event: image" not in text
    assert generate(port, prompt=PROMPT)[0] == 200


def test_a_client_cannot_fill_the_queue(loaded, drawing):
    drawing.hold()
    with running(loaded, "--queue-size", 4) as port:
        for _ in range(2):
            assert call(port, "POST", "/api/jobs", {"prompts": [PROMPT]})[0] == 202
        wanted = json.dumps({"prompt": PROMPT, "image": "never decoded"})
        status, headers, body = answer_to(port, "POST", "/api/generate", wanted)
        assert status == 429 and int(headers["retry-after"]) > 0 and b"try again" in body
        drawing.release()
        until(lambda: generate(port, prompt=PROMPT)[0] == 200)


def closed_after(raw, data, pause=0.2, limit=9):
    """Send data byte by byte; return the seconds until the server closes the connection."""
    started = time.monotonic()
    raw.settimeout(pause)
    for place in range(10**6):
        assert time.monotonic() - started < limit, "the connection stays open"
        try:
            raw.sendall(data[place % len(data) :][:1])
            if not raw.recv(4096):
                break
        except socket.timeout:
            continue
        except OSError:
            break
    return time.monotonic() - started


def test_slow_requests_are_closed(port, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1)
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 2)
    head = HEAD.encode() + b"1000\r\n"
    for sent, seconds in ((b"GET /health HT", 1), (head + b"\r\n{", 2)):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(sent)
            assert seconds - 0.1 < closed_after(raw, b"x")
    assert generate(port, prompt=PROMPT)[0] == 200
