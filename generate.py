"""Generate images for prompts with a checkpoint of train.py, or of the reference application.

    python generate.py --text "a small red circle above a large blue square"
    python generate.py --dalle_path output/demo/ckpt/dalle_step_800.pt --text "…" --num_images 16

From Python: load() and generate(). Work starts in generation/command.py; torch is imported only after the flags are
read, so that --help is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Union

import log
from args_generate import generate_arguments

if TYPE_CHECKING:
    from PIL.Image import Image

    from generation.loading import LoadedModel


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    settings = generate_arguments(argv)
    log.set_up()
    with log.exit_on_interrupt(), log.exit_on_bad_input():
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
        watch: called with the codes so far, int64 (B, n), after every code; see generation.batching.generate_batch.
        sampling: top_k, top_p, temperature and cond_scale, to replace the checkpoint's recommended values.

    Returns:
        PIL images; `info` of each has prompt, seed and settings, and scores if rank is above 1.

    Raises:
        ValueError, OSError: a prompt, an image or a setting cannot be used.
    """
    from generation import batching, command, image_prompts, output, ranking

    given_codes = None
    if image_prompt is not None:
        given_codes = image_prompts.encode_kept_rows(loaded, image_prompt, keep_rows)
    seed = command.new_seed() if seed is None else seed
    plans = []
    for prompt in [text] if isinstance(text, str) else text:
        first = batching.plan_image(loaded, prompt, seed, sampling, given_codes)
        plans.append([first._replace(seed=first.seed + number) for number in range(num_images * rank)])
    images = []
    for specs, codes in zip(plans, batching.generate_lists(loaded, plans, lambda specs: watch)):
        best = ranking.best_of(loaded, specs, codes, num_images)
        for (index, scores), pixels in zip(best, loaded.decode(codes[[index for index, _ in best]])):
            images.append(output.to_image(pixels))
            images[-1].info.update(output.image_metadata(specs[index], loaded, scores))
    return images


if __name__ == "__main__":
    main()
