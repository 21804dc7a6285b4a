"""The flags against REFERENCE's tables, the named configurations value by value, and one line for every bad value."""

import argparse
import re

import pytest
import yaml

import args
import evaluate
import generate
from models.sampling import Sampling
from tests.builders import python
from tests.conftest import ROOT
from utils import command_line

PARSERS = {
    "train.py": args.train_parser,
    "generate.py": generate.generate_parser,
    "train_vqgan.py": args.vqgan_parser,
    "evaluate.py": evaluate.evaluate_parser,
}
COMMANDS = {
    "train.py": (args.train_arguments, ["--generated-data"]),
    "generate.py": (generate.generate_arguments, ["--dalle_path", "c.pt", "--text", "a cat"]),
    "train_vqgan.py": (args.vqgan_arguments, ["--input-folder", "pictures"]),
    "evaluate.py": (evaluate.evaluate_arguments, ["--dalle_path", "c.pt"]),
}

# The reference application's flags, with a value that each takes.
COUNTED = """batch-size epochs device-iterations replication-factor gradient-accumulation embedding-serialization-factor
    ipus-per-replica cls-ipu-id embedding-ipu-id hidden-size text-seq-len num-hidden-layers num-attention-heads dim-head
    loss-img-weight checkpoint-save-steps dataloader-workers"""
SWITCHES = """stochastic-rounding enable-half-partials enable-rts optimizer-state-offchip fp16 enable-als sandwich-norm
    enable-half-first-order-momentum truncate-captions byteio generated-data synthetic-data wandb compile-only"""
TEXTS = """bpe-path input-folder pretrained-checkpoint vae-path vqgan-model-path vqgan-config-path wandb-project-name
    wandb-run-name executable-cache-dir profile-dir"""
TRAIN_FLAGS = {
    **dict.fromkeys(COUNTED.split(), 3),
    **dict.fromkeys(SWITCHES.split(), True),
    **dict.fromkeys(TEXTS.split(), "some/where"),
    "layers-per-ipu": [0, 3],
    "matmul-proportion": [0.25, 0.5],
    "async-dataloader": False,
    "random-seed": 0,
    "optimizer": "AdamW",
    "learning-rate": 0.01,
    "lr-scheduler": "constant",
    "loss-scaling": 16384,
    **dict.fromkeys(("weight-decay", "ff-dropout", "attn-dropout"), 0.5),
    "attn-types": ("full", "conv_like"),
    "checkpoint-output-dir": "",
}
TRAIN_DEFAULTS = yaml.safe_load("""
    {replication_factor: 1, embedding_serialization_factor: 1, ipus_per_replica: 1, embedding_ipu_id: 0,
    matmul_proportion: [0.6], async_dataloader: true, random_seed: 42, weight_decay: 0, loss_img_weight: 7,
    checkpoint_save_steps: 1000, wandb: false, wandb_project_name: miniDALL-E, bpe_path: null}""")
GENERATE_FLAGS = {"dalle-path": "c.pt", "vqgan-model-path": "v.ckpt", "vqgan-config-path": "v.yaml", "text": "a|b"}
GENERATE_FLAGS.update({"num-images": 3, "batch-size": 3, "top-k": 0.5, "outputs-dir": "o", "gentxt": True})
GENERATE_FLAGS["bpe-path"] = "words.txt"

ROW, COL, FULL = "axial_row", "axial_col", "full"
L16_CLIP = yaml.safe_load("""
    {batch_size: 1, epochs: 200, replication_factor: 1, gradient_accumulation: 15, embedding_serialization_factor: 8,
    ipus_per_replica: 4, layers_per_ipu: [0, 7, 7, 2], matmul_proportion: [0.2], fp16: true, stochastic_rounding: true,
    enable_half_partials: true, enable_half_first_order_momentum: true, enable_rts: false, optimizer: Adam,
    learning_rate: 0.0003, lr_scheduler: ReduceLROnPlateau, loss_scaling: 16384, sandwich_norm: true, bpe_path: null,
    hidden_size: 512, num_hidden_layers: 16, num_attention_heads: 16, dim_head: 64, ff_dropout: 0, attn_dropout: 0,
    dataloader_workers: 4, loss_img_weight: 7, text_seq_len: 80, truncate_captions: true, wandb: false,
    checkpoint_output_dir: ./output/ckpt, checkpoint_save_steps: 5000, input_folder: ./data/COCO}""")
L16_CLIP["attn_types"] = (ROW, ROW, COL, ROW, ROW, ROW, COL, ROW, ROW, ROW, COL, FULL, ROW, ROW, COL, FULL)
L16 = {**L16_CLIP, **yaml.safe_load("""
    {batch_size: 2, epochs: 800, gradient_accumulation: 8192, embedding_serialization_factor: 4,
    layers_per_ipu: [0, 6, 6, 4], matmul_proportion: [0.6], learning_rate: 0.005, lr_scheduler: multi_step,
    loss_scaling: 32768, sandwich_norm: false, bpe_path: bpe/bpe_yttm_vocab.txt}""")}  # fmt: skip
POD16 = {**L16, "replication_factor": 4, "gradient_accumulation": 2048, "enable_rts": True}
POD64 = {**POD16, "replication_factor": 16, "gradient_accumulation": 512, "loss_scaling": 16384}
HALF = ("fp16", "stochastic_rounding", "enable_half_partials", "enable_half_first_order_momentum")
UNIT_TEST = {**L16, **dict.fromkeys(HALF, False), "attn_types": (ROW,), **yaml.safe_load("""
    {batch_size: 1, epochs: 1, gradient_accumulation: 2, embedding_serialization_factor: 1, ipus_per_replica: 1,
    layers_per_ipu: [1], learning_rate: 0.0003, lr_scheduler: ReduceLROnPlateau, loss_scaling: 1, hidden_size: 64,
    num_hidden_layers: 1, num_attention_heads: 1}""")}  # fmt: skip
CONFIGURATIONS = {"L16_CLIP_vocab": L16_CLIP, "L16": L16, "L16_POD16": POD16, "L16_POD64": POD64}
CONFIGURATIONS["unit_test"] = UNIT_TEST

BAD_VALUES = {
    "train.py": f"""random-seed=-1 random-seed={2**63} dataloader-workers=-1 dataloader-workers=two cls-ipu-id=-1
        cls-ipu-id=1 layers-per-ipu=17,-1 layers-per-ipu=16.0 layers-per-ipu= matmul-proportion=1.5 matmul-proportion=x
        learning-rate=0 learning-rate=nan learning-rate=fast adam-betas=0.9,1 adam-betas=0.9 max-grad-norm=0
        attn-dropout=1 attn-dropout=-0.1 loss-img-weight=-1 loss-img-weight=nan caption-dropout=1.5
        attn-types=full,sparse attn-types= optimizer=SGD device=tpu precision=fp8 fp16=maybe top-k=1.1 top-k=-0.1
        top-p=0 top-p=1.1 temperature=0 temperature=inf cond-scale=-1""",
    "generate.py": "top-k=1.1 top-k=ninety seed=-1 seed=x text= text=a||b text=a|",
    "train_vqgan.py": "ch=48 ch-mult=1,0 patch-size=3 image-size=250 validation-split=1 continuous-steps=100000",
    "evaluate.py": "prompts=1121 prompt-set=train",
}


@pytest.mark.parametrize("program, flags", [("train.py", TRAIN_FLAGS), ("generate.py", GENERATE_FLAGS)])
def test_every_flag_of_the_reference_is_there_in_both_spellings(program, flags):
    base = COMMANDS[program][1] if program == "generate.py" else []
    for name, expected in flags.items():
        dest, word = name.replace("-", "_"), str(expected).strip("[]()").replace("'", "")
        before = PARSERS[program]().parse(base)
        assert name in ("dalle-path", "checkpoint-output-dir") or getattr(before, dest) != expected, name
        for spelling in (name, dest):
            settings = PARSERS[program]().parse([*base, f"--{spelling}", word])
            assert getattr(settings, dest) == expected, spelling


def test_the_defaults_are_those_of_the_reference():
    settings = args.train_arguments(["--generated-data"])
    assert {name: getattr(settings, name) for name in TRAIN_DEFAULTS} == TRAIN_DEFAULTS
    settings = generate.generate_arguments(["--dalle_path", "c.pt", "--text", "a cat"])
    assert (settings.num_images, settings.batch_size, settings.outputs_dir) == (4, None, "./outputs")
    assert settings.gentxt is False and settings.bpe_path is None
    assert settings.top_k is None and Sampling().top_k == 0.99  # where the checkpoint says nothing


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_named_configurations_have_the_values_of_the_reference(name):
    settings = vars(args.train_arguments(["--config", name]))
    assert {key: settings[key] for key in CONFIGURATIONS[name]} == CONFIGURATIONS[name]
    assert settings["bpe_path"] is None or (ROOT / settings["bpe_path"]).is_file()


def test_every_entry_of_the_configuration_file_parses():
    names = list(yaml.safe_load(command_line.CONFIGS.read_text(encoding="utf-8")))
    assert {"demo", "vqgan_demo", "photos", *CONFIGURATIONS} <= set(names)
    for name in names:
        parse = args.vqgan_arguments if name.startswith("vqgan_") else args.train_arguments
        parse(["--config", name, "--input-folder", "images"])


def test_flags_override_the_configuration_wherever_they_stand():
    flags = "--batch-size 7 --config=L16 --no-fp16 --attn_types full --layers-per-ipu 4 4 4,4"
    settings = args.train_arguments(flags.split())
    assert (settings.batch_size, settings.fp16, settings.attn_types) == (7, False, ("full",))
    assert settings.layers_per_ipu == [4, 4, 4, 4]
    assert (settings.epochs, settings.stochastic_rounding) == (800, True)
    folder = ["--input-folder", "images"]
    rivals = ["--validation-folder", "others", "--vqgan-model-path", "a.ckpt"]
    settings = args.train_arguments(["--config", "photos", *folder, *rivals])
    assert (settings.validation_folder, settings.validation_split) == ("others", None)
    assert (settings.vqgan_model_path, settings.vae_path) == ("a.ckpt", None)
    assert args.train_arguments(["--config", "photos", *folder, "--validation-split", "0"]).validation_split == 0


@pytest.mark.parametrize("program, count", [*zip(COMMANDS, (17, 4, 9, 4))])
def test_no_size_may_be_zero_negative_or_broken(program, count, command):
    function, base = COMMANDS[program]
    names = [action.dest.replace("_", "-") for action in PARSERS[program]()._actions if action.type is args.COUNT]
    assert len(names) >= count
    for name in names:
        for bad in ("0", "many", "9" * 400):
            error = command(function, *base, f"--{name}={bad}").refused().err
            assert f"--{name}: must be a whole number of at least 1" in error and f", not '{bad}'" in error


@pytest.mark.parametrize("program", BAD_VALUES)
def test_a_value_out_of_range_is_named_with_its_flag(program, command):
    function, base = COMMANDS[program]
    for name, _, bad in (word.partition("=") for word in re.split("[ \n]+", BAD_VALUES[program])):
        error = command(function, *base, f"--{name}={bad}").refused().err
        assert re.search(rf"--{name}\b", error), error
        assert any(part in error.partition(":")[2] for part in re.split(r"[,| ]+", bad)), error


def test_flags_that_contradict_each_other_end_in_one_line(command):
    for argv, told in (
        (["--layers-per-ipu", "0,6,6,4", "--ipus-per-replica=3"], ["--layers-per-ipu", "4 numbers", "replica 3"]),
        (["--layers-per-ipu", "0,6,6,5", "--ipus-per-replica=4"], ["--layers-per-ipu", "0,6,6,5", "17", "16"]),
        (["--matmul-proportion", "0.1,0.2"], ["--matmul-proportion", "2 numbers", "--ipus-per-replica 1"]),
        (["--vqgan-config-path", "v.yaml"], ["--vqgan-config-path", "--vqgan-model-path"]),
        (["--vae-path=v", "--vqgan-model-path=w"], ["--vae-path", "--vqgan-model-path"]),
        (["--no-generated-data"], ["--input-folder", "--generated-data"]),
        (["--config", "L17"], ["--config", "L17", "L16_POD64"]),
        (["--config", "vqgan_demo"], ["configs.yaml, vqgan_demo", "image_size", "no such setting"]),
        (["--config", "L16", "--num-hidden-layers=4"], ["configs.yaml, L16", "--layers-per-ipu", "16", "4"]),
        (["--batch_size", "0"], ["--batch-size", "'0'"]),
        (["--bacth-size", "2\n3"], ["unrecognized arguments: --bacth-size 2 3 (did you mean --batch-size?)"]),
        (["--batch", "2"], ["--batch"]),
    ):
        error = command(args.train_arguments, "--generated-data", *argv).refused().err
        assert error.partition(": error: ")[0] and all(phrase in error for phrase in told), error


@pytest.mark.parametrize("program", [*PARSERS, "process_captions.py"])
def test_help_names_every_flag_and_needs_neither_torch_nor_an_sdk(program):
    blocked = ["torch", "torchvision", "taming", "numpy", "PIL", "tokenizers", "einops", "ftfy", "poptorch", "popdist"]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = [{program!r}, '--help']; "
    code += f"sys.path.insert(0, '.'); runpy.run_path({program!r}, run_name='__main__')"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    words = set(re.findall(r"--[\w-]+", done.stdout))
    if program == "process_captions.py":
        assert {"--captions", "--out-dir"} <= words
        return
    shown = [action for action in PARSERS[program]()._actions if action.help != argparse.SUPPRESS]
    assert {min(action.option_strings[-2:]) for action in shown} <= words | {"-h"}
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"usage: {program} (--config NAME )?.*\[flags\]", lines[0]) and len(lines) <= 100
    assert any(line.endswith("]") for line in lines[1:])  # a default
    assert max(map(len, lines)) <= 120 and "None" not in done.stdout and not re.search(r"^  --\w+_", done.stdout, re.M)
