"""Parse and check the flags of evaluate.py."""

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
    window_flag,
)

DEMO_PROMPTS = 400


def evaluate_parser():
    parser = Parser(
        "Measure a DALL-E: losses and reconstructions of a folder's pairs, or accuracy on prompts of shapes or scenes."
    )
    add = parser.heading("What to measure")
    add("dalle-path", None, "checkpoint of train.py", required=True)
    add("input-folder", None, "images and captions to measure losses and reconstructions on, as train.py takes them")
    add("nearest", None, "images that the model was trained on; shows which are nearest to generated ones")
    add("max-pairs", None, "use at most this many pairs, spread over the folder", COUNT)
    add("truncate-captions", None, "cut captions that are too long; none: as in training", bool)
    add(
        "prompts",
        None,
        f"validation prompts of shapes or scenes to generate; none: {DEMO_PROMPTS}, or 0 with one of the above",
        number(int, low=1, high=1120),
    )
    add(
        "prompts-of", None, "their kind; none: scenes if the checkpoint knows its objects", choices=("shapes", "scenes")
    )
    add(
        "prompt-set",
        "score",
        "choose: prompts for choosing settings; score: prompts for the final accuracy",
        choices=("choose", "score"),
    )
    add(
        "outputs-dir",
        None,
        "folder for results.json and grids; none: ./output/evaluation with one of the above, else ./output/demo",
    )
    add("seed", 0, "seed of prompts and images", SEED)
    add("batch-size", 64, "images or pairs at once", COUNT)
    window_flag(add)
    sampling_flags(parser.heading("Sampling (none: what the checkpoint recommends)"))
    machine_flags(parser)
    add = parser.heading("Scores of generated images (needs requirements-metrics.txt)")
    add("clip-weights", None, "compute the CLIP score with these weights of --clip-model, in open_clip's format")
    add("clip-model", "ViT-B-32", "open_clip model of the weights; ViT-B-32-quickgelu for OpenAI's")
    add("fid-weights", None, "compute FID against the folder's images with these InceptionV3 weights of torch-fidelity")
    add = parser.heading("Files that the checkpoint does not contain")
    add("bpe-path", None, "vocabulary file; none: the checkpoint's, else CLIP's")
    vqgan_file_flags(add)
    return parser


def evaluate_arguments(argv=None):
    """Return the namespace of evaluate.py; `prompts` is 0 if no image is to be generated for prompts."""
    parser = evaluate_parser()
    settings = parse(parser, argv)
    check_vqgan_files(parser, settings)
    if settings.max_pairs and not settings.input_folder:
        parser.error("argument --max-pairs: needs --input-folder")
    if settings.fid_weights and not settings.input_folder:
        parser.error("argument --fid-weights: needs --input-folder with images to compare with")
    if settings.prompts is None:
        settings.prompts = 0 if settings.input_folder or settings.nearest else DEMO_PROMPTS
    if settings.outputs_dir is None:
        settings.outputs_dir = "./output/evaluation" if settings.input_folder or settings.nearest else "./output/demo"
    return settings
