"""A checkpoint of the demo → how many held-out prompts its pictures follow, and a grid of them.

    python evaluate.py --dalle_path output/demo/ckpt/dalle_step_800.pt

The pictures are read back by data/shapes_reader.py: two objects, both colours, shapes and sizes, and the relation.
"""

from collections import Counter
from pathlib import Path

import args
import log
from generate import chosen_sampling, grid_of, load

GRID_PICTURES = 36


def main(argv=None):
    settings = args.evaluate_arguments(argv)
    log.set_up()
    with log.interrupt_exits(), log.bad_input_exits():
        from backends import select
        from data.shapes import held_out_prompts
        from utils.checkpoint import check_writable

        model, tokenizer, recommended = load(settings.dalle_path)
        sampling = chosen_sampling(settings, recommended)
        prompts = held_out_prompts(settings.prompt_set, settings.prompts, settings.seed)
        text = tokenizer.tokenize(prompts, model.text_seq_len)
        check_writable(settings.outputs_dir, "--outputs-dir")
        folder = Path(settings.outputs_dir)
        backend = select(settings)
        pictures = draw_prompts(backend.sampler(model), backend.decode(model.vae), text, settings, sampling)
        accuracy, wrong = judge(prompts, pictures)
        grid_of(pictures[:GRID_PICTURES]).save(folder / "grid.png")
        (folder / "prompts.txt").write_text("\n".join(prompts[:GRID_PICTURES]) + "\n", encoding="utf-8")
    if wrong:
        log.LOG.info("not followed in: %s", ", ".join(f"{fault} {count}" for fault, count in wrong.most_common()))
    print(f"picture grid: {folder / 'grid.png'} (its prompts, row by row: {folder / 'prompts.txt'})")
    print(f"prompt accuracy: {100 * accuracy:.1f} % ({len(prompts)} prompts)")


def draw_prompts(sampler, decode, text, settings, sampling):
    """One picture a prompt, float (K, 3, S, S) in [0, 1]."""
    import torch
    from tqdm import tqdm

    pictures = []
    for first in tqdm(range(0, len(text), settings.batch_size), desc="drawing", unit="batch", disable=None):
        part = text[first : first + settings.batch_size]
        generators = [torch.Generator().manual_seed(settings.seed + first + i) for i in range(len(part))]
        pictures.append(decode(sampler(part, generator=generators, **sampling)))
    return torch.cat(pictures)


def judge(prompts, pictures):
    """Share of pictures without a fault, and how often each kind of fault was seen."""
    from data.shapes_reader import faults

    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = [faults(prompt, picture) for prompt, picture in zip(prompts, pixels)]
    return sum(not found for found in seen) / len(seen), Counter(fault for found in seen for fault in found)


if __name__ == "__main__":
    main()
