"""What is to be drawn, from the command line, a file or standard input → requests; no model is needed for it.

A file has one prompt a line, or one JSON object a line with settings of its own (`results.jsonl` is such a file).
"""

import json
import math
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from data.words import split_words

NUMBERS = ("top_k", "top_p", "temperature", "cond_scale")
KEYS = {"prompt": str, "num_images": int, "seed": int, **dict.fromkeys(NUMBERS, float)}
KEYS.update(image_prompt=str, keep_rows=float)
# Of a line of results.jsonl, what says nothing about the next picture.
IGNORED = {"file", "checkpoint", "fingerprint", "scores", "kept_rows"}


class Request(NamedTuple):
    """Pictures of one prompt. None: as the flags say."""

    prompt: str
    num_images: Optional[int] = None
    seed: Optional[int] = None
    image_prompt: Optional[str] = None
    keep_rows: Optional[float] = None
    sampling: Dict = {}  # noqa: RUF012  no request changes it
    where: str = "--text"
    tokens: Optional[object] = None  # of a completed caption, whose words need not give the same ones again


def read_requests(text=None, file=None):
    """Requests of --text (parts between |) or of a file, - for standard input. ValueError or OSError in one line."""
    if text is not None:
        return [Request(prompt) for prompt in split_prompts(text, "--text")]
    name = "standard input" if file == "-" else file
    try:
        lines = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8 text; give one prompt a line") from None
    found = [
        parse_line(line, f"{name}, line {number}") for number, line in enumerate(lines.splitlines(), 1) if line.strip()
    ]
    if not found:
        raise ValueError(f"{name}: no prompts in it; give one a line")
    return found


def split_prompts(text, where):
    parts = [" ".join(part.split()) for part in text.split("|")]
    if not all(parts):
        raise ValueError(f"{where}: an empty prompt; write what the picture should show, prompts separated by |")
    return parts


def parse_line(line, where):
    """A Request of one line: JSON where it begins with {, else a prompt."""
    if not line.lstrip().startswith("{"):
        return Request(" ".join(line.split()), where=where)
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not a JSON object") from None
    said = {key: value for key, value in said.items() if value is not None and key not in IGNORED}
    if "text" in said and "prompt" not in said:
        said["prompt"] = said.pop("text")
    for key, value in said.items():
        if key not in KEYS:
            raise ValueError(f"{where}: {key}: no such key; there are {', '.join(KEYS)}")
        fits = isinstance(value, (int, float) if KEYS[key] is float else KEYS[key]) and not isinstance(value, bool)
        if not fits or (KEYS[key] is float and not math.isfinite(value)):
            raise ValueError(f"{where}: {key} is {json.dumps(value)}, not {NAMES[KEYS[key]]}")
    prompt = " ".join(said.get("prompt", "").split())
    if not prompt:
        raise ValueError(f'{where}: no prompt; give {{"prompt": "…"}}')
    for key, least in (("num_images", 1), ("seed", 0)):
        if not least <= said.get(key, least) < 2**63:
            raise ValueError(f"{where}: {key} is {said[key]}; it must be {least} or more")
    rest = {key: said.get(key) for key in ("num_images", "seed", "image_prompt", "keep_rows")}
    return Request(prompt, sampling={key: said[key] for key in NUMBERS if key in said}, where=where, **rest)


def unknown_words(loaded, prompt: str) -> List[str]:
    """Return a prompt's words that no training caption has; none if the checkpoint does not keep their words."""
    return [word for word in dict.fromkeys(split_words(prompt)) if loaded.words and word not in loaded.words]


NAMES = {str: "text", int: "a whole number", float: "a number"}
