"""Serve a web page and an HTTP API that generate images for prompts.

python app.py --dalle_path output/demo/ckpt/dalle_step_800.pt
"""

import argparse
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, List, Optional

import log
from args_app import app_arguments

if TYPE_CHECKING:
    import uvicorn

    from service.queue import GenerationQueue

logger = logging.getLogger("minidalle")


def main(argv: Optional[List[str]] = None) -> None:
    """Load the model and serve until Ctrl-C or SIGTERM."""
    settings = app_arguments(argv)
    log.set_up()
    with log.exit_on_interrupt(), log.sigterm_as_ctrl_c(), log.exit_on_bad_input(), contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(settings.host, settings.port))
        check_packages()
        from generation.loading import load_from_flags
        from service.queue import GenerationQueue

        queue = GenerationQueue(max_jobs=settings.queue_size, max_images=settings.queue_size * settings.max_images)
        queue.start()
        queue.loaded = queue.call(load_from_flags, settings).result()
        server = make_server(queue, settings)
        host, port = listening.getsockname()[:2]
        if host in ("0.0.0.0", "::") and not settings.token:
            logger.warning(
                "anyone who reaches this machine's port %d can generate images; --token SECRET asks for it", port
            )
        netloc = f"[{host}]" if ":" in host else host
        print(f"http://{netloc}:{port} generates with {queue.loaded.path}; Ctrl-C ends it", flush=True)
        server.run(sockets=[listening])


def check_packages() -> None:
    """Raise ValueError, in one line, if a package that the service needs is missing."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is missing; pip install -r requirements-app.txt brings it (Python 3.10 or later)"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket, or raise ValueError in one line."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {log.describe_error(error)}; give another host or port"
        ) from None
    return listening


def make_server(queue: "GenerationQueue", settings: argparse.Namespace) -> "uvicorn.Server":
    """Return a uvicorn.Server of page and API; a running queue must have its model."""
    import uvicorn

    from service import api, connections
    from service.events import Streams
    from service.guard import HEADERS, Guard
    from service.validation import Limits

    streams = Streams(queue, settings.queue_size)
    limits = Limits(settings.max_images, settings.max_prompt_characters)
    routes = api.build(queue.loaded, queue, streams, limits)
    application = Guard(routes, settings.host, settings.allowed_host, settings.token, settings.root_path)
    connections.allow_files()

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


if __name__ == "__main__":
    main()
