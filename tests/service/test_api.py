"""The HTTP API of a server that runs: its answers, what it says to 200 wrong requests, and clients that leave."""

import base64
import contextlib
import io
import json
import random
import socket

import pytest
from PIL import Image

from generation.image_prompts import encode_kept_rows
from generation.images import generate_batch, image_metadata, plan_image, to_image
from tests.builders import png_of
from tests.service.running import call, generate, running, until

pytest.importorskip("fastapi", exc_type=ImportError)
PROMPT = "a red circle"
HEAD = "HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port(loaded):
    with running(loaded, "--max-images", 8, "--max-prompt-characters", 60, "--queue-size", 6) as port:
        yield port


def image_of(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer["png"], validate=True)))


def png(width, height, pixels=None):
    """Bytes of a PNG that says it has so many pixels; without pixels they are all of one colour, or missing."""
    file = io.BytesIO()
    (pixels or Image.new("1", (width, height))).save(file, "PNG")
    return file.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def is_a_sentence(answer):
    assert set(answer) == {"error"}
    error = answer["error"]
    return isinstance(error, str) and error.endswith(".") and "\n" not in error and len(error) < 300


def test_health(port, loaded):
    status, about = call(port)
    assert status == 200 and about["status"] == "ok" and about["checkpoint"] == loaded.fingerprint
    assert about["waiting"] == 0


def test_the_same_seed_gives_the_picture_of_the_library(port, loaded):
    status, answer = generate(port, prompt=f"  {PROMPT} ", num_images=3, seed=11, temperature=0.9)
    assert status == 200 and [one["seed"] for one in answer["images"]] == [11, 12, 13]
    for one in answer["images"]:
        wanted = plan_image(loaded, PROMPT, one["seed"], {"temperature": 0.9})
        alone = to_image(loaded.decode(generate_batch(loaded, [wanted]))[0])
        image = image_of(one)
        assert image.tobytes() == alone.tobytes()
        assert one["metadata"] == json.loads(image.info["Comment"]) == image_metadata(wanted, loaded)


def test_an_image_prompt_is_kept_as_by_the_library(port, loaded, drawn_pictures):
    path = sorted(drawn_pictures.glob("*.png"))[3]
    side = loaded.model.fmap_size
    for keep, rows in ((1, 1), (0.5, side // 2), (None, side // 2)):
        status, answer = generate(port, prompt=PROMPT, seed=2, image=b64(path.read_bytes()), keep_rows=keep)
        wanted = plan_image(loaded, PROMPT, 2, given_codes=encode_kept_rows(loaded, path, rows))
        alone = to_image(loaded.decode(generate_batch(loaded, [wanted]))[0])
        assert status == 200 and image_of(answer["images"][0]).tobytes() == alone.tobytes()


def test_without_a_seed_pictures_differ(port):
    answers = [generate(port, prompt=PROMPT)[1] for _ in range(2)]
    assert answers[0]["images"][0]["seed"] != answers[1]["images"][0]["seed"]


def wrong_requests():
    """200 of them: hand-picked ones, then random ones of a seed. (what is wrong, path, method, body, kind)"""
    chance = random.Random(20261124)
    good = {"prompt": PROMPT}
    post = ("/api/generate", "POST")
    bodies = [b"", b"{", b"null", b"[]", b'"text"', b"7", b"\xff\xfe{}", b"{'prompt': 'x'}", b'{"prompt": "x"', b"NaN"]
    bodies += [b'{"prompt": "x", "top_k": NaN}', b'{"prompt": "x", "temperature": Infinity}', b"[" * 100_000]
    bodies += [b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"a":' * 50_000, b"\x00" * 1000]
    bodies += [b'{"prompt": "\\ud800"}', b'{"prompt": "x", "\\ud800": 1}']
    objects = [{}, {"prompt": ""}, {"prompt": "   "}, {"prompt": None}, {"prompt": "x" * 61}, {"prompt": ["a"]}]
    objects += [{"prompt": "\u2603" * 60}, {"text": PROMPT}, {**good, "colour": 1}, {**good, "Prompt": PROMPT}]
    values = {
        "num_images": [0, -1, 9, 1.5, "2", True, [], {}, 10**30, -(10**30)],
        "seed": [-1, 2**63, 2**63 - 1, 1.5, "7", False, [1], 10**400],
        "top_k": [-0.1, 1.5, "0.9", True, [], 1e400],
        "top_p": [0, -1, 1.01, "1", {}, False],
        "temperature": [0, -1, "hot", True, []],
        "cond_scale": [-1, "1", True, {}, [1]],
        "keep_rows": [0.5, 1],  # without an image
        "image": [
            7,
            "",
            "nonsense!",
            "====",
            b64(b""),
            b64(b"GIF89a"),
            b64(b"<svg></svg>"),
            b64(bytes(1000)),
            True,
            [],
        ],
    }
    objects += [{**good, key: value} for key, some in values.items() for value in some]
    whole = png(8, 8)
    images = [png(10_000, 5_000), png_of(50_000, 50_000), png_of(100_000, 100_000), whole[:40], whole[:-30]]
    images += [png_of(80, 80), b"BM" + bytes(60), b"II*\x00" + bytes(50), b"%PDF-1.7", b"\xff\xd8\xff\xe0" + bytes(30)]
    objects += [{**good, "image": b64(data)} for data in images]
    objects += [{**good, "image": b64(whole), "keep_rows": keep} for keep in (0, -1, 4, 100, 1.5, 0.99, "all", 1e300)]
    for body in bodies:
        yield ("body", *post, body, "application/json")
    for body in objects:
        yield ("object", *post, body, "application/json")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        yield ("kind", *post, json.dumps(good).encode(), kind)
    for path, method in (("/api/generate", "PUT"), ("/api/generate", "GET"), ("/api/x", "GET"), ("/health", "POST")):
        yield ("route", path, method, None, "")
    junk = [None, True, -7, 1e9, "", "x", [], {}, [[1]], {"a": {"b": []}}, "\u0000", 10**25, -0.5]
    for _ in range(200):  # what is left of 200 is random: broken text, and keys with values of other kinds
        if chance.random() < 0.4:
            text = bytearray(json.dumps({**good, "num_images": 2, "seed": 3}).encode())
            for _ in range(chance.randrange(1, 6)):
                text[chance.randrange(len(text))] = chance.randrange(256)
            yield ("bytes", *post, b"{" + bytes(text), "application/json")
        else:
            body = {key: chance.choice(junk) for key in chance.sample(list(values), 3)}
            body[chance.choice(["styl", "n", "model"])] = chance.choice(junk)
            yield ("keys", *post, {**good, **body, "unknown": 1}, "application/json")


def test_200_wrong_requests_get_a_sentence_each(port, drawing):
    before = call(port)[1]["images_generated"]
    for _, (what, path, method, body, kind) in zip(range(200), wrong_requests()):
        status, answer = call(port, method, path, body, kind)
        assert 400 <= status < 500, (what, body if not isinstance(body, bytes) else body[:80], answer)
        assert is_a_sentence(answer), answer
    assert call(port)[1]["images_generated"] == before and drawing.batches == []
    assert generate(port, prompt=PROMPT)[0] == 200


@pytest.mark.parametrize(
    "wanted, sentence",
    [
        ({"prompt": "x" * 61}, "The prompt has 61 characters; at most 60 are accepted."),
        ({"prompt": PROMPT, "num_images": 9}, "9 images are asked for; from 1 to 8 can be generated at once."),
        ({"prompt": PROMPT, "num_images": "2"}, "num_images: input should be a valid integer."),
        ({"prompt": PROMPT, "size": 2}, "size: extra inputs are not permitted."),
        ({"num_images": 2}, "prompt: field required."),
        ({"prompt": PROMPT, "image": "???"}, "image is not base64."),
        ({"prompt": PROMPT, "image": b64(b"GIF")}, "The file is not a readable image; PNG, JPEG"),
        (
            {"prompt": PROMPT, "image": b64(png(10_000, 5_000))},
            "The image is 10000 × 5000 pixels, 50.0 megapixels; at most 24 are accepted.",
        ),
        ({"prompt": PROMPT, "image": b64(png_of(60_000, 60_000))}, "The image is too large"),
        ({"prompt": PROMPT, "temperature": 0}, "Temperature is 0.0; it must be above 0."),
    ],
)
def test_a_sentence_names_what_is_wrong(port, wanted, sentence):
    status, answer = generate(port, **wanted)
    assert status == 422 and answer["error"].startswith(sentence)


def test_a_large_body_is_refused_before_it_is_sent(port):
    for path, size in (("/api/generate", 500_000_000), ("/api/generate", 15 << 20), ("/gradio_api/upload", 15 << 20)):
        header = f"POST {path} {HEAD}Connection: close\r\nContent-Length: {size}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(header.encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(4096), b"")).decode()
        assert answer.startswith("HTTP/1.1 413") and '{"error":"The request is too large; at most ' in answer


@pytest.mark.parametrize("path", ["/api/generate", "/gradio_api/queue/join"])
def test_a_body_of_unknown_length_is_read_no_further_than_may_be(port, path):
    head = f"POST {path} {HEAD}Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(head.encode())
        for _ in range(15):  # megabytes
            with contextlib.suppress(ConnectionError):
                raw.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = raw.recv(4096)
    assert answer[9:12] in ((b"413",) if path.startswith("/api") else (b"413", b"404"))
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
