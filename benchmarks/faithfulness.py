"""What guidance, temperature and ranking do to the demo: how many held-out prompts its pictures follow.

    python -m benchmarks.faithfulness [--dalle-path FILE] [--pictures 256]

Prints a table and saves it as faithfulness.json and faithfulness.png. Every row draws a picture a prompt, of the same
prompts, and a program reads back what it shows (data/shapes_reader.py). Speed is benchmarks/__main__.py's.
"""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

import log
from data.shapes import validation_prompts
from evaluate import judge
from utils.command_line import COUNT, SEED, Parser, machine_flags, number, parse
from utils.files import atomic_write, check_writable

PLAIN = {"top_k": 0.0, "top_p": None, "temperature": 1.0, "cond_scale": 1.0}  # the model's own distribution
ROWS = [  # (what is varied, settings beside PLAIN, pictures of which the best is kept)
    ("nothing: the model's own distribution", {}, 1),
    *(("temperature", {"temperature": value}, 1) for value in (0.5, 0.8, 1.2)),
    *(("guidance", {"cond_scale": value}, 1) for value in (1.25, 1.5, 2.0, 3.0, 5.0)),
    *(("nucleus", {"top_p": value}, 1) for value in (0.8, 0.9)),
    *(("ranking", {}, value) for value in (2, 4, 8)),
    ("all of them", {"temperature": 0.8, "cond_scale": 1.25, "top_p": 0.9}, 1),
    ("all of them, ranked", {"temperature": 0.8, "cond_scale": 1.25, "top_p": 0.9}, 4),
]


def main(argv=None):
    parser = Parser("Measures how guidance, temperature and ranking change what the demo's pictures show.")
    add = parser.heading("what is measured")
    add("dalle-path", None, "checkpoint of the demo set; none: the one that comes along")
    add("pictures", 256, "held-out prompts a row, a picture of each", number(int, low=1, high=1120))
    add("seed", 0, "seed of prompts and pictures", SEED)
    add("batch-size", 64, "pictures drawn at once", COUNT)
    add("output-dir", "output/benchmarks", "folder for faithfulness.json and faithfulness.png")
    machine_flags(parser)
    settings = parse(parser, argv)
    log.set_up()
    with log.exit_on_interrupt(), log.exit_on_bad_input():
        from generation.loading import load

        check_writable(settings.output_dir, "--output-dir")
        loaded = load(
            settings.dalle_path, device=settings.device, precision=settings.precision, batch_size=settings.batch_size
        )
        prompts = validation_prompts("score", settings.pictures, settings.seed)
        rows = [measured(loaded, prompts, settings.seed, *row) for row in tqdm(ROWS, unit="row", disable=None)]
        print(f"{loaded.path}, {len(prompts)} held-out prompts, seed {settings.seed}")
        print(f"{'':40}{'followed':>10}{'s a picture':>13}")
        for row in rows:
            print(f"{row['name']:40}{100 * row['accuracy']:8.1f} %{row['seconds']:13.3f}")
        about = {"checkpoint": loaded.path, "fingerprint": loaded.fingerprint, "pictures": len(prompts)}
        folder = Path(settings.output_dir)
        with atomic_write(folder / "faithfulness.json", text=True) as file:
            file.write(json.dumps({**about, "seed": settings.seed, "rows": rows}, indent=2) + "\n")
        plot(rows, len(prompts), folder / "faithfulness.png")
        print(f"wrote {folder / 'faithfulness.json'} and .png", file=sys.stderr)


def measured(loaded, prompts, seed, what, settings, rank):
    """A row: a picture a prompt, the best of `rank` by the model's own likelihood."""
    import torch

    from generation import batching, ranking

    sampling = {**PLAIN, **settings}
    first = batching.plan_image(loaded, prompts[0], 0, {key: v for key, v in sampling.items() if v is not None})
    first = first._replace(sampling=sampling)  # None, too, which picture() takes for the checkpoint's advice
    lists = [
        [
            first._replace(
                prompt=prompt, tokens=batching.encode_prompt(loaded, prompt), seed=seed + place * rank + number
            )
            for number in range(rank)
        ]
        for place, prompt in enumerate(prompts)
    ]
    started, pictures = time.monotonic(), []
    for part, codes in zip(lists, batching.generate_lists(loaded, lists)):
        ((place, _),) = ranking.best_of(loaded, part, codes, 1)
        pictures.append(loaded.decode(codes[place][None]))
    seconds = (time.monotonic() - started) / len(prompts)
    accuracy, faults = judge(prompts, torch.cat(pictures))
    said = [f"{key} {value:g}" for key, value in settings.items()] + [f"best of {rank}"] * (rank > 1)
    name = what if len(said) != 1 else said[0]
    return {"name": name, **sampling, "rank": rank, "accuracy": accuracy, "seconds": seconds, "faults": dict(faults)}


def plot(rows, count, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(rows) + 1.2), layout="constrained")
    shares = [100 * row["accuracy"] for row in rows]
    bars = axes.barh([row["name"] for row in rows], shares, color="#4477aa")
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel=f"of {count} held-out prompts followed, %")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
