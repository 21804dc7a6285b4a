"""Jobs and their server-sent events, as the page reads them."""

import asyncio
import json
import threading

import pytest

from generation.images import generate_batch, image_metadata, plan_image, to_image
from service.queue import Job
from tests.service.running import answer_to, call, image_of, read_events, running, until

pytest.importorskip("fastapi", exc_type=ImportError)
from service.events import Stream  # noqa: E402

PROMPTS = ["a red circle", "a blue square above a dog"]


@pytest.fixture(scope="module")
def port(loaded):
    with running(loaded, "--max-images", 16) as port:
        yield port


def create(port, **wanted):
    status, answer = call(port, "POST", "/api/jobs", {"prompts": PROMPTS, **wanted})
    assert status == 202, answer
    return answer


def cancel(port, identity):
    return answer_to(port, "DELETE", f"/api/jobs/{identity}")[0]


def test_a_job_of_two_prompts_from_its_first_row_to_its_images(port, loaded, drawing):
    drawing.seconds = 0.01
    answer = create(port, num_images=3, seed=5, temperature=0.9)
    assert answer["images"] == 6
    events = read_events(port, answer["id"])
    assert [number for number, _, _ in events] == list(range(1, len(events) + 1)) and events[-1][1] == "done"
    images = {data["index"]: data for _, event, data in events if event == "image"}
    assert [images[index]["seed"] for index in range(6)] == [5, 6, 7] * 2
    for data in images.values():
        spec = plan_image(loaded, data["prompt"], data["seed"], {"temperature": 0.9})
        alone = to_image(loaded.decode(generate_batch(loaded, [spec]))[0])
        image = image_of(data["png"])
        assert image.tobytes() == alone.tobytes() and data["prompt"] in PROMPTS
        assert json.loads(image.info["Comment"]) == data["metadata"] == image_metadata(spec, loaded)
    rows = [data for _, event, data in events if event == "row"]
    side = loaded.side
    assert all(0 <= data["rows"] < data["of"] == side for data in rows)
    for index in range(6):
        own = [data["rows"] for data in rows if data["index"] == index]
        assert own == sorted(set(own)) and 1 <= len(own) <= 8
    previews = [data for data in rows if data["preview"]]
    assert previews and all(data["seconds_left"] >= 0 for data in rows if data["rows"])
    for data in previews:
        preview = image_of(data["preview"])
        assert preview.format == "WEBP" and preview.width <= 96
        assert preview.height == preview.width * data["rows"] // side


def test_events_are_kept_for_readers_that_come_again(port, monkeypatch):
    identity = create(port, num_images=1)["id"]
    whole = read_events(port, identity)
    assert read_events(port, identity) == whole
    assert read_events(port, identity, after=3) == whole[3:] and read_events(port, identity, after=len(whole)) == []
    assert cancel(port, identity) == 204 and read_events(port, identity) == whole
    monkeypatch.setattr("service.events.KEEP_SECONDS", 0)
    until(lambda: cancel(port, identity) == 404)


@pytest.mark.parametrize("begun", [True, False])
def test_a_cancelled_job_ends_its_readers(port, drawing, begun):
    drawing.hold()
    identity, found = create(port, num_images=8)["id"], []
    thread = threading.Thread(target=lambda: found.extend(read_events(port, identity)))
    if begun:
        thread.start()
        drawing.began(1)
    assert cancel(port, identity) == 204
    drawing.release()
    if not begun:
        thread.start()
    thread.join(20)
    assert found[-1][1] == "done" and found[-1][2]["cancelled"] and not any(event == "image" for _, event, _ in found)
    until(lambda: call(port)[1]["waiting"] == 0)


def test_a_late_reader_gets_one_event_at_a_time():
    async def read(stream):
        for row in range(3):
            stream.emit("row", rows=row)
        stream.ended = True
        return [text async for text in stream.read(1)]

    stream = Stream(Job("client", [None] * 4))
    assert asyncio.run(read(stream)) == stream.events[1:]


def test_the_model_is_described(port, loaded):
    status, about = call(port, "GET", "/api/model?prompt=a+red+circle+above+a+dog")
    assert status == 200 and about["prompt"]["unknown_words"] == ["dog"] and about["prompt"]["tokens"] > 5
    assert about["rows"] == loaded.side and about["known_words"] == len(loaded.words) and about["examples"]
    assert (about["max_images"], about["max_prompts"], about["guidable"]) == (16, 8, True)
    assert "/" not in about["name"] and "prompt" not in call(port, "GET", "/api/model")[1]


WRONG_JOBS = {
    "prompts: list should have at least 1 item": {"prompts": []},
    "There are 9 prompts; at most 8 are accepted.": {"prompts": ["x"] * 9},
    "Prompt 2 is empty; write what the image should show.": {"prompts": ["a", " "]},
    "17 images are asked for; from 1 to 16 can be generated at once.": {"prompts": ["a"], "num_images": 17},
    "The number of rows to keep needs an image": {"prompts": ["a"], "keep_rows": 1},
    "The request's body: input should be a valid": [],
}


def test_wrong_jobs_get_a_sentence(port):
    for sentence, wanted in WRONG_JOBS.items():
        status, answer = call(port, "POST", "/api/jobs", wanted)
        assert status == 422 and answer["error"].startswith(sentence), answer
    assert call(port, "POST", "/api/jobs/none", {})[0] == 405 and cancel(port, "none") == 404
    assert call(port, "GET", "/api/jobs/none/events")[1]["error"].startswith("This job does not exist")
