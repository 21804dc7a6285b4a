"""Generate images for prompts with a checkpoint of train.py, or of the reference application.

    python generate.py --text "a small red circle above a large blue square"
    python generate.py --dalle_path output/demo/ckpt/dalle_step_800.pt --text "…" --num_images 16

From Python: load() and generate(). Here are the flags, and the prompts that they give: from --text, a file or standard
input. A prompt file has one prompt on each line, or one JSON object with settings; results.jsonl is such a file. The
work is in generation/command.py; torch is imported only after the flags are read, so that --help is quick.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import log
from utils.command_line import COUNT, SEED, Parser, exit_on_error, number, path
from utils.files import decode_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from generation.loading import LoadedModel

SAMPLING = ("top_k", "top_p", "temperature", "cond_scale")  # models.sampling.Sampling would import torch
KEYS = {"prompt": str, "num_images": int, "seed": int, **dict.fromkeys(SAMPLING, float)}
KEYS.update(image_prompt=str, keep_rows=float)
LINE_BREAK = re.compile(r"\r\n|\r|\n")  # str.splitlines would also cut at U+2028 inside a prompt
LARGEST = 1e300  # a setting is smaller, even if it is a whole number of hundreds of digits
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number"}
RESULT_KEYS = {"file", "checkpoint", "fingerprint", "scores"}  # of results.jsonl, whose lines are one image each


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    settings = generate_arguments(argv)
    log.set_up()
    with exit_on_error():
        from generation.command import run

        run(settings)


def load(dalle_path: Optional[str] = None, **options: Any) -> "LoadedModel":
    """Load a checkpoint, or the bundled one if no path is given; see generation.loading.load for the options."""
    from generation.loading import load

    return load(dalle_path, **options)


def generate(
    loaded: "LoadedModel",
    text: Union[str, Sequence[str]],
    *,
    num_images: int = 1,
    seed: Optional[int] = None,
    rank: int = 1,
    image_prompt: Union[None, str, Path, "Image"] = None,
    keep_rows: float = 0.5,
    watch: Optional[Callable[..., Any]] = None,
    **sampling: Optional[float],
) -> List["Image"]:
    """Generate `num_images` images for a prompt, or for each of a list of prompts.

    Args:
        loaded: what load() returned.
        seed: of the first image of each prompt; None uses a new one. The same seed gives the same image, whatever other
            images are generated with it.
        rank: generate this many times `num_images`, and keep the best.
        image_prompt: a path or image, whose upper rows are kept.
        keep_rows: how many rows of codes to keep, from 1; or which fraction of them, below 1.
        watch: called with the codes so far, int64 (B, n), after every code; see generation.images.generate_batch.
        sampling: top_k, top_p, temperature and cond_scale, to replace the checkpoint's recommended values.

    Returns:
        PIL images: all of the first prompt, then those of the next. They are in the order of their seeds, or the best
        first if rank is above 1. `info` of each has prompt, seed and settings, and scores if rank is above 1.

    Raises:
        ValueError, OSError: a prompt, an image or a setting cannot be used.
    """
    from generation import command, image_prompts, images

    given_codes = None
    if image_prompt is not None:
        given_codes = image_prompts.encode_kept_rows(loaded, image_prompt, keep_rows)
    seed = command.new_seed() if seed is None else seed
    plans = []
    for prompt in [text] if isinstance(text, str) else text:
        plans.append(images.plan_image(loaded, prompt, seed, sampling, given_codes).with_seeds(num_images * rank))
    generated: List["Image"] = []
    for specs, codes in zip(plans, images.generate_lists(loaded, plans, lambda specs: watch)):
        generated += command.finish_images(loaded, specs, codes, num_images)[0]
    return generated


class Request(NamedTuple):
    """Images of one prompt; the flags apply to whatever is None."""

    prompt: str  # "": that of the image of --variations
    num_images: Optional[int] = None
    seed: Optional[int] = None
    image_prompt: Optional[str] = None
    keep_rows: Optional[float] = None
    sampling: Dict[str, Any] = {}  # noqa: RUF012  never changed
    source: str = "--text"  # flag, or file and line, for error messages
    tokens: Optional[Any] = None  # of a completed caption, because its words may be encoded differently


def read_requests(text: Optional[str] = None, file: Optional[str] = None) -> List[Request]:
    """Read requests from --text, separated by |, or from a file, "-" for standard input; ValueError without prompts."""
    if text is not None:
        parts = [" ".join(part.split()) for part in text.split("|")]
        if not all(parts):
            raise ValueError("--text: an empty prompt; write what the image should show, prompts separated by |")
        return [Request(part) for part in parts]
    name = "standard input" if file == "-" else file
    stream = getattr(sys.stdin, "buffer", sys.stdin)  # a text stream would keep the byte order mark
    content = stream.read() if file == "-" else Path(file or "").read_bytes()
    try:
        text = content if isinstance(content, str) else decode_text(content)
    except ValueError:
        raise ValueError(f"{name}: not UTF-8 text; write one prompt on each line") from None
    numbered = [(number, line) for number, line in enumerate(LINE_BREAK.split(text), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{name}: no prompts in it; write one on each line")
    return [parse_line(line, f"{name}, line {number}") for number, line in numbered]


def parse_line(line: str, source: str) -> Request:
    """Return the request of one line: a JSON object if it begins with {, otherwise a prompt."""
    if not line.lstrip().startswith("{"):
        return Request(" ".join(line.split()), source=source)
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{source}: not a JSON object") from None
    if "file" in entry:
        entry.setdefault("num_images", 1)
        entry.setdefault("keep_rows", entry.pop("kept_rows", None))
    entry = {key: value for key, value in entry.items() if value is not None and key not in RESULT_KEYS}
    if "text" in entry and "prompt" not in entry:
        entry["prompt"] = entry.pop("text")
    for key, value in entry.items():
        if key not in KEYS:
            raise ValueError(f"{source}: {key}: unknown key; choose from {', '.join(KEYS)}")
        fits = isinstance(value, (int, float) if KEYS[key] is float else KEYS[key]) and not isinstance(value, bool)
        if not fits or (KEYS[key] is float and not abs(value) < LARGEST):
            raise ValueError(f"{source}: {key} is {json.dumps(value)[:40]}, not {TYPE_NAMES[KEYS[key]]}")
    prompt = " ".join(entry.pop("prompt", "").split())
    if not prompt:
        raise ValueError(f'{source}: no prompt; write {{"prompt": "…"}}')
    for key, least in (("num_images", 1), ("seed", 0)):
        if not least <= entry.get(key, least) < 2**63:
            problem = f"{least} or more" if entry[key] < least else "below 2^63"
            raise ValueError(f"{source}: {key} is {str(entry[key])[:40]}; it must be {problem}")
    sampling = {key: entry.pop(key) for key in SAMPLING if key in entry}
    return Request(prompt, sampling=sampling, source=source, **entry)


def auto_or_count(text: str) -> Optional[int]:
    return None if text == "auto" else COUNT(text)


def rows(text: str) -> float:
    """Parse a number of rows of at least 1, or a fraction below 1."""
    value = number(float, above=0)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of rows nor a fraction below 1")
    return value


def generate_parser() -> Parser:
    parser = Parser("Generate images for prompts with a trained DALL-E; without --dalle_path, with the bundled one.")
    add = parser.heading("What to generate")
    add("dalle-path", None, "checkpoint of train.py; default: the bundled model, which knows 322 everyday things", path)
    add("text", None, "prompts, separated by |; - reads them from standard input, one per line", metavar="TEXT")
    add(
        "prompts-file",
        None,
        'file with one prompt per line, or one JSON object: {"prompt": …, "num_images", "seed", "top_k", …}; - is '
        "standard input",
        path,
    )
    add("num-images", 4, "images per prompt; a line of results.jsonl is one image", COUNT)
    add("outputs-dir", "./outputs", "folder for the images; each prompt gets a folder in it", path)
    add("format", "jpg", "file format of the images", choices=("jpg", "png"))
    add("gentxt", False, "let the model complete each prompt first", bool)
    add("seed", None, "the same seed gives the same images; default: a new one, which is logged", SEED)
    add("batch-size", None, "images generated at once; auto: what suits the machine", auto_or_count, metavar="N")
    parser.window_flag(add)
    add = parser.heading("Start from an image")
    add("image-prompt", None, "keep the upper rows of this image and generate the rest", path)
    add("keep-rows", 0.5, "number of rows of codes to keep, or the fraction of them", rows, metavar="X")
    add(
        "variations",
        None,
        "like --image-prompt, for an image of generate.py; without --text, with its prompt",
        path,
    )
    add = parser.heading("Keep the best")
    add("rank", 1, "generate N times --num_images and keep those that fit their prompt best", COUNT)
    add("clip-weights", None, "weights of --clip-model, which then chooses; default: the model itself chooses", path)
    add("clip-model", "ViT-B-32", "the model of open_clip that --clip-weights is for; OpenAI's own: ViT-B-32-quickgelu")
    add = parser.heading("Show images while they form")
    add("preview", None, "write preview.png into the output folder every N rows", COUNT)
    add("animate", False, "also save how the images form, as forming.webp", bool)
    parser.sampling_flags("Sampling (default: what the checkpoint recommends)")
    parser.machine_flags()
    add = parser.heading("Files that a checkpoint may lack")
    add("bpe-path", None, "vocabulary file; default: the checkpoint's, else CLIP's", path)
    parser.vqgan_file_flags(add)
    return parser


def generate_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse generate.py's flags; `requests` of the result is what to generate."""
    parser = generate_parser()
    settings = parser.parse(argv)
    if settings.text == "-":
        settings.text, settings.prompts_file = None, settings.prompts_file or "-"
    if settings.text is not None and settings.prompts_file:
        parser.refuse("prompts-file", "--text gives prompts already; give one of them")
    if settings.variations and settings.image_prompt:
        parser.refuse("variations", "--image-prompt names an image already; give one of them")
    settings.requests = None
    try:
        if settings.text is not None:
            settings.requests = read_requests(text=settings.text)
        elif settings.prompts_file or not (settings.variations or sys.stdin is None or sys.stdin.isatty()):
            settings.requests = read_requests(file=settings.prompts_file or "-")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        if settings.prompts_file:  # else there was no standard input
            parser.refuse("prompts-file", f"{settings.prompts_file}: {error.strerror}")
    if settings.requests is None and not settings.variations:
        parser.refuse("text", "missing; write what the image should show, or give --prompts-file")
    settings.requests = settings.requests or [Request("")]
    parser.check_vqgan_files(settings)
    return settings


if __name__ == "__main__":
    main()
