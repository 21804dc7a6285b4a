"""Define and check the flags of train.py and train_vqgan.py.

Imports nothing heavier than yaml, so that --help is immediate and needs neither torch nor an SDK. What depends on data
or a checkpoint is checked when it is read.
"""

import argparse
from typing import List, Optional, Sequence, Set, Tuple, Union

from utils.command_line import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Parser, list_of, number, path

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like")
SCHEDULERS = ("ReduceLROnPlateau", "multi_step", "constant", "cosine", "trapezoid")
NETWORK = {  # settings that a checkpoint decides, and their names in its hparams
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "dim_head": "dim_head",
    "text_seq_len": "text_seq_len",
    "attn_types": "attn_types",
    "sandwich_norm": "sandwich_norm",
}
VQGAN_SIZES = {"image_size", "patch_size", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels"}
VQGAN_SIZES |= {"embed_dim", "n_embed"}
CONFIG_HELP = "entry of configs.yaml to start from; flags override it"
FRACTION = number(float, low=0, below=1)
# Settings that exclude each other: one on the command line replaces the configuration's other one.
RIVALS = ({"validation_folder", "validation_split"}, {"vae_path", "vqgan_model_path"})


def attention_types(text: str) -> Tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in ATTENTION_TYPES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(ATTENTION_TYPES)}, not '{name}'")
    return names


def layer_counts(text: str) -> List[Union[int, str]]:
    """Parse numbers of layers, or "auto"."""
    return ["auto"] if text == "auto" else list_of(NATURAL)(text)


IPU_FLAGS = (  # without effect elsewhere: name, default, help, type
    ("device-iterations", 1, "updates per call of the device", COUNT),
    ("loss-scaling", 1.0, "factor on the loss against underflow in fp16", POSITIVE),
    ("enable-als", False, "let the IPU choose the loss scaling", bool),
    ("stochastic-rounding", False, "round fp16 sums at random instead of to nearest", bool),
    ("enable-half-partials", False, "keep partial sums of matrix products in fp16", bool),
    ("enable-half-first-order-momentum", False, "keep Adam's first moment in fp16", bool),
    ("enable-rts", False, "shard optimizer state over the replicas", bool),
    ("optimizer-state-offchip", False, "keep optimizer state in streaming memory", bool),
    ("embedding-serialization-factor", 1, "pieces in which text embedding and head are computed", COUNT),
    ("ipus-per-replica", 1, "IPUs that hold one copy of the model", COUNT),
    ("layers-per-ipu", None, "layers on each IPU, such as 0,6,6,4; auto: balanced", layer_counts),
    ("cls-ipu-id", None, "IPU of the head; none: the last", NATURAL),
    ("embedding-ipu-id", 0, "IPU of the image embedding", NATURAL),
    ("matmul-proportion", [0.6], "memory share for matrix products, one for all or one per IPU", list_of(SHARE)),
    ("async-dataloader", True, "read batches ahead in a separate process", bool),
    ("compile-only", False, "compile for a machine without IPUs, then stop", bool),
    ("profile-dir", None, "folder for PopVision profiles", path),
)


def train_parser() -> Parser:
    parser = Parser("Train a DALL-E on a folder of captioned images.", usage="--config NAME [flags]")
    add = parser.heading("Everyday flags")
    add("config", None, CONFIG_HELP)
    add("input-folder", None, "captioned images: a folder, or another form of docs/training.md", path)
    add("generated-data", False, "random images and captions instead of a folder", bool)
    add("vae-path", None, "VQGAN: a folder of train_vqgan.py, or its .ckpt", path)
    add("checkpoint-output-dir", "./output/ckpt", "folder for checkpoints, metrics and samples; '': none", path)
    add("resume", False, "continue from the newest good checkpoint in that folder, or else start", bool)
    add("init-from", None, "start with this checkpoint's weights, and its network, vocabulary and VQGAN", path)
    add("batch-size", 1, "samples that pass through the model at once (micro-batch)", COUNT)
    add("gradient-accumulation", 1, "micro-batches in one update", COUNT)
    add("epochs", 1, "passes over the data", COUNT)
    add("max-steps", None, "stop after this many updates, whatever --epochs says", COUNT)
    add("learning-rate", 3e-4, "peak learning rate", POSITIVE)
    add("sample-steps", 1000, "updates between grids of sample images; one more at the end; 0: none", NATURAL)
    add("dry-run", False, "make a few steps, report time and memory of the run, write nothing", bool)
    parser.machine_flags()

    add = parser.heading("Execution")
    add("replication-factor", 1, "data-parallel replicas; more micro-batches on one CPU or GPU", COUNT)
    add("shard", False, "split weights, gradients and optimizer state among torchrun's processes (FSDP2)", bool)
    add("recompute", False, "recompute activations in the backward pass: less memory, more time", bool)
    add("random-seed", 42, "seed of weights, data order, captions and dropout", SEED)
    add("dataloader-workers", 4, "processes that read images", NATURAL)

    add = parser.heading("Model")
    add("hidden-size", 512, "width", COUNT)
    add("num-hidden-layers", 16, "layers of attention and feed-forward", COUNT)
    add("num-attention-heads", 16, "heads", COUNT)
    add("dim-head", 64, "width of a head", COUNT)
    add("text-seq-len", 80, "longest caption in tokens", COUNT)
    add("attn-types", ("full",), f"comma list of {', '.join(ATTENTION_TYPES)}, cycled over the layers", attention_types)
    add("attn-dropout", 0.0, "dropout in attention", FRACTION)
    add("ff-dropout", 0.0, "dropout in feed-forward", FRACTION)
    add("sandwich-norm", False, "a second norm after every block", bool)
    add("loss-img-weight", 7, "weight of the image loss relative to the text loss", NOT_NEGATIVE)

    add = parser.heading("Optimizer")
    add("optimizer", "Adam", "Muon optimizes matrices, AdamW the rest", choices=("Adam", "AdamW", "Muon"))
    add("lr-scheduler", "ReduceLROnPlateau", "cosine and trapezoid count steps, the others epochs", choices=SCHEDULERS)
    add("warmup-steps", 0, "linear warm-up of cosine and trapezoid", NATURAL)
    add("weight-decay", 0.0, "decay of parameters with more than one dimension", NOT_NEGATIVE)
    add("adam-betas", [0.9, 0.999], "decay rates of Adam's moments", list_of(FRACTION), nargs="+")
    add("max-grad-norm", None, "clip gradients to this norm", POSITIVE)
    add("ema-decay", None, "also average the weights, and generate with the average; 0.999 is usual", FRACTION)

    add = parser.heading("Data and tokenizers")
    add("bpe-path", None, "vocabulary: tokenizer.json, sentencepiece's or YouTokenToMe's model; none: CLIP's", path)
    add("truncate-captions", False, "cut captions longer than --text-seq-len tokens instead of refusing them", bool)
    add("caption-dropout", 0.0, "share of captions to empty, which guidance (--cond-scale) needs", SHARE)
    add("codes-cache", None, "folder for VQGAN codes and caption tokens; none: next to the images", path)
    add("no-codes-cache", False, "encode pixels in every step and cache nothing", bool)
    add("byteio", False, "send pixels as bytes and scale them on the device", bool)
    parser.vqgan_file_flags(add)

    add = parser.heading("Validation and checkpoints")
    add("validation-folder", None, "folder of validation images and captions", path)
    add("validation-split", None, "share of the input folder to validate on instead; 0: none", FRACTION)
    add("validation-steps", 1000, "updates between validations; ReduceLROnPlateau adds one per epoch", COUNT)
    add("checkpoint-save-steps", 1000, "updates between checkpoints, besides those at ends of epochs", COUNT)
    add("checkpoint-save-minutes", None, "minutes between checkpoints, if earlier", POSITIVE)
    add("checkpoint-save-epochs", 1, "epochs between checkpoints at ends of epochs", COUNT)
    add("keep-checkpoints", 3, "newest checkpoints to keep, besides the best by validation loss", COUNT)
    add("pretrained-checkpoint", None, "continue from this checkpoint", path)

    parser.sampling_flags("Sampling, as checkpoints recommend it to generate.py")

    add = parser.heading("Tracking")
    add("tensorboard", False, "write TensorBoard's event files to tensorboard/ in the output folder", bool)
    add("wandb", False, "log to Weights & Biases", bool)
    add("wandb-project-name", "miniDALL-E", "its project")
    add("wandb-run-name", None, "its run")

    add = parser.heading("Graphcore IPUs (accepted elsewhere without effect, and logged)")
    add("fp16", None, "fp16 on IPUs, mixed bf16 elsewhere; false: fp32; --precision overrides it", bool)
    add("synthetic-data", False, "time the device alone with random data; nothing is saved", bool)
    for name, default, help, parse in IPU_FLAGS:
        add(name, default, help, parse, **({"nargs": "+"} if name in ("layers-per-ipu", "matmul-proportion") else {}))
    return parser


def vqgan_parser() -> Parser:
    parser = Parser("Train a VQGAN, the image tokenizer, on a folder of images.", usage="--config NAME [flags]")
    add = parser.heading("Everyday flags")
    add("config", None, CONFIG_HELP)
    add("input-folder", None, "folder of images, searched recursively, or any form of train.py's data", path)
    add("output-dir", "./output/vqgan", "folder for vqgan.ckpt, vqgan.yaml and reconstructions.png", path)
    add("batch-size", 8, "images in one update", COUNT)
    add("max-steps", 100000, "updates", COUNT)
    add("resume", False, "continue the run in --output-dir, if there is one, with the same flags", bool)
    add("init-from", None, "start with the weights and sizes of this VQGAN: a folder, or its weights", path)
    add("image-size", 256, "side of the images in pixels", COUNT)
    add("device", "auto", "auto takes CUDA, else the CPU", choices=("auto", "cpu", "cuda"))
    precisions = ("auto", "fp32", "bf16")
    add("precision", "auto", "arithmetic of the networks; auto takes bf16 if it is fast", choices=precisions)
    add("random-seed", 42, "seed of weights, data order and validation images", SEED)
    add("dataloader-workers", 4, "processes that decode images", NATURAL)

    add = parser.heading("Validation")
    add("validation-folder", None, "folder of validation images; none: --validation-split of the input folder", path)
    add("validation-split", 0.05, "share of the images to validate on; 0: measure on training images", FRACTION)
    add("eval-interval", 1000, "steps between validations, each with a save; 0: only at the end", NATURAL)

    add = parser.heading("Model")
    add("patch-size", 1, "side of the pixel blocks folded into channels before the encoder: 1, 2, 4, 8, …", COUNT)
    add("ch", 128, "channels of the first level, a multiple of 32", COUNT)
    ch_mult = "channels of each level as multiples of --ch; each level after the first halves the side"
    add("ch-mult", [1, 1, 2, 2, 4], ch_mult, list_of(COUNT), nargs="+")
    add("num-res-blocks", 2, "residual blocks per level", COUNT)
    add("attn-resolutions", [16], "sides of the levels that have attention; '': none", list_of(COUNT), nargs="*")
    add("z-channels", 256, "channels of the encoder's output", COUNT)
    add("embed-dim", 256, "channels of a codebook entry", COUNT)
    add("n-embed", 1024, "entries of the codebook", COUNT)

    add = parser.heading("Training")
    optimizer = "Muon optimizes kernels and Adam the rest, AdamW everything"
    add("optimizer", "Muon", optimizer, choices=("Muon", "AdamW"))
    add("learning-rate", 0.02, "peak learning rate; it falls to zero along a cosine", POSITIVE)
    add("warmup-steps", 20, "linear warm-up", NATURAL)
    add("weight-decay", 1.0, "decay of kernels per unit of learning rate", NOT_NEGATIVE)
    add("continuous-steps", 100, "first steps without quantization, after which the codebook starts", NATURAL)
    add("codebook-weight", 1.0, "weight of the codebook loss relative to the reconstruction loss", POSITIVE)
    add("commitment", 0.25, "weight of the encoder's share in the codebook loss", NOT_NEGATIVE)
    add("decoder-of", None, "train only the decoder, from this folder's VQGAN on; its codes stay the same", path)
    add("edge-weight", 0.0, "additional weight of edges in the loss; about 5 for line drawings", NOT_NEGATIVE)
    add("rate-weight", 0.0, "attraction of frequent codes; simple images then use few codes", NOT_NEGATIVE)
    add("revival-interval", 50, "steps after which an unused code is reset; 0: never", NATURAL)
    add("disc-weight", 0.0, "weight of the patch discriminator; 0: none", NOT_NEGATIVE)
    add("disc-start", 10000, "step from which the discriminator counts", NATURAL)
    return parser


def train_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return the settings of train.py; every flag is checked, alone and against the others."""
    parser = train_parser()
    settings = parser.parse(argv)
    ipus, layers = settings.ipus_per_replica, settings.layers_per_ipu
    if layers is not None and "auto" in layers:
        if len(layers) > 1:
            parser.refuse("layers-per-ipu", "give auto alone, or a number for each IPU")
        settings.layers_per_ipu, layers = "auto", None
    proportions = len(settings.matmul_proportion)
    if layers is not None and sum(layers) != settings.num_hidden_layers:
        total = f"{','.join(map(str, layers))} adds up to {sum(layers)} layers"
        parser.refuse("layers-per-ipu", f"{total}, but --num-hidden-layers is {settings.num_hidden_layers}")
    if layers is not None and len(layers) != ipus:
        parser.refuse("layers-per-ipu", f"{len(layers)} numbers for --ipus-per-replica {ipus}; give one per IPU")
    if proportions not in (1, ipus):
        problem = f"{proportions} numbers for --ipus-per-replica {ipus}; give one, or one per IPU"
        parser.refuse("matmul-proportion", problem)
    for flag in ("cls-ipu-id", "embedding-ipu-id"):
        ipu = getattr(settings, flag.replace("-", "_")) or 0
        if ipu >= ipus:
            parser.refuse(flag, f"no IPU {ipu} with --ipus-per-replica {ipus}")
    if len(settings.adam_betas) != 2:
        parser.refuse("adam-betas", "give two numbers, such as 0.9,0.999")
    given = parser.flags_given(argv)
    if settings.init_from:
        check_init_from(parser, settings, given)
    if settings.resume and settings.pretrained_checkpoint:
        parser.refuse("resume", "takes the newest checkpoint of the output folder; omit --pretrained-checkpoint")
    if settings.resume and not settings.checkpoint_output_dir:
        parser.refuse("resume", "needs a --checkpoint-output-dir to find checkpoints in")
    if settings.tensorboard and not settings.checkpoint_output_dir:
        parser.refuse("tensorboard", "needs a --checkpoint-output-dir to write to")
    drop_rivals(settings, given)
    if settings.validation_folder and settings.validation_split:
        parser.refuse("validation-split", "--validation-folder already names the images; give one of them")
    if not settings.input_folder and not (settings.generated_data or settings.synthetic_data):
        parser.error("give --input-folder FOLDER (images and captions) or --generated-data, or a --config that does")
    parser.check_vqgan_files(settings)
    return settings


def drop_rivals(settings: argparse.Namespace, given: Set[str]) -> None:
    """Unset what a configuration says against a flag that was given."""
    for rivals in RIVALS:
        if len(given.intersection(rivals)) == 1:
            for name in rivals - given:
                setattr(settings, name, None)


def check_init_from(parser: Parser, settings: argparse.Namespace, given: Set[str]) -> None:
    """Refuse flags that --init-from decides, and drop a configuration's vocabulary and VQGAN in favor of the file's."""
    if settings.pretrained_checkpoint:
        parser.refuse("init-from", "starts a new run, --pretrained-checkpoint continues one; give one of them")
    for name in sorted(given.intersection(NETWORK)):
        parser.refuse(name.replace("_", "-"), "the network is that of --init-from; leave the flag out")
    for name in {"bpe_path", "vae_path", "vqgan_model_path", "vqgan_config_path"} - given:
        setattr(settings, name, None)


def vqgan_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = vqgan_parser()
    settings, given = parser.parse(argv), parser.flags_given(argv)
    drop_rivals(settings, given)
    if not settings.input_folder:
        parser.error("give --input-folder FOLDER (images), or a --config that does")
    if settings.init_from:
        if settings.decoder_of:
            parser.refuse("init-from", "trains codes as well, which --decoder-of keeps; give one of them")
        for name in sorted(given.intersection(VQGAN_SIZES)):
            parser.refuse(name.replace("_", "-"), "the sizes are those of --init-from; leave the flag out")
    if settings.ch % 32:
        parser.refuse("ch", f"must be a multiple of 32, the groups of its normalization, not {settings.ch}")
    if settings.patch_size & (settings.patch_size - 1):
        parser.refuse("patch-size", f"must be a power of two, not {settings.patch_size}")
    factor = settings.patch_size * 2 ** (len(settings.ch_mult) - 1)
    if settings.image_size % factor:
        reason = "--patch-size × 2^(levels of --ch-mult - 1)"
        parser.refuse("image-size", f"must be a multiple of {factor} = {reason}, not {settings.image_size}")
    if settings.continuous_steps >= settings.max_steps and not (settings.init_from or settings.decoder_of):
        problem = f"{settings.continuous_steps} leaves none of {settings.max_steps} steps to the codebook"
        parser.refuse("continuous-steps", problem)
    if settings.disc_weight and settings.image_size < 32:
        problem = f"the discriminator needs images of at least 32 × 32 pixels, not {settings.image_size}"
        parser.refuse("disc-weight", problem)
    return settings
