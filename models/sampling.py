"""From text tokens to image codes: filtering of logits and the generation loop with its key/value cache.

Knows nothing of files, prompts or pixels; a VQGAN's decode makes pictures of what comes back. generate_codes_naive
runs the whole sequence for every code and stays as the oracle of the cached loop.
"""

import torch
from torch.nn import functional as F


def keep_top_k(logits, count):
    """All but the `count` largest of the last dimension set to −inf."""
    if count >= logits.shape[-1]:
        return logits
    least = logits.topk(count, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits, mass):
    """The fewest largest logits whose probabilities add up to `mass`, the rest −inf (nucleus sampling, arXiv
    1904.09751).
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    before = F.softmax(ordered, dim=-1).cumsum(dim=-1) - F.softmax(ordered, dim=-1)
    ordered = ordered.masked_fill(before >= mass, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def top_k_count(top_k, num_tokens):
    """How many codes a top_k keeps. Up to 1 it is a fraction: the best (1 − top_k) of text and image vocabulary
    together, one at least. Above 1 it is their number.
    """
    if top_k > 1:
        return int(top_k)
    return max(int((1 - top_k) * num_tokens), 1)


def gumbel_noise(batch, length, num_codes, generator, device):
    """Noise for all codes of `batch` pictures, (B, L, V) fp32; argmax(logits + noise) then draws from softmax(logits).

    generator: a torch.Generator, or a list of one a picture (a picture then does not depend on its batch), or None.
    Drawn before the first step, so that a picture depends on its generator alone and any loop over positions gives the
    same.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} pictures; one a picture is needed")
        return torch.cat([gumbel_noise(1, length, num_codes, one, device) for one in generator])
    where = device if generator is None else generator.device
    uniform = torch.rand(batch, length, num_codes, generator=generator, device=where).to(device)
    tiny = torch.finfo(torch.float32).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def check_sampling(top_k, top_p, temperature, cond_scale):
    """ValueError in one line for a setting out of its range."""
    if top_k is not None and not (0 <= top_k <= 1 or (1 < top_k < float("inf") and top_k == int(top_k))):
        raise ValueError(
            f"top_k is {top_k}; it is the fraction of the vocabulary that is cut, from 0 (none) to 1, or a whole "
            "number of codes that are kept"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is the probability that is kept, above 0 and up to 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if not 0 <= cond_scale < float("inf"):
        raise ValueError(f"cond_scale is {cond_scale}; 1 is no guidance, above 1 follows the text more closely")


def choose_code(logits, noise, *, top_k, top_p, temperature, cond_scale, num_tokens):
    """One code a picture: logits (B or 2B, V), noise (B, V) → int64 (B,).

    With guidance (arXiv 2207.12598) the first half of logits saw the caption and the second half an empty one.
    """
    logits = logits.float()
    if cond_scale != 1:
        told, untold = logits.chunk(2)
        logits = untold + cond_scale * (told - untold)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k_count(top_k, num_tokens))
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return (logits + noise).argmax(-1)


@torch.no_grad()
def generate_codes(
    dalle,
    text,
    *,
    top_k=0.99,
    top_p=None,
    temperature=1.0,
    cond_scale=1.0,
    generator=None,
    image_codes=None,
    on_code=None,
):
    """Draw pictures for text tokens int64 (B, text_seq_len), 0 = padding → codes int64 (B, image_seq_len).

    top_k: fraction of text + image vocabulary that is cut, or number kept (see top_k_count), None for all. top_p:
    probability that is kept, None for all. cond_scale: classifier-free guidance against an empty caption, both branches
    in one batch. generator: see gumbel_noise. image_codes int64 (B, n): the first n codes are given and kept.
    on_code(codes so far, (B, n)) is called after every code; what it raises ends the drawing. ValueError for a setting
    out of its range.

    Text and given codes pass through the model once; every further code is one position. Dropout is off while drawing,
    and the model's mode is put back afterwards.
    """
    shape = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "cond_scale": cond_scale}
    given = {"generator": generator, "image_codes": image_codes, "on_code": on_code}
    return sample_codes(dalle, text, _cached_logits, **given, **shape)


@torch.no_grad()
def generate_codes_naive(
    dalle, text, *, top_k=0.99, top_p=None, temperature=1.0, cond_scale=1.0, generator=None, image_codes=None
):
    """generate_codes without a cache, a whole pass a code: the same codes for the same generator, slowly."""
    shape = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "cond_scale": cond_scale}
    return sample_codes(dalle, text, _full_logits, generator=generator, image_codes=image_codes, **shape)


def check_given_codes(dalle, text, image_codes):
    """image_codes, or none at all: int64 (B, 0). ValueError where they do not go with `text`."""
    codes = text.new_zeros(len(text), 0) if image_codes is None else image_codes
    if codes.shape[1] > dalle.image_seq_len or len(codes) != len(text):
        raise ValueError(
            f"image_codes is {tuple(codes.shape)}; wanted are {len(text)} rows of at most {dalle.image_seq_len} codes"
        )
    return codes


def sample_codes(
    dalle, text, logits_of, *, top_k, top_p, temperature, cond_scale, generator, image_codes, on_code=None
):
    """The loop over codes; logits_of(dalle, text, codes so far, cache) → logits (B, V) of the next one."""
    check_sampling(top_k, top_p, temperature, cond_scale)
    codes = check_given_codes(dalle, text, image_codes)
    noise = gumbel_noise(len(text), dalle.image_seq_len, dalle.num_image_tokens, generator, text.device)
    guided = cond_scale != 1
    branches = torch.cat((text, torch.zeros_like(text))) if guided else text
    cache = dalle.transformer.new_cache(dalle.text_seq_len + dalle.image_seq_len)

    was_training = dalle.training
    dalle.eval()
    try:
        for place in range(codes.shape[1], dalle.image_seq_len):
            seen = codes.repeat(2, 1) if guided else codes
            logits = logits_of(dalle, branches, seen, cache)
            code = choose_code(
                logits,
                noise[:, place],
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                cond_scale=cond_scale,
                num_tokens=dalle.num_tokens,
            )
            codes = torch.cat((codes, code[:, None]), dim=1)
            if on_code is not None:
                on_code(codes)
    finally:
        dalle.train(was_training)
    return codes


def _cached_logits(dalle, text, codes, cache):
    """What the cache has not seen yet, one position but for the first call → logits of the next code."""
    count = codes.shape[1]
    if cache[0].keys is None:
        start = 0
        x = dalle.embed_text(dalle.number_padding(text))
        if count:
            x = torch.cat((x, dalle.embed_codes(codes)), dim=1)
    else:
        start = dalle.text_seq_len + count
        x = dalle.embed_codes(codes[:, -1:], start=count - 1)
    x = dalle.transformer(x, cache=cache, start=start)
    return dalle.image_logits(x[:, -1])


def _full_logits(dalle, text, codes, cache):
    return dalle(text, codes if codes.shape[1] else None)[:, -1, dalle.num_text_tokens :]


@torch.no_grad()
def complete_text(dalle, tokens, *, top_p=None, temperature=1.0, generator=None):
    """Continue a caption: int64 (1, n) tokens → int64 (1, text_seq_len), 0 from where the model ends it. top_p: as in
    generate_codes.
    """
    was_training = dalle.training
    dalle.eval()
    first_padding = dalle.num_text_tokens - dalle.text_seq_len
    try:
        for place in range(tokens.shape[1], dalle.text_seq_len):
            seen = F.pad(tokens, (0, dalle.text_seq_len - place))
            x = dalle.transformer(dalle.embed_text(dalle.number_padding(seen))[:, : place + 1])
            logits = dalle.text_logits(x[:, -1]).float() / temperature  # (1, num_text_tokens)
            logits[:, 0] = float("-inf")  # 0 is padding in a caption; its position's own id says so
            logits = logits if top_p is None else keep_top_p(logits, top_p)
            noise = gumbel_noise(1, 1, dalle.num_text_tokens, generator, tokens.device)[:, 0]
            token = (logits + noise).argmax(-1)
            if int(token) >= first_padding:
                break
            tokens = torch.cat((tokens, token[:, None]), dim=1)
    finally:
        dalle.train(was_training)
    return F.pad(tokens, (0, dalle.text_seq_len - tokens.shape[1]))
