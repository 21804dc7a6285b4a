"""Draws pictures for prompts with a checkpoint of train.py, or of the reference application.

    python generate.py --text "a small red circle above a large blue square"
    python generate.py --dalle_path output/demo/ckpt/dalle_step_800.pt --text "…" --num_images 16

The same from Python: load() and generate(). How a picture is drawn, ranked and saved is generation/'s.
"""

import contextlib
import functools
import logging
import random
import time
from pathlib import Path

import log
from args_generate import generate_arguments


def main(argv=None):
    settings = generate_arguments(argv)
    log.set_up()
    with log.interrupt_exits(), log.bad_input_exits():
        from tqdm import tqdm

        from generation import drawing, image_prompts, output, ranking
        from generation.loading import load_as_told
        from generation.previews import frames

        loaded = load_as_told(settings)
        seed, share_pictures = shared_seed(settings, loaded.backend)
        requests = requested(settings, loaded, seed)
        given_codes = functools.lru_cache(maxsize=None)(functools.partial(image_prompts.given_codes, loaded))
        wanted = [pictures_of(request, settings, loaded, seed, given_codes) for request in requests]  # all, at first
        clip = clip_judge(settings)
        check_writable(settings.outputs_dir)
        log.LOG.info("seed %d, %s", seed, told(wanted[0][0].sampling, loaded.recommended))
        if share_pictures:
            lists = [part[slice(*share_of(len(part), loaded.backend))] for part in wanted]
        else:
            prompts = [request.prompt for request in requests]  # one prompt's folder is one process's
            size, rank = loaded.backend.world_size, loaded.backend.rank
            mine = [place for place, prompt in enumerate(prompts) if prompts.index(prompt) % size == rank]
            lists = wanted = [wanted[place] for place in mine]
        total = sum(map(len, lists))
        loaded.batch_size = max(1, min(loaded.batch_size, total))
        started = time.monotonic()
        with tqdm(total=total, unit="picture", desc="drawing", disable=None) as bar, preview(
            settings, loaded
        ) as watcher:
            for part, codes in zip(wanted, drawing.draw_lists(loaded, lists, watcher, bar.update)):
                if share_pictures:
                    codes = loaded.backend.gather(codes)
                    if loaded.backend.rank:
                        continue
                kept = ranking.kept(loaded, part, codes, len(part) // settings.rank, clip)
                codes = codes[[place for place, _ in kept]]
                images = [output.as_picture(pixels) for pixels in loaded.decode(codes)]
                abouts = [output.metadata(part[place], loaded, scores) for place, scores in kept]
                forming = frames(loaded, codes) if settings.animate else None
                folder = output.save_pictures(images, abouts, settings.outputs_dir, settings.format, forming)
                tqdm.write(f"{len(images)} pictures of '{part[0].prompt}' in {folder}")
        log.LOG.info("throughput: %.3f images/sec", total / max(time.monotonic() - started, 1e-9))


def load(dalle_path=None, **options):
    """A checkpoint, ready to draw, the demo's where none is named; options: see generation.loading.load."""
    from generation.loading import load

    return load(dalle_path, **options)


def generate(
    loaded, text, *, num_images=1, seed=None, rank=1, image_prompt=None, keep_rows=0.5, watch=None, **sampling
):
    """Draw `num_images` pictures of a prompt, or of each of a list → PIL pictures, with what they show and how they
    were drawn in `.info`: prompt, seed, settings, and scores where rank is above 1.

    loaded: what load() gave. seed: that of the first picture of each prompt, None for a new one; the same seed gives
    the same picture in any company. rank: draw so many times as many, and keep the best. image_prompt: a path or PIL
    picture whose upper `keep_rows` rows of codes (or fraction) are kept. watch: see generation.drawing.draw. sampling:
    top_k, top_p, temperature, cond_scale, where not as recommended. ValueError for what cannot be drawn.
    """
    from generation import drawing, image_prompts, output, ranking

    given = None if image_prompt is None else image_prompts.given_codes(loaded, image_prompt, keep_rows)
    seed = new_seed() if seed is None else seed
    prompts = [text] if isinstance(text, str) else list(text)
    lists = [
        [drawing.picture(loaded, prompt, seed + number, sampling, given) for number in range(num_images * rank)]
        for prompt in prompts
    ]
    images = []
    for part, codes in zip(lists, drawing.draw_lists(loaded, lists, lambda pictures: watch)):
        kept = ranking.kept(loaded, part, codes, num_images)
        pixels = loaded.decode(codes[[place for place, _ in kept]])
        for (place, scores), one in zip(kept, pixels):
            images.append(output.as_picture(one))
            images[-1].info.update(output.metadata(part[place], loaded, scores))
    return images


def requested(settings, loaded, seed):
    """What to draw, with completed captions where --gentxt asks for them, and the pictures that it begins from."""
    from generation import drawing, image_prompts, prompts

    requests = settings.requests
    if requests is None:
        prompt = image_prompts.prompt_of(settings.variations)
        if prompt is None:
            raise ValueError(
                f"--variations {settings.variations}: no picture that tells its prompt; give it with --text"
            )
        requests = [prompts.Request(prompt)]
    beginning = settings.image_prompt or settings.variations
    requests = [request._replace(image_prompt=request.image_prompt or beginning) for request in requests]
    if settings.gentxt:
        for place, request in enumerate(requests):
            text, prompt = drawing.completed(loaded, request.prompt, seed if request.seed is None else request.seed)
            log.LOG.info("completed prompt: %s", prompt)
            requests[place] = request._replace(prompt=prompt, tokens=text)
    return requests


def pictures_of(request, settings, loaded, seed, given_codes):
    """A request → all pictures that are drawn for it, in order of their seeds. given_codes(picture's path, rows)."""
    from generation import drawing

    given = None
    if request.image_prompt:
        rows = settings.keep_rows if request.keep_rows is None else request.keep_rows
        given = given_codes(request.image_prompt, rows)
    sampling = {name: getattr(settings, name) for name in loaded.recommended}
    sampling.update(request.sampling)
    count = settings.rank * (settings.num_images if request.num_images is None else request.num_images)
    first = seed if request.seed is None else request.seed
    try:
        text = drawing.tokens_of(loaded, request.prompt) if request.tokens is None else request.tokens
    except ValueError as error:
        raise ValueError(f"{request.where}: {error}") from None
    one = drawing.picture(loaded, request.prompt, first, sampling, given, text)
    return [one._replace(seed=first + number) for number in range(count)]


def shared_seed(settings, backend):
    """(the seed of the first pictures, whether processes share the pictures of each prompt rather than prompts)."""
    import torch

    seed = new_seed() if settings.seed is None else settings.seed
    counts = [request.num_images or settings.num_images for request in settings.requests or ()] or [settings.num_images]
    share_pictures = bool(len(counts) < backend.world_size <= min(counts) and backend.gather)
    if share_pictures:
        seed = int(backend.gather(torch.tensor([seed]))[0])
        log.set_up(logging.WARNING if backend.rank else logging.INFO)
    return seed, share_pictures


def share_of(count, backend):
    return tuple(count * rank // backend.world_size for rank in (backend.rank, backend.rank + 1))


def new_seed():
    return random.SystemRandom().randrange(2**31)


def check_writable(folder):
    from utils.files import check_writable

    check_writable(folder, "--outputs_dir")


def told(sampling, recommended):
    """Sampling settings for the log; those that differ from what the checkpoint recommends with its own."""
    return ", ".join(
        f"{key} {value}" + (f" (recommended {recommended[key]})" if value != recommended[key] else "")
        for key, value in sampling.items()
    )


def clip_judge(settings):
    """CLIP's score of pictures where --clip-weights names some; None: the model itself judges."""
    if settings.clip_weights is None:
        return None
    from backends.native.backend import pick_device
    from models.picture_scores import clip_score

    device = pick_device("cpu" if settings.device == "ipu" else settings.device)
    return clip_score(settings.clip_weights, settings.clip_model, device)


@contextlib.contextmanager
def preview(settings, loaded):
    """→ draw_lists' watcher: preview.png in the output folder while a batch forms, with --preview."""
    from generation import output, previews

    if settings.preview is None:
        yield lambda pictures: None
        return
    path = Path(settings.outputs_dir) / output.PREVIEW

    try:
        yield lambda pictures: previews.Forming(
            loaded, settings.preview, lambda images, row: output.save_grid(images, path)
        )
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


if __name__ == "__main__":
    main()
