"""A local web page and HTTP API that draw pictures for prompts.

python app.py --dalle_path output/demo/ckpt/dalle_step_800.pt
"""

import contextlib
import os
import socket
import tempfile

import log
from args_app import app_arguments

NO_NETWORK = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def main(argv=None):
    settings = app_arguments(argv)
    log.set_up()
    stopping = contextlib.ExitStack()
    with log.exit_on_interrupt(), log.sigterm_as_ctrl_c(), log.exit_on_bad_input(), stopping:
        os.environ.update(NO_NETWORK)  # before Gradio is imported
        os.environ["GRADIO_TEMP_DIR"] = stopping.enter_context(tempfile.TemporaryDirectory(prefix="mini-dalle-"))
        listening = stopping.enter_context(listen(settings.host, settings.port))
        need_gradio()
        from generation.loading import load_from_flags
        from service.computing import compute
        from service.requests import Limits

        loaded = compute(load_from_flags, settings)
        limits = Limits(settings.max_images, settings.max_prompt_characters)
        server = serving(loaded, limits, settings.queue_size)
        host, port = listening.getsockname()[:2]
        print(
            f"http://{f'[{host}]' if ':' in host else host}:{port} draws with {loaded.path}; Ctrl-C ends it", flush=True
        )
        server.run(sockets=[listening])


def need_gradio():
    """ValueError, in one line, where what the page needs is not installed."""
    try:
        import gradio  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is missing; pip install -r requirements-app.txt brings it (Python 3.10 on)"
        ) from None


def listen(host, port):
    """A socket that is bound; ValueError, in one line, where it cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {log.describe_error(error)}; give others") from None
    return listening


def serving(loaded, limits, queue_size):
    """A uvicorn.Server of page and API; it draws while it runs."""
    import uvicorn

    from service import api, page
    from service.queue import DrawingQueue

    queue = DrawingQueue(loaded, queue_size)
    application = api.build(loaded, queue, limits)
    page.mount(application, loaded, queue, limits)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            queue.give_up()  # so that whoever waits for pictures is told, and not waited for
            super().handle_exit(sig, frame)

        async def serve(self, sockets=None):
            queue.start()
            try:
                await super().serve(sockets)
            finally:
                queue.stop()

    # Pages hold connections open for as long as they are open: they are not waited for.
    quiet = {"log_level": "critical", "access_log": False, "timeout_graceful_shutdown": 1}
    return Server(uvicorn.Config(application, lifespan="on", **quiet))


if __name__ == "__main__":
    main()
