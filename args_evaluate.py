"""The flags of evaluate.py → one validated namespace; of the same parts as those in args.py, and as light to import."""

from utils.command_line import (
    COUNT,
    SEED,
    Parser,
    check_vqgan_files,
    machine_flags,
    number,
    parse,
    sampling_flags,
    vqgan_file_flags,
)

DEMO_PROMPTS = 400


def evaluate_parser():
    parser = Parser(
        "Measures a DALL-E: losses and reconstructions of a folder's pairs, or demo prompts that it follows."
    )
    add = parser.heading("What to measure")
    add("dalle-path", None, "checkpoint of train.py", required=True)
    add(
        "input-folder", None, "pictures and .txt captions to take losses and reconstructions of, as train.py pairs them"
    )
    add("max-pairs", None, "at most so many of its pairs, spread over the folder", COUNT)
    add("truncate-captions", None, "cut captions that are too long; none: as in training", bool)
    add(
        "prompts",
        None,
        f"held-out prompts of the demo set to draw; none: {DEMO_PROMPTS} without --input-folder, else 0",
        number(int, low=1, high=1120),
    )
    add(
        "prompt-set",
        "score",
        "choose: prompts for choosing settings; score: those kept for the figure",
        choices=("choose", "score"),
    )
    add("outputs-dir", None, "folder for results.json and grids; none: ./output/demo, of a folder ./output/evaluation")
    add("seed", 0, "seed of prompts and pictures", SEED)
    add("batch-size", 64, "pictures or pairs at once", COUNT)
    sampling_flags(parser.heading("How to draw (none: what the checkpoint recommends)"))
    machine_flags(parser)
    add = parser.heading(
        "Scores of drawn pictures, for the demo's prompts or a picture a pair; requirements-metrics.txt"
    )
    add("clip-weights", None, "CLIP score, by these weights of --clip-model in open_clip's form")
    add("clip-model", "ViT-B-32", "which of open_clip's models they belong to; OpenAI's own: ViT-B-32-quickgelu")
    add("fid-weights", None, "FID to the folder's pictures, by InceptionV3's weights as torch-fidelity has them")
    add = parser.heading("Files that the checkpoint does not bring along")
    add("bpe-path", None, "YouTokenToMe vocabulary; none: the checkpoint's, else CLIP's")
    vqgan_file_flags(add)
    return parser


def evaluate_arguments(argv=None):
    """The namespace of evaluate.py; `prompts` is 0 where none are to be drawn."""
    parser = evaluate_parser()
    settings = parse(parser, argv)
    check_vqgan_files(parser, settings)
    if settings.max_pairs and not settings.input_folder:
        parser.error("argument --max-pairs: needs --input-folder, whose pairs they are")
    if settings.fid_weights and not settings.input_folder:
        parser.error("argument --fid-weights: needs --input-folder, the pictures to compare with")
    if settings.prompts is None:
        settings.prompts = 0 if settings.input_folder else DEMO_PROMPTS
    if settings.outputs_dir is None:
        settings.outputs_dir = "./output/evaluation" if settings.input_folder else "./output/demo"
    return settings
