"""Measure how guidance, temperature and ranking change how many validation prompts the demo's images follow.

    python -m benchmarks.faithfulness [--dalle-path FILE] [--pictures 256]

Prints a table and saves it as faithfulness.json and faithfulness.png. Every row generates one image for each of the
same prompts, and data/shapes_reader.py reads what the image shows.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from tqdm import tqdm

import log
from benchmarks.networks import SHAPES
from data.shapes import validation_prompts
from evaluate import judge, shape_faults
from utils.command_line import COUNT, SEED, Parser, exit_on_error, machine_flags, number, parse
from utils.files import atomic_write, check_writable

PLAIN = {"top_k": 0.0}  # the model's own distribution
ROWS = [  # (name, sampling settings on top of PLAIN, number of images of which the best is kept)
    ("nothing: the model's own distribution", {}, 1),
    *((f"temperature {value:g}", {"temperature": value}, 1) for value in (0.5, 0.8, 1.2)),
    *((f"cond_scale {value:g}", {"cond_scale": value}, 1) for value in (1.25, 1.5, 2.0, 3.0, 5.0)),
    *((f"top_p {value:g}", {"top_p": value}, 1) for value in (0.8, 0.9)),
    *((f"best of {value}", {}, value) for value in (2, 4, 8)),
    ("all of them", {"temperature": 0.8, "cond_scale": 1.25, "top_p": 0.9}, 1),
    ("all of them, ranked", {"temperature": 0.8, "cond_scale": 1.25, "top_p": 0.9}, 4),
]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    parser = Parser((__doc__ or "").splitlines()[0])
    add = parser.heading("what is measured")
    add("dalle-path", str(SHAPES), "checkpoint that knows shapes")
    add("pictures", 256, "validation prompts per row, with one image each", number(int, low=1, high=1120))
    add("seed", 0, "seed of prompts and images", SEED)
    add("batch-size", 64, "images generated at once", COUNT)
    add("output-dir", "output/benchmarks", "folder for faithfulness.json and faithfulness.png")
    machine_flags(parser)
    settings = parse(parser, argv)
    log.set_up()
    with exit_on_error():
        from benchmarks.plot import plot_shares
        from generation.loading import load

        check_writable(settings.output_dir, "--output-dir")
        loaded = load(
            settings.dalle_path, device=settings.device, precision=settings.precision, batch_size=settings.batch_size
        )
        prompts = validation_prompts("score", settings.pictures, settings.seed)
        rows = [measure_row(loaded, prompts, settings.seed, *row) for row in tqdm(ROWS, unit="row", disable=None)]
        print(f"{loaded.path}, {len(prompts)} validation prompts, seed {settings.seed}")
        print(f"{'':40}{'followed':>10}{'s per image':>13}")
        for row in rows:
            print(f"{row['name']:40}{100 * row['accuracy']:8.1f} %{row['seconds']:13.3f}")
        about = {"checkpoint": loaded.path, "fingerprint": loaded.fingerprint, "pictures": len(prompts)}
        folder = Path(settings.output_dir)
        with atomic_write(folder / "faithfulness.json", text=True) as file:
            file.write(json.dumps({**about, "seed": settings.seed, "rows": rows}, indent=2) + "\n")
        shares = [100 * row["accuracy"] for row in rows]
        label = f"of {len(prompts)} validation prompts followed, %"
        plot_shares([row["name"] for row in rows], shares, label, folder / "faithfulness.png")
        print(f"wrote {folder / 'faithfulness.json'} and .png", file=sys.stderr)


def measure_row(
    loaded: Any, prompts: List[str], seed: int, name: str, settings: Dict[str, float], rank: int
) -> Dict[str, Any]:
    """Generate an image for each prompt, the best of `rank` by the model's own likelihood, and judge it."""
    import torch

    from generation import ranking
    from generation.images import generate_lists, plan_image
    from models.sampling import Sampling

    sampling = Sampling(**PLAIN, **settings)
    lists = [
        [plan_image(loaded, prompt, seed + place * rank + number, sampling) for number in range(rank)]
        for place, prompt in enumerate(prompts)
    ]
    started, images = time.monotonic(), []
    for specs, codes in zip(lists, generate_lists(loaded, lists)):
        ((best, _),) = ranking.best_of(loaded, specs, codes, 1)
        images.append(loaded.decode(codes[best][None]))
    seconds = (time.monotonic() - started) / len(prompts)
    accuracy, faults = judge(torch.cat(images), shape_faults(prompts))
    scores = {"accuracy": accuracy, "seconds": seconds, "faults": dict(faults)}
    return {"name": name, **sampling._asdict(), "rank": rank, **scores}


if __name__ == "__main__":
    main()
