"""The service behind nginx under a prefix, with the proxy's headers believed and not believed."""

import shutil
import socket
import subprocess

import pytest

from tests.service.running import answer_to, call, read_events, running, until

pytest.importorskip("fastapi", exc_type=ImportError)
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx")
SITE = """
daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{front};
    location /draw/ {{
      proxy_pass http://127.0.0.1:{back}{path};
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $http_x_test_client;
      proxy_set_header X-Forwarded-Proto https;
      proxy_http_version 1.1;
    }}
  }}
}}
"""


@pytest.fixture
def proxy(tmp_path):
    """proxy(back, path) → the port of nginx, which hands /draw/ on to a port with that path in place of it."""
    started = []

    def start(back, path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            front = free.getsockname()[1]
        config = tmp_path / "nginx.conf"
        config.write_text(SITE.format(folder=tmp_path, front=front, back=back, path=path))
        started.append(subprocess.Popen([NGINX, "-c", str(config), "-e", str(tmp_path / "errors")]))
        until(lambda: socket.socket().connect_ex(("127.0.0.1", front)) == 0)
        return front

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("path", ["/", ""], ids=["prefix cut off", "prefix handed on"])
def test_page_api_and_events_work_under_a_prefix(loaded, proxy, path):
    with running(loaded, "--root-path", "/draw", "--allowed-host", "draw.example.org") as back:
        front = proxy(back, path)
        site = {"Host": "draw.example.org"}
        for place in ("/", "/health", "/openapi.json", "/api/model", "/static/app.js"):
            status, headers, body = answer_to(front, "GET", f"/draw{place}", **site)
            assert status == 200 and b'="/' not in body, place  # no address that forgets the prefix
        assert b'"/draw"' in answer_to(front, "GET", "/draw/openapi.json", **site)[2]
        wanted = {"prompts": ["a red circle"], "num_images": 2}
        status, answer = call(front, "POST", "/draw/api/jobs", wanted)
        assert status == 202
        events = read_events(front, f"{answer['id']}", root="/draw")
        assert [event for _, event, _ in events].count("image") == 2 and events[-1][1] == "done"
        origin = {**site, "Origin": "https://draw.example.org", "Content-Type": "application/json"}
        assert answer_to(front, "POST", "/draw/api/jobs", b'{"prompts": ["a red circle"]}', **origin)[0] == 202
        assert answer_to(front, "GET", "/draw/health", Host="evil.example")[0] == 421
