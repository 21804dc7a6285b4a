"""The flags of train.py and train_vqgan.py, each → one validated namespace; args_generate.py and others have more.

How flags are parsed, and how an entry of configs.yaml lies beneath them, is utils/command_line.py's. Imports nothing
heavier than yaml, so that --help is immediate and needs neither torch nor an SDK. What only the data or a checkpoint
can tell is checked where it is read.
"""

import argparse

from utils.command_line import Parser, boolean, list_of, number, parse

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like")
SCHEDULERS = ("ReduceLROnPlateau", "multi_step", "constant", "cosine", "trapezoid")
DEVICES = ("auto", "cpu", "cuda", "ipu")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COUNT = number(int, low=1)
NATURAL = number(int, low=0)
SEED = number(int, low=0, high=2**63 - 1)
POSITIVE = number(float, above=0)
SHARE = number(float, low=0, high=1)
DROPOUT = number(float, low=0, below=1)


def attention_types(text):
    """Comma list → tuple of known patterns."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in ATTENTION_TYPES:
            raise argparse.ArgumentTypeError(f"'{name}' is not an attention type ({', '.join(ATTENTION_TYPES)})")
    return names


def top_k(text):
    """A share from 0 to 1, or a whole number above."""
    value = number(float, low=0)(text)
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a share from 0 to 1 nor a whole number of codes")
    return value


def machine_flags(parser):
    add = parser.heading("Machine")
    add(
        "device",
        "auto",
        "where to run; auto: CUDA, else an IPU whose SDK is enabled, else the CPU",
        choices=DEVICES,
    )
    add(
        "precision",
        "auto",
        "arithmetic of the transformer; auto: bf16 where it is fast, on IPUs fp16 where --fp16 or a large model asks",
        choices=PRECISIONS,
    )


def vqgan_file_flags(add):
    add("vqgan-model-path", None, "VQGAN weights, a taming .ckpt; none: the official ImageNet f=16 model is downloaded")
    add("vqgan-config-path", None, "the .yaml that belongs to it; none: the file of the same stem beside the .ckpt")


def sampling_flags(add, default=None):
    """The settings that shape a picture; train.py stores them in checkpoints, where generate.py finds its defaults."""
    add(
        "top-k",
        default,
        "share of the text and image vocabulary that is cut, 0 … 1, or number of codes kept; generate.py: 0.99",
        top_k,
    )
    add("top-p", default, "keep the likeliest codes up to this probability", number(float, above=0, high=1))
    add("temperature", default, "below 1 is safer, above 1 wilder; generate.py's default is 1", POSITIVE)
    add(
        "cond-scale",
        default,
        "guidance towards the text, 1 is none; needs --caption-dropout in training",
        number(float, low=0),
    )


def train_parser():
    parser = Parser("Trains a DALL-E on a folder of captioned pictures.", "Named configurations: configs.yaml.")
    parser.add_argument("--config", help="entry of configs.yaml to start from; flags override it")
    machine_flags(parser)

    add = parser.heading("Execution")
    add("batch-size", 1, "micro-batch: samples that pass through the model at once", COUNT)
    add("gradient-accumulation", 1, "micro-batches to one update", COUNT)
    add("replication-factor", 1, "data-parallel replicas; on one CPU or GPU they become further micro-batches", COUNT)
    add("shard", False, "torchrun's processes share weights, gradients and optimizer state out (FSDP2)", bool)
    add("epochs", 1, "passes over the data", COUNT)
    add("max-steps", None, "stop after this many updates, whatever --epochs says", COUNT)
    add("random-seed", 42, "seed of weights, data order, captions and dropout", SEED)
    add("dataloader-workers", 4, "processes that read pictures", NATURAL)
    add("dry-run", False, "make a few steps, tell what the run would take, and write nothing", bool)
    add("recompute", False, "keep only layers' outputs for the backward pass, as IPUs do: less memory, more time", bool)

    add = parser.heading("Execution on IPUs (elsewhere accepted, and named in the log)")
    add("device-iterations", 1, "updates a call of the device", COUNT)
    add("fp16", None, "half precision: fp16 on IPUs, mixed bf16 elsewhere; false: fp32; --precision wins", bool)
    add("stochastic-rounding", False, "round fp16 sums at random rather than to nearest", bool)
    add("enable-half-partials", False, "keep partial sums of matrix products in fp16", bool)
    add("enable-rts", False, "shard optimizer state over the replicas", bool)
    add("optimizer-state-offchip", False, "keep optimizer state in streaming memory", bool)
    add("embedding-serialization-factor", 1, "pieces in which text embedding and head are computed", COUNT)
    add("ipus-per-replica", 1, "IPUs that one copy of the model is spread over", COUNT)
    add("layers-per-ipu", None, "layers on each IPU, such as 0,6,6,4", list_of(NATURAL), nargs="+")
    add("cls-ipu-id", None, "IPU of the head; none: the last", NATURAL)
    add("embedding-ipu-id", 0, "IPU of the image embedding", NATURAL)
    add("matmul-proportion", [0.6], "memory for matrix products, one number or one an IPU", list_of(SHARE), nargs="+")
    add("async-dataloader", True, "read batches ahead in a process of their own", bool)
    add("synthetic-data", False, "random data made on the device, to time it alone; nothing is saved", bool)
    add("compile-only", False, "compile for a machine without IPUs, then stop", bool)
    add("executable-cache-dir", None, "keep compiled programs here")
    add("profile-dir", None, "write PopVision profiles here")

    add = parser.heading("Optimizer")
    add("optimizer", "Adam", "Muon: the layers' matrices by Muon, the rest by AdamW", choices=("Adam", "AdamW", "Muon"))
    add("learning-rate", 3e-4, "peak learning rate", POSITIVE)
    add("lr-scheduler", "ReduceLROnPlateau", "the first three go by epochs, the others by steps", choices=SCHEDULERS)
    add("warmup-steps", 0, "linear warm-up of the schedules by steps", NATURAL)
    add("weight-decay", 0.0, "decay of parameters with more than one dimension", number(float, low=0))
    add("adam-betas", [0.9, 0.999], "decay rates of Adam's moments", list_of(DROPOUT), nargs="+")
    add("max-grad-norm", None, "clip gradients to this norm; none: no clipping", POSITIVE)
    add("ema-decay", None, "also keep an average of the weights, which then draws; 0.999 is usual", DROPOUT)
    add("loss-scaling", 1.0, "factor on the loss, against underflow in fp16 on IPUs", POSITIVE)
    add("enable-als", False, "let the IPU choose the loss scaling", bool)
    add("enable-half-first-order-momentum", False, "Adam's first moment in fp16, on IPUs", bool)

    add = parser.heading("Model")
    add("hidden-size", 512, "width", COUNT)
    add("num-hidden-layers", 16, "layers of attention and feed-forward", COUNT)
    add("num-attention-heads", 16, "heads", COUNT)
    add("dim-head", 64, "width of a head", COUNT)
    add("text-seq-len", 80, "text tokens a caption may have", COUNT)
    add("attn-types", ("full",), f"comma list of {', '.join(ATTENTION_TYPES)}, cycled over the layers", attention_types)
    add("attn-dropout", 0.0, "dropout in attention", DROPOUT)
    add("ff-dropout", 0.0, "dropout in feed-forward", DROPOUT)
    add("sandwich-norm", False, "a second norm after every block", bool)
    add("loss-img-weight", 7, "weight of the image loss beside the text loss", number(float, low=0))
    add("bpe-path", None, "YouTokenToMe vocabulary; none: CLIP's")
    add(
        "truncate-captions", False, "cut captions of more than --text-seq-len tokens; otherwise they are an error", bool
    )

    add = parser.heading("Data")
    add("input-folder", None, "folder of pictures and .txt captions, paired by file stem, searched recursively")
    add("generated-data", False, "random pictures and captions instead of a folder", bool)
    add("byteio", False, "send pixels as bytes, and scale them on the device", bool)
    add("caption-dropout", 0.0, "share of captions that are emptied, which guidance needs", SHARE)
    add("codes-cache", None, "folder for the pictures' VQGAN codes and the captions' tokens; none: beside them")
    add(
        "no-codes-cache",
        False,
        "encode pixels in every step instead, and keep nothing on disk",
        type=boolean,
        nargs="?",
        const=True,
        metavar="BOOL",
    )

    add = parser.heading("Validation")
    add("validation-folder", None, "folder of held-out pictures and captions")
    add("validation-split", None, "share of the input folder that is held out instead", number(float, above=0, below=1))
    add("validation-steps", 1000, "updates between validations; with ReduceLROnPlateau one more an epoch", COUNT)

    add = parser.heading("Checkpoints")
    add("checkpoint-output-dir", "./output/ckpt", "folder for checkpoints; '' writes none")
    add("checkpoint-save-steps", 1000, "updates between checkpoints, beside those at ends of epochs", COUNT)
    add("checkpoint-save-minutes", None, "minutes from one checkpoint to the next, if earlier", POSITIVE)
    add("checkpoint-save-epochs", 1, "epochs from one checkpoint at an epoch's end to the next", COUNT)
    add("keep-checkpoints", 3, "how many of the newest to keep, beside the best by validation loss", COUNT)
    add("resume", False, "go on from the newest good checkpoint in the folder; begin where there is none", bool)
    add("pretrained-checkpoint", None, "go on from this checkpoint")
    add("vae-path", None, "a folder of train_vqgan.py, or its .ckpt with the .yaml beside it")
    vqgan_file_flags(add)

    sampling_flags(parser.heading("Sampling settings that checkpoints recommend to generate.py"))

    add = parser.heading("What there is to see, beside metrics.jsonl and loss.png in the output folder")
    add("sample-steps", 1000, "updates between grids of sample pictures, with one more at the end; 0: none", NATURAL)
    add("tensorboard", False, "also write TensorBoard's event files, into tensorboard/ in the output folder", bool)
    add("wandb", False, "log to Weights & Biases", bool)
    add("wandb-project-name", "miniDALL-E", "its project")
    add("wandb-run-name", None, "its run")
    return parser


def vqgan_parser():
    parser = Parser(
        "Trains a VQGAN, the image tokenizer, on a folder of pictures.", "Named configurations: configs.yaml."
    )
    parser.add_argument("--config", help="entry of configs.yaml to start from; flags override it")
    add = parser.heading("Machine")
    add("device", "auto", "where to train; auto: CUDA, else the CPU", choices=("auto", "cpu", "cuda"))
    add("precision", "auto", "arithmetic of the networks; auto: bf16 on GPUs", choices=("auto", "fp32", "bf16"))
    add("random-seed", 42, "seed of weights, data order and held-out pictures", SEED)
    add("dataloader-workers", 4, "processes that decode pictures", NATURAL)

    add = parser.heading("Data")
    add("input-folder", None, "folder of pictures (png, jpg, jpeg, bmp), searched recursively")
    add("validation-folder", None, "folder of held-out pictures; none: --validation-split of the input folder")
    add(
        "validation-split",
        0.05,
        "share of the pictures that is held out; 0: the figures are taken on training pictures",
        DROPOUT,
    )

    add = parser.heading("Model")
    add("image-size", 256, "side of the pictures in pixels", COUNT)
    add("patch-size", 1, "pixels a side that are folded into channels before the encoder: 1, 2, 4, 8 …", COUNT)
    add("ch", 128, "channels of the first level, a multiple of 32", COUNT)
    add(
        "ch-mult",
        [1, 1, 2, 2, 4],
        "each level's channels as multiples of --ch; each further level halves the side",
        list_of(COUNT),
        nargs="+",
    )
    add("num-res-blocks", 2, "residual blocks a level", COUNT)
    add(
        "attn-resolutions",
        [16],
        "sides at which levels have attention; '': none but the middle's",
        list_of(COUNT),
        nargs="*",
    )
    add("z-channels", 256, "channels of the encoder's output", COUNT)
    add("embed-dim", 256, "channels of a codebook entry", COUNT)
    add("n-embed", 1024, "entries of the codebook", COUNT)

    add = parser.heading("Training")
    add("batch-size", 8, "pictures to one update", COUNT)
    add("max-steps", 100000, "updates", COUNT)
    add(
        "optimizer",
        "Muon",
        "Muon: the kernels by Muon, the rest by Adam at a tenth of the learning rate",
        choices=("Muon", "AdamW"),
    )
    add("learning-rate", 0.02, "peak learning rate; it falls to zero along a cosine", POSITIVE)
    add("warmup-steps", 20, "linear warm-up", NATURAL)
    add("weight-decay", 1.0, "decay of kernels per unit of learning rate", number(float, low=0))
    add("continuous-steps", 100, "first steps without quantisation, after which the codebook begins", NATURAL)
    add("codebook-weight", 1.0, "weight of the codebook loss beside the reconstruction loss", POSITIVE)
    add("commitment", 0.25, "weight of the encoder's share in the codebook loss", number(float, low=0))
    add(
        "rate-weight",
        0.0,
        "how much codes in frequent use attract; makes simple pictures use few codes",
        number(float, low=0),
    )
    add("revival-interval", 50, "steps after which an unused code begins anew; 0: never", NATURAL)
    add("disc-weight", 0.0, "weight of the patch discriminator; 0: none", number(float, low=0))
    add("disc-start", 10000, "step from which the discriminator counts", NATURAL)

    add = parser.heading("Output")
    add("output-dir", "./output/vqgan", "folder for vqgan.ckpt, vqgan.yaml and reconstructions.png")
    add(
        "eval-interval",
        1000,
        "steps between figures on held-out pictures, each with a save; 0: at the end only",
        NATURAL,
    )
    return parser


def train_arguments(argv=None):
    """The namespace of train.py: every flag of train_parser(), checked one by one and against each other."""
    parser = train_parser()
    settings = parse(parser, argv)
    ipus, layers = settings.ipus_per_replica, settings.layers_per_ipu
    if layers is not None:
        if sum(layers) != settings.num_hidden_layers:
            parser.error(
                f"argument --layers-per-ipu: {','.join(map(str, layers))} adds up to {sum(layers)} layers, "
                f"but --num-hidden-layers is {settings.num_hidden_layers}"
            )
        if len(layers) != ipus:
            parser.error(f"argument --layers-per-ipu: {len(layers)} numbers for --ipus-per-replica {ipus}; one an IPU")
    if len(settings.matmul_proportion) not in (1, ipus):
        parser.error(
            f"argument --matmul-proportion: {len(settings.matmul_proportion)} numbers for --ipus-per-replica {ipus}; "
            "give one, or one an IPU"
        )
    for flag in ("cls_ipu_id", "embedding_ipu_id"):
        if (getattr(settings, flag) or 0) >= ipus:
            spelling = flag.replace("_", "-")
            parser.error(f"argument --{spelling}: no IPU {getattr(settings, flag)} with --ipus-per-replica {ipus}")
    if len(settings.adam_betas) != 2:
        parser.error("argument --adam-betas: give two numbers, such as 0.9,0.999")
    if settings.resume and settings.pretrained_checkpoint:
        parser.error("argument --resume: takes the newest of the output folder; leave --pretrained-checkpoint out")
    if settings.resume and not settings.checkpoint_output_dir:
        parser.error("argument --resume: needs a --checkpoint-output-dir to find checkpoints in")
    if settings.tensorboard and not settings.checkpoint_output_dir:
        parser.error("argument --tensorboard: needs a --checkpoint-output-dir to write into")
    if settings.validation_folder and settings.validation_split:
        parser.error("argument --validation-split: --validation-folder holds the pictures already; give one of them")
    if not settings.input_folder and not (settings.generated_data or settings.synthetic_data):
        parser.error("give --input-folder FOLDER (pictures and captions) or --generated-data, or a --config that does")
    check_vqgan_files(parser, settings)
    return settings


def check_vqgan_files(parser, settings):
    if settings.vqgan_config_path and not settings.vqgan_model_path:
        parser.error("argument --vqgan-config-path: needs --vqgan-model-path, the weights that it describes")
    if getattr(settings, "vae_path", None) and settings.vqgan_model_path:
        parser.error("argument --vae-path: names a VQGAN, and so does --vqgan-model-path; give one of them")


def vqgan_arguments(argv=None):
    """The namespace of train_vqgan.py."""
    parser = vqgan_parser()
    settings = parse(parser, argv)
    if not settings.input_folder:
        parser.error("give --input-folder FOLDER (pictures), or a --config that does")
    if settings.ch % 32:
        parser.error(f"argument --ch: {settings.ch} is no multiple of 32, the groups of its normalisation")
    if settings.patch_size & (settings.patch_size - 1):
        parser.error(f"argument --patch-size: {settings.patch_size} is no power of two")
    factor = settings.patch_size * 2 ** (len(settings.ch_mult) - 1)
    if settings.image_size % factor:
        parser.error(
            f"argument --image-size: {settings.image_size} is no multiple of {factor} = --patch-size "
            f"× 2^(levels of --ch-mult - 1)"
        )
    if settings.continuous_steps >= settings.max_steps:
        parser.error(
            f"argument --continuous-steps: {settings.continuous_steps} leaves none of "
            f"{settings.max_steps} steps to the codebook"
        )
    if settings.disc_weight and settings.image_size < 32:
        parser.error(
            f"argument --disc-weight: the discriminator needs pictures of at least 32 pixels a side, "
            f"not {settings.image_size}"
        )
    return settings
