"""app.py as a process: how it starts, is refused and ends; twenty clients at once."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from unittest.mock import Mock

import pytest

import app
from tests.builders import start
from tests.service.running import answer_to, call, generate, read_events, until

pytest.importorskip("fastapi", exc_type=ImportError)
CLIENTS = 20
APP = ("app.py", "--device", "cpu", "--precision", "fp32", "--port", 0, "--batch-size", 8)


def port_of(process):
    for line in process.stdout:
        found = re.search(r"http://127.0.0.1:(\d+) ", line)
        if found:
            return int(found[1])
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def served(tiny_checkpoint):
    """The port of an app.py with the tiny checkpoint and batches of 8."""
    process = start(*APP, "--dalle_path", tiny_checkpoint)
    yield port_of(process)
    process.kill()
    process.communicate()


def test_it_listens_to_this_machine_alone_and_refuses_a_port_in_use(served):
    second = start(*APP, "--port", served)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"app.py: error: --host 127.0.0.1 --port {served}: ") and "in use" in err
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, served), timeout=1)


def test_a_wrong_flag_and_a_missing_package_are_one_line(command, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    for flag, value, said in (
        ("--dalle_path", "nowhere.pt", "nowhere.pt"),
        ("--port", "70000", "--port: "),
        ("--host", "no.such.host.invalid", "--host no.such.host.invalid"),
        ("--root-path", "a" * 40 + "*", "--root-path"),  # a slow pattern would take years
        ("--forwarded-allow-ips", "10.0.0.0/8,proxy", "--forwarded-allow-ips"),
    ):
        command(app.main, "--port", 0, flag, value).refused(said)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    command(app.main, "--port", 0).refused("uvicorn is missing: pip install -r requirements-app.txt")


def test_ctrl_c_ends_it_at_once_while_it_generates(tiny_checkpoint, tmp_path):
    """Clients that wait get 503, readers of events an error; nothing is left behind, and no traceback."""
    process = start(*APP, "--dalle_path", tiny_checkpoint, env={"TMPDIR": str(tmp_path)})
    port = port_of(process)
    answers = []

    def ask():
        with contextlib.suppress(ConnectionError):  # came too late
            answers.append(generate(port, prompt="a red circle", num_images=16))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: call(port)[1]["waiting"] > 12)
    job = call(port, "POST", "/api/jobs", {"prompts": ["a red circle"] * 4, "num_images": 16})[1]["id"]
    reader = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    reader.request("GET", f"/api/jobs/{job}/events")
    events = reader.getresponse()
    slow = socket.create_connection(("127.0.0.1", port))
    slow.sendall(b"POST /api/jobs HTTP/1.1\r\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)  # about a second on a machine with nothing else to do
    for thread in threads:
        thread.join()
    slow.close()
    last = events.read().decode().strip().split("\n\n")[-1]
    reader.close()
    assert {status for status, _ in answers} <= {200, 503}
    assert (503, {"error": "The service is stopping."}) in answers
    assert "event: error" in last and "The service is stopping." in last
    assert process.returncode == 130 and err == "stopped\n" and "Traceback" not in out
    assert list(tmp_path.iterdir()) == []


def test_other_machines_are_let_in_with_a_warning_only(command, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda *given, **named: None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    for host, flags, warned in (
        *(("0.0.0.0", (), True), ("192.168.1.5", (), True), ("127.0.0.1", (), False)),
        ("0.0.0.0", ("--token", "secret"), False),
    ):
        listening = Mock(**{"getsockname.return_value": (host, 80)})
        monkeypatch.setattr(app, "listen", Mock(return_value=contextlib.nullcontext(listening)))
        ended = command(app.main, "--dalle_path", tiny_checkpoint, *flags)
        assert ended.status == 0 and f"http://{host}:80 " in ended.out
        assert ("--token SECRET" in ended.out) == warned


def test_twenty_clients_at_once_are_all_served(served):
    """Each asks from an address of its own for three seconds, every other one as the page does."""
    images, failed, end = [0] * CLIENTS, [], time.monotonic() + 3

    def post(number, path, **wanted):
        wanted.update(num_images=2, seed=number)
        status, _, text = answer_to(served, "POST", path, json.dumps(wanted), **{"X-Forwarded-For": f"10.0.0.{number}"})
        return json.loads(text) if status in (200, 202) else failed.append((number, text))

    def client(number):
        while time.monotonic() < end and not failed:
            if number % 2:
                images[number] += len(post(number, "/api/generate", prompt="a red circle")["images"])
            else:
                job = post(number, "/api/jobs", prompts=["a red circle"])["id"]
                images[number] += [event for _, event, _ in read_events(served, job)].count("image")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and 0 < max(images) < 2 * min(images) + 4
    assert call(served)[1]["images_generated"] >= sum(images)


def test_a_token_that_no_browser_could_send_is_refused(command, monkeypatch):
    for token in ("", " spaced ", "sésame"):
        command(app.main, "--token", token).refused("must be ASCII characters, not empty")
        with monkeypatch.context() as patch:
            patch.setenv("MINI_DALLE_TOKEN", token)
            command(app.main).refused("must be ASCII characters, not empty")
