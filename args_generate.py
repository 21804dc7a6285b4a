"""The flags of generate.py → one validated namespace; of the same parts as those in args.py, and as light to import."""

import argparse
import sys

from args import COUNT, SEED, check_vqgan_files, machine_flags, sampling_flags, vqgan_file_flags
from utils.command_line import Parser, number, parse


def auto_or_count(text):
    """A type for argparse: auto → None, or a whole number."""
    return None if text == "auto" else COUNT(text)


def rows(text):
    """A type for argparse: a number of rows from 1 on, or a fraction below 1."""
    value = number(float, above=0)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of rows nor a fraction below 1")
    return value


def generate_parser():
    parser = Parser(
        "Draws pictures for prompts with a trained DALL-E; without --dalle_path with a small one that comes along."
    )
    add = parser.heading("What to draw")
    add("dalle-path", None, "checkpoint of train.py; none: the demo's, which knows two coloured shapes")
    add("text", None, "prompts, separated by |; - reads them from standard input, one a line")
    add(
        "prompts-file",
        None,
        'prompts, one a line, or a JSON object a line: {"prompt": …, "num_images", "seed", "top_k", …}; - is standard '
        "input",
    )
    add("num-images", 128, "pictures a prompt", COUNT)
    add("outputs-dir", "./outputs", "folder for the pictures; each prompt gets one of its own in it")
    add("format", "jpg", "of the pictures", choices=("jpg", "png"))
    add("gentxt", False, "let the model complete each prompt first", bool)
    add("seed", None, "the same seed gives the same pictures; none: a new one, which is printed", SEED)
    add("batch-size", None, "pictures drawn at once; auto: what the machine does well", auto_or_count, metavar="N")
    add = parser.heading("From a picture")
    add("image-prompt", None, "keep the upper rows of this picture and draw the rest")
    add("keep-rows", 0.5, "how many rows of codes, or which fraction of them, are kept", rows)
    add("variations", None, "the same for a picture that generate.py drew: its own prompt is taken, unless --text is")
    add = parser.heading("The best of several")
    add("rank", 1, "draw so many times --num_images, and keep those that fit their prompt best", COUNT)
    add("clip-weights", None, "let CLIP judge, by these weights of --clip-model; none: the model itself does")
    add("clip-model", "ViT-B-32", "which of open_clip's models they belong to; OpenAI's own: ViT-B-32-quickgelu")
    add = parser.heading("While pictures form")
    add("preview", None, "write preview.png into the output folder every so many rows", COUNT)
    add("animate", False, "also save how the pictures form, as forming.webp", bool)
    sampling_flags(parser.heading("How to draw (none: what the checkpoint recommends)"))
    machine_flags(parser)
    add = parser.heading("Files that the checkpoint does not bring along")
    add("bpe-path", None, "YouTokenToMe vocabulary; none: the checkpoint's, else CLIP's")
    vqgan_file_flags(add)
    return parser


def generate_arguments(argv=None):
    """The namespace of generate.py; `requests` holds what is to be drawn (generation/prompts.py)."""
    from generation import prompts

    parser = generate_parser()
    settings = parse(parser, argv)
    if settings.text == "-":
        settings.text, settings.prompts_file = None, settings.prompts_file or "-"
    if settings.text is not None and settings.prompts_file:
        parser.error("argument --prompts-file: --text gives prompts already; give one of them")
    if settings.variations and settings.image_prompt:
        parser.error("argument --variations: --image-prompt names a picture already; give one of them")
    settings.requests = None
    try:
        if settings.text is not None:
            settings.requests = prompts.read_requests(text=settings.text)
        elif settings.prompts_file or not (settings.variations or sys.stdin is None or sys.stdin.isatty()):
            settings.requests = prompts.read_requests(file=settings.prompts_file or "-")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        if settings.prompts_file:  # else there was no standard input
            parser.error(f"argument --prompts-file: {settings.prompts_file}: {error.strerror}")
    if settings.requests is None and not settings.variations:
        parser.error("argument --text: missing; write what the picture should show, or give --prompts-file")
    check_vqgan_files(parser, settings)
    return settings
