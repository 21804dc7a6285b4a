"""The flags and named configurations against those of the reference application, and one line for every bad value."""

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

REFERENCE = yaml.safe_load((ROOT / "tests" / "reference_settings.yaml").read_text(encoding="utf-8"))
TRAIN_FLAGS, CONFIGURATIONS = REFERENCE["train_flags"], REFERENCE["configurations"]
for part, key in ((TRAIN_FLAGS, "attn-types"), *((part, "attn_types") for part in CONFIGURATIONS.values())):
    part[key] = tuple(part[key])
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


@pytest.mark.parametrize("program, flags", [("train.py", TRAIN_FLAGS), ("generate.py", REFERENCE["generate_flags"])])
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
    assert REFERENCE["train_defaults"].items() <= vars(settings).items()
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
    split = ["--validation-split", "0.1"]
    assert args.vqgan_arguments(["--config", "vqgan_demo", *split]).validation_folder is None
    assert args.vqgan_arguments(["--config", "vqgan_scenes_decoder", "--max-steps", "100"]).continuous_steps == 150


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
