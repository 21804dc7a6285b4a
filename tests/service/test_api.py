"""The HTTP API of a server that runs: its answers, what it says to wrong requests, and clients that leave."""

import base64
import contextlib
import json
import random
import socket

import pytest
from PIL import Image

from generation.image_prompts import encode_kept_rows
from generation.images import generate_batch, image_metadata, plan_image, to_image
from tests.builders import png_of
from tests.service.running import answer_to, call, file_of, generate, image_of, read_events, running, until

pytest.importorskip("fastapi", exc_type=ImportError)
PROMPT = "a red circle"
HEAD = "HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port(loaded):
    with running(loaded, "--max-images", 8, "--max-prompt-characters", 60, "--queue-size", 6) as port:
        yield port


def png(width, height):
    """Return the bytes of a black PNG."""
    return file_of(Image.new("1", (width, height)))


def b64(data):
    return base64.b64encode(data).decode()


def is_a_sentence(answer):
    assert set(answer) == {"error"}
    error = answer["error"]
    return isinstance(error, str) and error.endswith(".") and "\n" not in error and len(error) < 300


def test_the_same_seed_gives_the_image_of_the_library(port, loaded):
    status, about = call(port)
    assert status == 200 and about["status"] == "ok" and about["checkpoint"] == loaded.fingerprint
    assert about["waiting"] == 0
    status, answer = generate(port, prompt=f"  {PROMPT} ", num_images=3, seed=11, temperature=0.9)
    assert status == 200 and [one["seed"] for one in answer["images"]] == [11, 12, 13]
    for one in answer["images"]:
        wanted = plan_image(loaded, PROMPT, one["seed"], {"temperature": 0.9})
        alone = to_image(loaded.decode(generate_batch(loaded, [wanted]))[0])
        image = image_of(one["png"])
        assert image.tobytes() == alone.tobytes()
        assert one["metadata"] == json.loads(image.info["Comment"]) == image_metadata(wanted, loaded)
    assert len({generate(port, prompt=PROMPT)[1]["images"][0]["seed"] for _ in range(2)}) == 2  # without a seed


def test_an_image_prompt_is_kept_as_by_the_library(port, loaded, drawn_pictures):
    path = sorted(drawn_pictures.glob("*.png"))[3]
    side = loaded.model.fmap_size
    for keep, rows in ((1, 1), (0.5, side // 2), (None, side // 2)):
        status, answer = generate(port, prompt=PROMPT, seed=2, image=b64(path.read_bytes()), keep_rows=keep)
        wanted = plan_image(loaded, PROMPT, 2, given_codes=encode_kept_rows(loaded, path, rows))
        alone = to_image(loaded.decode(generate_batch(loaded, [wanted]))[0])
        assert status == 200 and image_of(answer["images"][0]["png"]).tobytes() == alone.tobytes()


WRONG_BODIES = [b"", b"{", b"null", b"[]", b"\xff\xfe{}", b"{'prompt': 'x'}", b"[" * 100_000, b'{"prompt": "a red']
WRONG_BODIES += [
    b'{"prompt": "x", "top_k": NaN}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b"\x00" * 1000,
]
WRONG_VALUES = {
    "prompt": ["", "   ", None, "x" * 61, ["a"], "\u2603" * 60],
    "num_images": [0, 9, 1.5, "2", True, 10**30],
    "seed": [-1, 2**63, 1.5, False, 10**400],
    "top_k": [-0.1, 1.5, "0.9", True],
    "top_p": [0, 1.01, {}],
    "temperature": [0, "hot", []],
    "cond_scale": [-1, True],
    "keep_rows": [0.5, 1],  # without an image
    "image": [7, "", "nonsense!", *map(b64, (b"GIF89a", b"<svg></svg>", png(8, 8)[:40], png_of(50_000, 50_000)))],
    "colour": [1],
}


def wrong_requests():
    """Yield (path, method, body, kind) of requests that are wrong in one thing, and of random damage."""
    good = {"prompt": PROMPT}
    objects = [{}, *({**good, key: value} for key, values in WRONG_VALUES.items() for value in values)]
    objects += [{**good, "image": b64(png(8, 8)), "keep_rows": keep} for keep in (0, -1, 4, 1.5, "all")]
    for body in WRONG_BODIES + objects:
        yield "/api/generate", "POST", body, "application/json"
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        yield "/api/generate", "POST", json.dumps(good).encode(), kind
    for path, method in (("/api/generate", "PUT"), ("/api/x", "GET"), ("/health", "POST")):
        yield path, method, None, ""
    chance = random.Random(20261124)
    for _ in range(30):
        text = bytearray(json.dumps({**good, "num_images": 2}).encode())
        text[chance.randrange(len(text))] = chance.randrange(256)
        yield "/api/generate", "POST", b"{" + bytes(text), "application/json"


def test_wrong_requests_get_a_sentence_each(port, drawing):
    before = call(port)[1]["images_generated"]
    for path, method, body, kind in wrong_requests():
        status, answer = call(port, method, path, body, kind)
        assert 400 <= status < 500, (body if not isinstance(body, bytes) else body[:80], answer)
        assert is_a_sentence(answer), answer
    assert call(port)[1]["images_generated"] == before and drawing.batches == []
    assert generate(port, prompt=PROMPT)[0] == 200


def test_a_sentence_names_what_is_wrong(port):
    for wanted, sentence in (
        ({"prompt": "x" * 61}, "The prompt has 61 characters; at most 60 are accepted."),
        ({"prompt": PROMPT, "num_images": 9}, "9 images are asked for; from 1 to 8 can be generated at once."),
        ({"prompt": PROMPT, "size": 2}, "size: extra inputs are not permitted."),
        ({"prompt": PROMPT, "image": b64(b"GIF")}, "The file is not a readable image; PNG, JPEG"),
        ({"prompt": PROMPT, "image": b64(png(10_000, 5_000))}, "The image is 10000 × 5000 pixels, 50.0 megapixels;"),
        ({"prompt": PROMPT, "temperature": 0}, "Temperature is 0.0; it must be above 0."),
    ):
        status, answer = generate(port, **wanted)
        assert status == 422 and answer["error"].startswith(sentence)


def test_a_large_body_is_refused_before_it_is_sent(port):
    for path, size in (("/api/generate", 500_000_000), ("/api/generate", 15 << 20), ("/gradio_api/upload", 15 << 20)):
        header = f"POST {path} {HEAD}Connection: close\r\nContent-Length: {size}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(header.encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(4096), b"")).decode()
        assert answer.startswith("HTTP/1.1 413") and '{"error":"The request is too large; at most ' in answer
    # If the length is unknown, no more is read than may be.
    head = f"POST /api/generate {HEAD}Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(head.encode())
        for _ in range(15):  # megabytes
            with contextlib.suppress(ConnectionError):
                raw.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = raw.recv(4096)
    assert answer[9:12] == b"413"
    assert call(port)[0] == 200


def test_a_client_that_leaves_takes_its_request_back(port, drawing):
    drawing.hold()
    with socket.create_connection(("127.0.0.1", port)) as raw:
        body = json.dumps({"prompt": PROMPT, "num_images": 8}).encode()
        head = f"POST /api/generate {HEAD}Content-Length: {len(body)}"
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        drawing.began(1)
        assert call(port)[1]["waiting"] == 1
    until(lambda: call(port)[1]["waiting"] == 0)
    drawing.release()
    assert generate(port, prompt=PROMPT)[0] == 200
    assert len(drawing.batches) == 2  # the second half of the eight was never begun


def test_a_drawing_that_fails_is_told_with_500(port, drawing):
    def before(seeds):
        raise RuntimeError("secret")

    drawing.before = before
    status, answer = generate(port, prompt=PROMPT)
    assert status == 500 and is_a_sentence(answer) and "secret" not in answer["error"]
    drawing.before = lambda seeds: None
    assert generate(port, prompt=PROMPT)[0] == 200


def test_made_up_requests_are_answered_as_documented(port):
    """Call every operation with made-up values; raise what does not fit the OpenAPI document."""
    hypothesis, schemathesis = pytest.importorskip("hypothesis"), pytest.importorskip("schemathesis")
    paths = {"/health", "/api/model", "/api/generate", "/api/jobs", "/api/jobs/{id}", "/api/jobs/{id}/events"}
    assert set(call(port, "GET", "/openapi.json")[1]["paths"]) == paths
    checks = [
        *(schemathesis.checks.not_a_server_error, schemathesis.checks.status_code_conformance),
        *(schemathesis.checks.content_type_conformance, schemathesis.checks.response_schema_conformance),
    ]
    calls, options = [], {"max_examples": 10, "derandomize": True, "database": None, "deadline": None}
    for operation in schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json").get_all_operations():

        @hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck), **options)
        @hypothesis.given(case=operation.ok().as_strategy())
        def once(case):
            calls.append(case.call_and_validate(checks=checks, timeout=30))

        once()
    assert len(calls) > 20 and call(port)[0] == 200


@pytest.mark.parametrize("prefix", ["", "/draw"], ids=["prefix cut off by the proxy", "prefix handed on"])
def test_page_api_and_events_work_behind_a_proxy_under_a_prefix(loaded, prefix):
    site = {"Host": "draw.example.org", "X-Forwarded-For": "10.0.0.9", "X-Forwarded-Proto": "https"}
    with running(loaded, "--root-path", "/draw", "--allowed-host", "draw.example.org") as port:
        for place in ("/", "/health", "/openapi.json", "/api/model", "/static/app.js"):
            status, _, body = answer_to(port, "GET", prefix + place, **site)
            assert status == 200 and b'="/' not in body, place  # no address that forgets the prefix
        assert b'"/draw"' in answer_to(port, "GET", f"{prefix}/openapi.json", **site)[2]
        body, origin = json.dumps({"prompts": [PROMPT], "num_images": 2}), "https://draw.example.org"
        status, _, answer = answer_to(port, "POST", f"{prefix}/api/jobs", body, Origin=origin, **site)
        assert status == 202
        events = read_events(port, json.loads(answer)["id"], root=prefix)
        assert [event for _, event, _ in events].count("image") == 2 and events[-1][1] == "done"
        assert answer_to(port, "GET", f"{prefix}/health", Host="evil.example")[0] == 421
