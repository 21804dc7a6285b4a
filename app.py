"""Serve a web page and an HTTP API that generate images for prompts.

python app.py --dalle_path output/demo/ckpt/dalle_step_800.pt
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import re
import socket
from typing import TYPE_CHECKING, List, Optional

import log
from utils.command_line import COUNT, Parser, exit_on_error, number
from utils.errors import describe_error
from utils.files import sigterm_as_ctrl_c

if TYPE_CHECKING:
    import uvicorn

    from service.queue import GenerationQueue

logger = logging.getLogger("minidalle")


def main(argv: Optional[List[str]] = None) -> None:
    """Load the model and serve until Ctrl-C or SIGTERM."""
    settings = app_arguments(argv)
    log.set_up()
    with exit_on_error("requirements-app.txt"), sigterm_as_ctrl_c(), contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(settings.host, settings.port))
        import fastapi  # noqa: F401  # a missing package is reported before the model is loaded
        import uvicorn  # noqa: F401

        from generation.loading import load_from_flags
        from service.queue import GenerationQueue

        queue = GenerationQueue(max_jobs=settings.queue_size, max_images=settings.queue_size * settings.max_images)
        queue.start()
        queue.loaded = queue.call(load_from_flags, settings).result()
        server = make_server(queue, settings)
        host, port = listening.getsockname()[:2]
        if not (settings.token or ipaddress.ip_address(host).is_loopback):
            logger.warning("anyone who reaches port %d can generate images; --token SECRET asks for it", port)
        netloc = f"[{host}]" if ":" in host else host
        print(f"http://{netloc}:{port} generates with {queue.loaded.path}; Ctrl-C ends it", flush=True)
        server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket, or raise ValueError in one line."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {describe_error(error)}; give another host or port") from None
    return listening


def make_server(queue: "GenerationQueue", settings: argparse.Namespace) -> "uvicorn.Server":
    """Return a uvicorn.Server of page and API; a running queue must have its model."""
    import uvicorn

    from service import api, connections
    from service.events import Streams
    from service.guard import HEADERS, Guard
    from service.validation import Limits

    streams = Streams(queue)
    limits = Limits(settings.max_images, settings.max_prompt_characters)
    routes = api.build(queue.loaded, queue, streams, limits)
    application = Guard(routes, settings.host, settings.allowed_host, settings.token, settings.root_path)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            queue.stop()  # clients that wait are answered at once
            super().handle_exit(sig, frame)

        async def on_tick(self, counter):
            if counter % 10 == 0:  # every second
                streams.sweep()
                for connection in list(self.server_state.connections):
                    connection.check_time()
            return await super().on_tick(counter)

        async def shutdown(self, sockets=None):
            queue.stop(seconds=2)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        application,
        http=connections.Connection,
        ws="none",
        lifespan="off",
        headers=list(HEADERS.items()),
        server_header=False,
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=settings.forwarded_allow_ips,
        limit_concurrency=connections.MAX_CONNECTIONS + 1,
        timeout_graceful_shutdown=1,
        log_level="critical",
        access_log=False,
    )
    return Server(config)


def app_parser() -> Parser:
    parser = Parser("Serves a web page and an HTTP API that generate images for prompts; see requirements-app.txt.")
    add = parser.heading("Model")
    add("dalle-path", None, "checkpoint of train.py; default: the bundled model")
    parser.machine_flags()
    add = parser.heading("Network")
    add("host", "127.0.0.1", "address; 0.0.0.0 serves other machines, too")
    add("port", 7860, "port; 0: a free one", number(int, low=0, high=65535))
    add("token", None, "secret that clients must know; default: the environment variable MINI_DALLE_TOKEN", token)
    add("allowed-host", [], "further host names that the page is reached by", nargs="+", metavar="NAME")
    add("root-path", "", "prefix under which a reverse proxy serves the page, such as /draw", prefix)
    text = "IP addresses of trusted proxies, separated by commas; * trusts all"
    add("forwarded-allow-ips", None, text, addresses)
    add = parser.heading("Limits")
    add("max-images", 16, "images per prompt", number(int, low=1, high=256))
    add("max-prompt-characters", 400, "characters per prompt", COUNT)
    add("queue-size", 64, "requests in the queue; further ones are refused with 429 or 503", COUNT)
    add("batch-size", None, "images generated at once; default: chosen for the machine", COUNT)
    parser.window_flag(add)
    add = parser.heading("Files that the checkpoint lacks")
    add("bpe-path", None, "vocabulary file; default: the checkpoint's, else CLIP's")
    parser.vqgan_file_flags(add)
    return parser


def prefix(text: str) -> str:
    """Parse the path of a URL and return it with a slash before it and none after it; "" and "/" are no prefix."""
    if not re.fullmatch(r"/?([\w.~-]+/)*[\w.~-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be the path of a URL such as /draw, not '{text}'")
    return f"/{text.strip('/')}" if text.strip("/") else ""


def addresses(text: str) -> str:
    """Parse IP addresses or networks with commas between, or *."""
    for address in text.split(","):
        try:
            address.strip() == "*" or ipaddress.ip_network(address.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be IP addresses or networks, not '{text}'") from None
    return text


def token(text: str) -> str:
    """Parse a secret of printable ASCII, which is all that browsers send.

    An empty one is refused because it would switch the check off.
    """
    if not text or text != text.strip() or not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("must be ASCII characters, not empty, and without a space at either end")
    return text


def app_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = app_parser()
    settings = parser.parse(argv)
    parser.check_vqgan_files(settings)
    try:
        settings.token = settings.token or token(os.environ["MINI_DALLE_TOKEN"])
    except KeyError:
        pass  # no token is needed
    except argparse.ArgumentTypeError as error:
        parser.error(f"MINI_DALLE_TOKEN: {error}")
    return settings


if __name__ == "__main__":
    main()
