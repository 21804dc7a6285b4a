"""Sampling of image codes: the settings, the choice of one code, and the loop over the codes of an image.

What differs between machines is how the logits of the next codes are computed; a Stepper does that. Nothing here knows
of prompts, files or pixels.
"""

import contextlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.dalle import DALLE

Generators = Union[None, torch.Generator, List[torch.Generator]]
CodeCallback = Callable[[Tensor], Any]


class Sampling(NamedTuple):
    """How a code is chosen from logits. The defaults are those of DALLE-pytorch.

    Attributes:
        top_k: up to 1, the fraction of the text and image vocabulary to drop; above 1, the number of codes to keep;
            None keeps all.
        top_p: probability to keep, above 0 and up to 1 (nucleus sampling); None keeps all.
        temperature: divides the logits; above 0.
        cond_scale: strength of classifier-free guidance against an empty caption; 1 is off.
    """

    top_k: Optional[float] = 0.99
    top_p: Optional[float] = None
    temperature: float = 1.0
    cond_scale: float = 1.0

    @property
    def is_guided(self) -> bool:
        return self.cond_scale != 1

    def override(self, settings: Mapping[str, Any]) -> "Sampling":
        """Return a copy with the values of `settings` that are not None; other keys of it are ignored."""
        return self._replace(**{name: settings[name] for name in self._fields if settings.get(name) is not None})

    def check(self) -> None:
        """Raise ValueError, in one line, if a setting is out of its range."""
        top_k, top_p, temperature, cond_scale = self
        if top_k is not None and not (0 <= top_k <= 1 or (1 < top_k < float("inf") and top_k == int(top_k))):
            raise ValueError(
                f"top_k is {top_k}; it must be a fraction of the vocabulary to drop, from 0 (none) to 1, or a whole "
                "number of codes to keep"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be a probability to keep, above 0 and up to 1")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if not 0 <= cond_scale < float("inf"):
            raise ValueError(f"cond_scale is {cond_scale}; 1 is no guidance, above 1 follows the text more closely")

    def codes_to_keep(self, num_tokens: int) -> Optional[int]:
        """Return how many codes top_k keeps of those of an image, with `num_tokens` of text and image; None: all."""
        if self.top_k is None or self.top_k > 1:
            return None if self.top_k is None else int(self.top_k)
        return max(int((1 - self.top_k) * num_tokens), 1)

    def choose(self, logits: Tensor, noise: Tensor, num_tokens: int) -> Tensor:
        """Choose one code for each image, or for each of several places.

        Args:
            logits: (B, …, V), see `packed_sampler.guide`.
            noise: Gumbel noise (B, …, V).
            num_tokens: size of the text and image vocabulary together.

        Returns:
            int64 (B, …).
        """
        logits = logits.float() / self.temperature
        count = self.codes_to_keep(num_tokens)
        if count is not None:
            logits = keep_top_k(logits, count)
        if self.top_p is None:
            return (logits + noise).argmax(-1)
        if logits.is_cuda:  # whose host must not wait
            return (keep_top_p(logits, self.top_p) + noise).argmax(-1)
        return choose_from_nucleus(logits, noise, self.top_p)


class SamplingState(NamedTuple):
    """What a batch has so far; a pass changes the tensors in place.

    Attributes:
        codes: int64 (B, 2L), the codes that each image has, and guesses of further ones.
        places: int64 (B,), how many codes each image has.
        noise: Gumbel noise, float32 (B, L, V).
        images: int64 (B,), the number of the image in each row.
    """

    codes: Tensor
    places: Tensor
    noise: Tensor
    images: Tensor


def settle(state: SamplingState, logits: Tensor, sampling: Sampling, num_tokens: int) -> Tensor:
    """Choose the codes of a window from logits (B, w, V), and add those that are certain.

    Returns:
        What Stepper.advance does.
    """
    codes, places, noise, _ = state
    length, window = noise.shape[1], logits.shape[1]
    ahead = places[:, None] + torch.arange(window, device=places.device)  # (B, w)
    images = torch.arange(len(places), device=places.device)[:, None]
    answers = sampling.choose(logits, noise[images, ahead.clamp(max=length - 1)], num_tokens)
    guesses = codes.gather(1, ahead[:, :-1])
    add_answers(state, answers)
    confirmed = (guesses == answers[:, :-1]).cumprod(1).sum(1)
    possible = (length - places).clamp(max=window)
    accepted = torch.minimum(confirmed + 1, possible)
    places += accepted
    return torch.stack((places, (accepted - 1).clamp(min=0), (accepted < possible).long()))


class Stepper:
    """Computes the logits of one window of codes after another, for one batch at a time.

    Args:
        dalle: the model, in eval mode.

    Attributes:
        settle: the end of a pass; backends/native/gpu_sampler.py sets an equivalent in fewer kernels.
    """

    settle = staticmethod(settle)
    passes_ahead = 0  # passes that wait while the outcome of one before them is read; some may be in vain

    def __init__(self, dalle: DALLE):
        self.dalle = dalle

    def noise(self, batch: int, generator: Generators) -> Tensor:
        """Return gumbel_noise for a batch of images, on the model's device."""
        dalle, device = self.dalle, self.dalle.text_emb.weight.device
        return gumbel_noise(batch, dalle.image_seq_len, dalle.num_image_tokens, generator, device)

    def begin(self, text: Tensor, codes: Tensor, cond_scale: float = 1.0) -> Tensor:
        """Read text int64 (R, T) and codes int64 (R, n), n ≥ 0; return the logits (B, V) of the next code.

        Args:
            cond_scale: the strength of guidance. R is B for 1, and else 2B; see `packed_sampler.guide`.
        """
        raise NotImplementedError

    def next(self, codes: Tensor, places: Tensor, cond_scale: float = 1.0) -> Tensor:
        """Compute the logits of the place after each code of a window.

        Args:
            codes: int64 (R, w). They replace what earlier calls got for these places.
            places: int64 (R, w), adjacent ones in each row.
            cond_scale: see `begin`.

        Returns:
            (B, w, V); for places past the end of the image they mean nothing.
        """
        raise NotImplementedError

    def hold(self, state: SamplingState) -> SamplingState:
        """Return a new batch's state, copied into fixed buffers if `advance` needs them."""
        return state

    def release(self, state: SamplingState) -> SamplingState:
        """Move complete images to the last rows and return a view of the others, or leave the state as it is."""
        return state

    def advance(self, state: SamplingState, sampling: Sampling, window: int) -> Any:
        """Compute a window of each image in one pass, and add the codes that are certain.

        Returns:
            int64 (3, B), or what has its tolist(): how many codes each image has, how many of its guesses were right,
            and whether one was wrong (1).
        """
        copies = 2 if sampling.is_guided else 1
        inputs = state.places[:, None] - 1 + torch.arange(window, device=state.places.device)  # (B, w)
        guesses = state.codes.gather(1, inputs)  # the first is certain
        codes, places = (x if copies == 1 else x.repeat_interleave(copies, 0) for x in (guesses, inputs))
        return self.settle(state, self.next(codes, places, sampling.cond_scale), sampling, self.dalle.num_tokens)

    def time_windows(self, state: SamplingState, sampling: Sampling) -> Dict[int, float]:
        """Return the seconds of `advance` for each window to choose from. The state stays as it is."""
        return {1: 1.0}


def add_answers(state: SamplingState, answers: Tensor) -> None:
    """Write answers int64 (B, w) after the codes that each image has; the last one is the guess of what follows."""
    ahead = torch.arange(state.noise.shape[1], device=answers.device)
    answers = answers[:, ahead.clamp(max=answers.shape[1] - 1)]
    state.codes.scatter_(1, state.places[:, None] + ahead, answers)


class Pace:
    """Chooses the window of each pass: the one that promises the most codes per second.

    Args:
        seconds: the time of a pass with all images of the batch, for each window.
    """

    def __init__(self, seconds: Dict[int, float]):
        self.seconds = seconds
        # Right and wrong guesses of each window, 3 and 1 at the start. A larger window is right more often, because it
        # continues from answers of earlier passes.
        self.guesses = {window: [3.0, 1.0] for window in seconds}

    def window(self, share: float = 1.0) -> int:
        """Return the window of the next pass, as if each guess in it were right with the same probability.

        Args:
            share: fraction of the batch's images that are incomplete. A pass takes as long as one over all images
                with as many codes in all.
        """
        codes = [window * share for window in self.seconds]
        seconds = np.interp(codes, [*self.seconds], [*self.seconds.values()])
        return max(zip(self.seconds, seconds), key=lambda pair: self.promised_codes(pair[0]) / pair[1])[0]

    def promised_codes(self, window: int) -> float:
        """Return how many codes of an image a pass will probably add."""
        right, wrong = self.guesses[window]
        return sum((right / (right + wrong)) ** guess for guess in range(window))

    def record(self, window: int, right: int, wrong: int) -> None:
        """Learn from a pass how many guesses were right and how many images had a wrong one, which hides the rest."""
        self.guesses[window][0] += right
        self.guesses[window][1] += wrong


@torch.no_grad()
def sample_codes(
    dalle: DALLE,
    text: Tensor,
    stepper: Stepper,
    sampling: Sampling = Sampling(),
    generator: Generators = None,
    image_codes: Optional[Tensor] = None,
    on_code: Optional[CodeCallback] = None,
) -> Tensor:
    """Sample the codes of one image for each caption.

    This is Jacobi decoding (arXiv 2410.01699). A pass reads the last certain code and guesses of the w − 1 codes after
    it, and samples w codes. The noise of each place is fixed, so a guess that equals its sampled code is certain, and
    so is the first sampled code that differs; the others are the guesses of the next pass. A window w of 1 has no
    guesses. Each image advances at its own pace, and leaves the batch when it is complete.

    Args:
        text: tokens, int64 (B, text_seq_len), 0 = padding.
        stepper: computes the logits. With guidance it gets an empty caption after each caption.
        generator: see gumbel_noise.
        image_codes: int64 (B, n), the first n codes of each image, which are kept.
        on_code: called with all codes so far, int64 (B, n), after each code that all images have. If it raises,
            sampling ends.

    Returns:
        int64 (B, image_seq_len).

    Raises:
        ValueError: a setting is out of its range, or image_codes has the wrong shape.
    """
    sampling.check()
    given = check_given_codes(dalle, text, image_codes)
    count, length = given.shape[1], dalle.image_seq_len
    noise = stepper.noise(len(text), generator)
    if count == length:
        return given
    copies = 2 if sampling.is_guided else 1
    branches = torch.stack((text, torch.zeros_like(text))[:copies], dim=1).flatten(0, 1)
    codes = F.pad(given, (0, 2 * length - count))  # a window may reach past the end
    images = torch.arange(len(text), device=text.device)
    whole = SamplingState(codes, torch.full((len(text),), count, device=text.device), noise, images)
    pace, passes = None, deque()  # type: ignore[var-annotated]
    with evaluation_mode(dalle):
        logits = stepper.begin(branches, given.repeat_interleave(copies, 0), sampling.cond_scale)
        state = whole = stepper.hold(whole)
        add_answers(state, sampling.choose(logits, state.noise[:, count], dalle.num_tokens)[:, None])
        state.places.add_(1)
        complete = count + 1
        while True:
            if on_code is not None or complete == length:
                codes = whole.codes[whole.images.argsort()]
            while count < complete:
                count += 1
                if on_code is not None:
                    on_code(codes[:, :count])
            if complete == length:
                return codes[:, :length]
            if pace is None:
                pace = Pace(stepper.time_windows(state, sampling))
            state = stepper.release(state)
            window = pace.window(len(state.places) / len(text))
            is_enough = complete + len(passes) == length  # each pass adds a code or more
            if not is_enough:
                passes.append((window, stepper.advance(state, sampling, min(window, length - complete))))
            if is_enough or len(passes) > stepper.passes_ahead or on_code is not None:
                window, outcome = passes.popleft()
                places, right, wrong = outcome.tolist()
                complete = min(places)
                pace.record(window, sum(right), sum(wrong))


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off within this block, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_given_codes(dalle: DALLE, text: Tensor, image_codes: Optional[Tensor]) -> Tensor:
    """Return image_codes, or int64 (B, 0) for None; raise ValueError if they do not fit the text or the model."""
    if image_codes is None:
        return text.new_zeros(len(text), 0)
    if image_codes.shape[1] > dalle.image_seq_len or len(image_codes) != len(text):
        raise ValueError(
            f"image_codes has shape {tuple(image_codes.shape)}; it must have {len(text)} rows of at most "
            f"{dalle.image_seq_len} codes"
        )
    return image_codes


def gumbel_noise(
    batch: int, length: int, num_codes: int, generator: Generators, device: Union[str, torch.device]
) -> Tensor:
    """Generate Gumbel noise for all codes of all images; argmax(logits + noise) then samples from softmax(logits).

    The noise is complete before the first step, so that an image depends on its generator alone and every way to loop
    over positions gives the same codes.

    Args:
        generator: one for the batch; or a list with one for each image, which then does not depend on its batch; or
            None for torch's default generator.

    Returns:
        float32 (batch, length, num_codes).
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images; each image needs one")
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            run = pool.map if batch >= 16 else map  # threads take longer to start than a few images
            return torch.cat([*run(lambda one: gumbel_noise(1, length, num_codes, one, device), generator)])
    source = device if generator is None else generator.device
    return make_gumbel_(torch.rand(batch, length, num_codes, generator=generator, device=source).to(device))


def make_gumbel_(noise: Tensor) -> Tensor:
    """Turn uniform noise into Gumbel noise, in place because the tensor is large, and return it."""
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(2):  # −log(−log u)
        noise.clamp_min_(tiny).log_().neg_()
    return noise


def keep_top_k(logits: Tensor, count: int) -> Tensor:
    """Set all but the `count` largest values of the last dimension to −inf."""
    if count >= logits.shape[-1]:
        return logits
    least = logits.topk(count, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, mass: float) -> Tensor:
    """Keep the fewest largest logits whose probabilities add up to `mass`, and set the others to −inf.

    Nucleus sampling, arXiv 1904.09751.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = F.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill(before >= mass, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def choose_from_nucleus(logits: Tensor, noise: Tensor, mass: float) -> Tensor:
    """Return (keep_top_p(logits, mass) + noise).argmax(-1) without sorting.

    The best code is kept if the codes with larger logits have less than `mass` together, which is true for most rows.
    If it is not kept, neither is any code with a smaller logit, and the best of the others is next.
    """
    probabilities, scores = F.softmax(logits, dim=-1), logits + noise
    while True:
        best = scores.argmax(-1, keepdim=True)
        larger = logits > logits.gather(-1, best)
        is_kept = ~((probabilities * larger).sum(-1, keepdim=True) >= mass)  # also if it is NaN, or this would not end
        if is_kept.all():
            return best[..., 0]
        scores.masked_fill_(~(larger | is_kept), float("-inf"))
