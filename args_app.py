"""The flags of app.py."""

import argparse
import ipaddress
import os
import re
from typing import List, Optional

from utils.command_line import (
    COUNT,
    Parser,
    check_vqgan_files,
    machine_flags,
    number,
    parse,
    vqgan_file_flags,
    window_flag,
)


def app_parser() -> Parser:
    """Return the parser of app.py's flags."""
    parser = Parser("Serves a web page and an HTTP API that generate images for prompts; see requirements-app.txt.")
    add = parser.heading("Model")
    add("dalle-path", None, "checkpoint of train.py; default: the bundled model")
    machine_flags(parser)
    add = parser.heading("Network")
    add("host", "127.0.0.1", "address; 0.0.0.0 serves other machines, too")
    add("port", 7860, "port; 0: a free one", number(int, low=0, high=65535))
    add("token", None, "secret that clients must know; default: the environment variable MINI_DALLE_TOKEN", token)
    add("allowed-host", [], "further host names that the page is reached by", nargs="+", metavar="NAME")
    add("root-path", "", "prefix under which a reverse proxy serves the page, such as /draw", prefix)
    text = "addresses of proxies whose X-Forwarded headers are believed, with commas between; *: of all"
    add("forwarded-allow-ips", None, text, addresses)
    add = parser.heading("Limits")
    add("max-images", 16, "images per prompt", number(int, low=1, high=256))
    add("max-prompt-characters", 400, "characters per prompt", COUNT)
    add("queue-size", 64, "requests at once; further ones get an error and may try again", COUNT)
    add("batch-size", None, "images generated at once; default: chosen for the machine", COUNT)
    window_flag(add)
    add = parser.heading("Files that the checkpoint lacks")
    add("bpe-path", None, "vocabulary file; default: the checkpoint's, else CLIP's")
    vqgan_file_flags(add)
    return parser


def prefix(text: str) -> str:
    """Parse the path of a URL and return it with a slash before it and none after it; "" and "/" are no prefix."""
    if not re.fullmatch(r"(/?[\w.~-]+)*/?", text, re.ASCII):
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
    """Parse a secret: printable ASCII, since browsers send no other; if an empty one meant none, all could generate."""
    if not text or text != text.strip() or not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("must be ASCII characters, not empty, and without a space at either end")
    return text


def app_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Return the validated namespace of app.py."""
    parser = app_parser()
    settings = parse(parser, argv)
    check_vqgan_files(parser, settings)
    try:
        settings.token = settings.token or token(os.environ["MINI_DALLE_TOKEN"])
    except KeyError:
        pass  # no token is needed
    except argparse.ArgumentTypeError as error:
        parser.error(f"MINI_DALLE_TOKEN: {error}")
    return settings
