"""Prompts → pictures' codes: what one picture is drawn from, which pictures can share a batch, and drawing a batch.

A picture depends on its own seed, prompt, settings and given codes alone, not on those that it is drawn with. Which
codes come next is models/sampling.py's; ranking, previews and files have modules of their own.
"""

from typing import Dict, NamedTuple

import torch

from generation.loading import DEFAULTS
from models.sampling import check_sampling, complete_text


class ImageSpec(NamedTuple):
    """A picture to be drawn. sampling: all four settings of loading.DEFAULTS."""

    prompt: str
    tokens: torch.Tensor  # int64 (text_seq_len,)
    seed: int
    sampling: Dict
    given_codes: torch.Tensor  # int64 (n,): its first codes, which are kept


def plan_image(loaded, prompt, seed, sampling=None, given_codes=None, tokens=None):
    """A picture to be drawn with a LoadedModel. sampling: settings other than those that the checkpoint recommends.
    tokens: the prompt's tokens, where they are known.

    ValueError, in one sentence, for a prompt that the model cannot read, an unknown setting, one out of its range, or
    guidance of a model that has not learnt it.
    """
    tokens = encode_prompt(loaded, prompt) if tokens is None else tokens
    unknown = sorted(set(sampling or ()) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such setting; there are {', '.join(DEFAULTS)}")
    shaping = {**loaded.recommended, **{key: value for key, value in (sampling or {}).items() if value is not None}}
    check_sampling(**shaping)
    if shaping["cond_scale"] != 1 and not loaded.guidable:
        raise ValueError(
            f"cond_scale is {shaping['cond_scale']}, but {loaded.path} was trained without --caption-dropout, so that "
            "it cannot be guided; leave it at 1"
        )
    given_codes = tokens.new_zeros(0) if given_codes is None else given_codes
    if len(given_codes) >= loaded.model.image_seq_len:
        raise ValueError("the whole picture is kept; keep fewer rows, so that there is something to draw")
    return ImageSpec(prompt, tokens, int(seed), shaping, given_codes)


def encode_prompt(loaded, prompt):
    """Tokens int64 (text_seq_len,); ValueError for a prompt of which nothing is left, or with too many tokens.

    A vocabulary that lacks some of the prompt's characters is given its small letters.
    """
    tokens = loaded.tokenizer.encode(prompt)
    if loaded.tokenizer.unknown in tokens:  # None, where nothing is unknown
        prompt = prompt.lower()
        tokens = loaded.tokenizer.encode(prompt)
    if not loaded.tokenizer.decode(tokens):  # nothing at all, or the token for what is unknown
        raise ValueError(f"'{prompt[:60]}' has no words that the vocabulary knows")
    most = loaded.model.text_seq_len
    if len(tokens) > most:
        raise ValueError(f"'{prompt[:60]}' is {len(tokens)} tokens long, the model reads {most}")
    return loaded.tokenizer.tokenize([prompt], most)[0]


def complete_caption(loaded, prompt, seed):
    """A started caption → (tokens int64 (text_seq_len,), what they say) with the words that the model adds.

    Of the least likely tenth of the words none is taken: captions have been learnt with an eighth of the loss.
    """
    text = encode_prompt(loaded, prompt)
    generator = torch.Generator().manual_seed(seed)
    text = complete_text(loaded.model, text[text != 0][None], top_p=0.9, generator=generator)
    return text[0], " ".join(loaded.tokenizer.decode(text[0]).split())


def batch_key(picture):
    """Pictures with equal ones can share a batch, whatever their prompts and seeds."""
    return tuple(sorted(picture.sampling.items(), key=str)), len(picture.given_codes)


def group_into_batches(pictures, size):
    """Places of pictures in lists of up to `size` that can be drawn together, those that come first first."""
    groups = {}
    for place, one in enumerate(pictures):
        group = groups.setdefault(batch_key(one), [[]])
        if len(group[-1]) == size:
            group.append([])
        group[-1].append(place)
    return sorted((part for group in groups.values() for part in group), key=lambda part: part[0])


def generate_lists(loaded, lists, watcher=lambda pictures: None, drawn=lambda count: None):
    """Lists of pictures → codes int64 (n, L) of each list, in their order, each as soon as it is drawn.

    Pictures of several lists share batches. watcher(pictures) → draw()'s on_code for a batch of them; drawn(count) is
    told of every batch that is done.
    """
    pictures = [(number, one) for number, part in enumerate(lists) for one in part]
    codes, missing, ready = [[] for _ in lists], [len(part) for part in lists], 0
    for places in group_into_batches([one for _, one in pictures], loaded.batch_size):
        batch = [pictures[place][1] for place in places]
        for place, row in zip(places, generate_batch(loaded, batch, watcher(batch))):
            number = pictures[place][0]
            codes[number].append((place, row))
            missing[number] -= 1
        drawn(len(batch))
        while ready < len(lists) and not missing[ready]:
            yield torch.stack([row for _, row in sorted(codes[ready], key=lambda found: found[0])])
            codes[ready] = None
            ready += 1


def generate_batch(loaded, pictures, on_code=None):
    """Codes int64 (B, L) of pictures that go together(), at most loaded.batch_size of them.

    on_code(codes so far, int64 (B, n)) is called after every code, where the machine can; what it raises ends the
    drawing.
    """
    text = torch.stack([one.tokens for one in pictures])
    given = torch.stack([one.given_codes for one in pictures])
    generators = [torch.Generator().manual_seed(one.seed) for one in pictures]
    codes = given if given.shape[1] else None
    return loaded.sampler(text, generator=generators, image_codes=codes, on_code=on_code, **pictures[0].sampling)
