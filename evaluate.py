"""Measure a checkpoint: losses, reconstruction, prompt accuracy and image scores, printed and in results.json.

    python evaluate.py --dalle_path output/ckpt/dalle_best.pt --input-folder FOLDER
    python evaluate.py --dalle_path output/demo/ckpt/dalle_step_800.pt

With --input-folder: the losses that train.py's validation logs, the VQGAN's PSNR and a grid of its reconstructions.
Without it, or with --prompts: validation prompts are generated, and a program checks the images. For shapes,
data/shapes_reader.py checks objects, colors, shapes, sizes and their relation; for scenes, training/scenes_reader.py
objects, sizes, relation and background. --clip-weights and --fid-weights score the generated images.
Averaged weights are used if the checkpoint has them.
"""

from argparse import Namespace
from typing import Optional, Sequence

import log
from utils.command_line import COUNT, SEED, Parser, exit_on_error, number

DEMO_PROMPTS = 400


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure the checkpoint that the flags name."""
    settings = evaluate_arguments(argv)
    log.set_up()
    with exit_on_error():
        from backends import explain_out_of_memory  # torch takes seconds to import, so flags are checked first
        from training.evaluation import run

        with explain_out_of_memory(f"a --batch-size below {settings.batch_size} needs less"):
            run(settings)


def evaluate_parser() -> Parser:
    parser = Parser(
        "Measure a DALL-E: losses and reconstructions of a folder's pairs, or accuracy on prompts of shapes or scenes."
    )
    add = parser.heading("What to measure")
    add("dalle-path", None, "checkpoint of train.py", required=True)
    add("input-folder", None, "images and captions to measure losses and reconstructions on, as train.py takes them")
    add("nearest", None, "images that the model was trained on; shows which are nearest to generated ones")
    add("max-pairs", None, "use at most this many pairs, spread over the folder", COUNT)
    add("truncate-captions", None, "cut captions that are too long; none: as in training", bool)
    prompts = f"validation prompts of shapes or scenes to generate; none: {DEMO_PROMPTS}, or 0 with one of the above"
    add("prompts", None, prompts, number(int, low=1, high=1120))
    kinds = ("shapes", "scenes")
    add("prompts-of", None, "their kind; none: scenes if the checkpoint knows its objects", choices=kinds)
    sets = ("choose", "score")
    add("prompt-set", "score", "choose: for choosing settings; score: for the final accuracy", choices=sets)
    folder = "folder for results.json and grids; none: ./output/evaluation with one of the above, else ./output/demo"
    add("outputs-dir", None, folder)
    add("seed", 0, "seed of prompts and images", SEED)
    add("rank", 1, "generate this many images for each prompt and measure the likeliest, as generate.py --rank", COUNT)
    add("batch-size", 64, "images or pairs at once", COUNT)
    parser.window_flag(add)
    parser.sampling_flags("Sampling (none: what the checkpoint recommends)")
    parser.machine_flags()
    add = parser.heading("Scores of generated images (needs requirements-metrics.txt)")
    add("clip-weights", None, "compute the CLIP score with these weights of --clip-model, in open_clip's format")
    add("clip-model", "ViT-B-32", "open_clip model of the weights; ViT-B-32-quickgelu for OpenAI's")
    add("fid-weights", None, "compute FID against the folder's images with these InceptionV3 weights of torch-fidelity")
    add = parser.heading("Files that the checkpoint does not contain")
    add("bpe-path", None, "vocabulary file; none: the checkpoint's, else CLIP's")
    parser.vqgan_file_flags(add)
    return parser


def evaluate_arguments(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Return the namespace of evaluate.py; `prompts` is 0 if no image is to be generated for prompts."""
    parser = evaluate_parser()
    settings = parser.parse(argv)
    parser.check_vqgan_files(settings)
    if settings.max_pairs and not settings.input_folder:
        parser.error("argument --max-pairs: needs --input-folder")
    if settings.fid_weights and not settings.input_folder:
        parser.error("argument --fid-weights: needs --input-folder with images to compare with")
    if settings.prompts is None:
        settings.prompts = 0 if settings.input_folder or settings.nearest else DEMO_PROMPTS
    if settings.outputs_dir is None:
        settings.outputs_dir = "./output/evaluation" if settings.input_folder or settings.nearest else "./output/demo"
    return settings


if __name__ == "__main__":
    main()
