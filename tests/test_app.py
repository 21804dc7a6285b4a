"""app.py as a process: how it starts, is refused and ends; twenty clients at once."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.service.running import call, generate, loaded_for_tests, until

pytest.importorskip("fastapi", exc_type=ImportError)
CLIENTS = 20


def start(*flags):
    return subprocess.Popen(
        [sys.executable, "app.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def port_of(process):
    """Wait until it serves → its port."""
    for line in process.stdout:
        found = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
        if found:
            return int(found[1])
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def served(tiny_checkpoint):
    """An app.py of the tiny checkpoint, 8 pictures at once → (its process, the port)."""
    process = start("--dalle_path", tiny_checkpoint, "--port", 0, "--batch-size", 8)
    yield process, port_of(process)
    process.kill()
    process.communicate()


def test_it_listens_to_this_machine_alone_and_refuses_a_port_in_use(served):
    port = served[1]
    second = start("--port", port)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"app.py: error: --host 127.0.0.1 --port {port}: ") and "in use" in err
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in others:
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=1)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dalle_path", "nowhere.pt"], "nowhere.pt"),
        (["--port", "70000"], "--port: '70000' is not a whole number at least 0 at most 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--max-images", "0"], "--max-images"),
        (["--queue-size", "few"], "--queue-size"),
    ],
)
def test_wrong_flags_are_one_line(command, monkeypatch, flags, said):
    import app

    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(sys, "argv", ["app.py"])
    ended = command(app.main, "--port", 0, *flags)
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1


def test_a_missing_package_is_one_line(command, monkeypatch):
    import app

    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = command(app.main, "--port", 0)
    assert ended.status == 2 and ended.err.count("\n") == 1
    assert "uvicorn is missing; pip install -r requirements-app.txt brings it" in ended.err


def besieged(port, seconds, count):
    """Twenty clients that each ask for `count` pictures, again and again → (pictures, of each client; what failed;
    seconds that it took).
    """
    served, failed, began = [0] * CLIENTS, [], time.monotonic()

    def client(number):
        turn = 0
        while time.monotonic() < began + seconds:
            turn += 1
            try:
                wanted = {"prompt": "a red circle", "count": count, "seed": 1000 * number + turn}
                status, answer = generate(port, **wanted)
            except (OSError, ValueError, http.client.HTTPException) as error:
                status, answer = 0, error
            if status == 200 and len(answer["pictures"]) == count:
                served[number] += count
            else:
                failed.append((number, status, answer))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return served, failed, time.monotonic() - began


def test_twenty_clients_at_once_are_all_served(served):
    port = served[1]
    pictures, failed, _ = besieged(port, 3, 2)
    assert failed == []
    assert min(pictures) > 0.5 * max(pictures)
    assert call(port)[1]["pictures_drawn"] == sum(pictures)


def test_ctrl_c_ends_it_even_while_it_draws(served):
    process, port = served
    answers = []
    ask = {"prompt": "a red circle", "count": 16}
    busy = [threading.Thread(target=lambda: answers.append(generate(port, **ask))) for _ in range(20)]
    for thread in busy:
        thread.start()
    until(lambda: call(port)[1]["waiting"] > 10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    for thread in busy:
        thread.join()
    assert {status for status, _ in answers} <= {200, 503}
    assert (503, {"error": "The service is stopping."}) in answers
    assert process.returncode == 130 and err == "stopped\n" and "Traceback" not in out


@pytest.mark.slow
def test_twenty_clients_for_a_minute_get_what_plain_drawing_gives():
    """Pictures a second, compared with generation.batching.generate_batch in batches of the same size
    before and after; with the demo, or the checkpoint DALLE_PATH.
    """
    from generation.batching import generate_batch, plan_image
    from generation.loading import DEMO

    checkpoint = Path(os.environ.get("DALLE_PATH", DEMO))
    if not checkpoint.exists():
        pytest.skip("no demo checkpoint")
    loaded = loaded_for_tests(checkpoint, batch_size=None)

    def plain(seconds):
        count, began = 0, time.monotonic()
        while time.monotonic() < began + seconds:
            batch = [plan_image(loaded, "a red circle", count + place) for place in range(loaded.batch_size)]
            loaded.decode(generate_batch(loaded, batch))
            count += len(batch)
        return count / (time.monotonic() - began)

    process = start("--dalle_path", checkpoint, "--port", 0, "--batch-size", loaded.batch_size)
    try:
        port = port_of(process)
        plain(2)
        before = plain(15)
        pictures, failed, seconds = besieged(port, 60, 4)
        after = plain(15)
    finally:
        process.kill()
        process.communicate()
    print(
        f"{sum(pictures) / seconds:.1f} pictures/s for 20 clients, {min(pictures)} to {max(pictures)} each; "
        f"plain, {loaded.batch_size} at once: {before:.1f} before, {after:.1f} after"
    )
    assert failed == []
    assert min(pictures) > 0.7 * max(pictures)
    assert sum(pictures) / seconds >= 0.8 * (before + after) / 2
