"""What somebody asks for → pictures to be drawn, checked in one place for the API and the page.

Errors are ValueErrors with one sentence for the user.
"""

import re
import secrets
import threading
from typing import NamedTuple

from generation.batching import plan_image
from generation.image_prompts import encode_kept_rows
from service import uploads
from service.computing import compute

SEEDS = 2**63
ONE_AT_A_TIME = threading.Lock()  # of pictures that are decoded and encoded, which takes memory


class Limits(NamedTuple):
    """What one request may ask for."""

    max_images: int = 16
    max_prompt_characters: int = 400


def pictures_of(loaded, limits, *, prompt, count=1, seed=None, sampling=None, image=None, keep=0.5):
    """Pictures to be drawn; the i-th one's seed is seed + i. seed None: one by chance.

    image: path or bytes of a picture whose upper rows are kept. keep: rows, or a fraction of them.
    """
    given = None if image is None else codes_of(loaded, image, keep)
    return variants(loaded, limits, prompt=prompt, count=count, seed=seed, sampling=sampling, given=given)


def check_image(image):
    """ValueError, with a sentence, for a path or bytes of what cannot be used as a picture."""
    with ONE_AT_A_TIME:
        uploads.opened(image)


def codes_of(loaded, image, keep):
    """Codes of a picture's upper rows, int64 (n,)."""
    with ONE_AT_A_TIME:
        opened = uploads.opened(image)
        return sentence_of(lambda: compute(encode_kept_rows, loaded, opened, keep))


def variants(loaded, limits, *, prompt, count=1, seed=None, sampling=None, given=None):
    """pictures_of() with codes in place of a picture."""
    if len(prompt) > limits.max_prompt_characters:
        raise ValueError(
            f"The prompt has {len(prompt)} characters; at most {limits.max_prompt_characters} are accepted."
        )
    prompt = " ".join(prompt.split())
    if not prompt:
        raise ValueError("The prompt is empty; write what the picture should show.")
    if not 1 <= count <= limits.max_images:
        raise ValueError(f"{count} pictures are asked for; from 1 to {limits.max_images} can be drawn at once.")
    if seed is None:
        seed = secrets.randbelow(2**31)
    if not 0 <= seed < SEEDS - limits.max_images:
        raise ValueError(f"The seed is {seed}; it must be a whole number from 0 to {SEEDS - limits.max_images - 1}.")
    first = sentence_of(lambda: plan_image(loaded, prompt, seed, sampling, given))
    return [first._replace(seed=seed + i) for i in range(count)]


def sentence_of(call):
    """What call() returns; its ValueError as a sentence, with a capital and a full stop."""
    try:
        return call()
    except ValueError as error:
        raise ValueError(sentence(str(error))) from None


def sentence(text):
    """A message with a capital, unless it begins with a setting's name, and a full stop."""
    text = " ".join(text.split())
    begin = text[:1].upper() if re.match(r"[a-z]+[ ,]", text) else text[:1]
    return begin + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
