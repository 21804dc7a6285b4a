"""benchmarks.yml by the rules of Graphcore's examples_utils: names, commands, and figures found in logs really written.

The tool takes every entry without `options` in its name, runs `cmd` (formatted, with environment variables, split as a
shell does) from the file's folder, and reads each figure of `data` from stdout and stderr by its regular expression.
"""

import os
import re
import shlex
import subprocess

import pytest
import yaml

import args
import generate
import train
from tests.conftest import ROOT

SPEC = yaml.safe_load((ROOT / "benchmarks.yml").read_text(encoding="utf-8"))
ENTRIES = {name: entry for name, entry in SPEC.items() if "options" not in name}
ON_IPUS = [name for name in ENTRIES if "_cpu" not in name]
POPRUN_VARIABLES = {"HOSTS", "IPUOF_VIPU_API_PARTITION_ID", "CLUSTER", "TCP_IF_INCLUDE", "VIPU_CLI_API_HOST"}
REDUCED = "--hidden-size 32 --num-attention-heads 2 --dim-head 16 --gradient-accumulation 7 --batch-size 1"
REDUCED += " --replication-factor 1 --max-steps 1 --dataloader-workers 0 --no-async-dataloader"


def calls_of(name):
    """Return [(script, its arguments)] of every python3 in a command as the tool runs it, also in a script of bash."""
    words = shlex.split(os.path.expandvars(" ".join(ENTRIES[name]["cmd"].format().split())))
    if words[:2] == ["bash", "-c"] and len(words) == 3:
        words = [word for part in words[2].split(";") for word in [*shlex.split(part), ";"]]
    calls = []
    for place, word in enumerate(words):
        if word == "python3":
            rest = words[place + 2 :]
            calls.append((words[place + 1], rest[: rest.index(";")] if ";" in rest else rest))
    return calls


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_what_the_tool_takes(name):
    entry = ENTRIES[name]
    needs_no_data = "gen" in name or "synth" in name
    assert needs_no_data == ("DATASETS_DIR" not in entry["cmd"])
    assert (ROOT / entry["requirements_path"]).is_file()
    assert all(figure in entry["data"] for _, figure in entry["output"])
    variables = set(re.findall(r"\$([A-Z]\w+)", entry["cmd"])) - {"DATASETS_DIR"}
    assert variables <= POPRUN_VARIABLES and bool(variables) == ("poprun" in entry["cmd"])
    assert ("--executable-cache-dir" in entry["cmd"]) == ("poprun" in entry["cmd"])  # or each process compiles
    for script, arguments in calls_of(name):
        assert (ROOT / script).is_file()
        parse = {"train.py": args.train_arguments, "generate.py": generate.generate_arguments}[script]
        settings = parse(arguments)
        assert settings.device == ("ipu" if name in ON_IPUS else "cpu")
        pod = re.search(r"pod(\d+)", name)
        if script == "train.py" and pod:
            assert settings.replication_factor * settings.ipus_per_replica == int(pod.group(1))
    poprun = re.search(r"--num-replicas=(\d+)\s+--ipus-per-replica=(\d+)", entry["cmd"])
    if poprun:
        assert tuple(map(int, poprun.groups())) == (settings.replication_factor, settings.ipus_per_replica)


ORDINARY = ("real_pod4", "real_pod64_conv", "generate_pod4", "generate_cpu")
CASES = [pytest.param(name, marks=() if name.endswith(ORDINARY) else pytest.mark.slow) for name in ENTRIES]


@pytest.mark.parametrize("name", CASES)
def test_figures_are_in_the_log(poptorch_standin, command, drawn_pictures, tiny_vqgan, tmp_path, name, monkeypatch):
    """The entry's own command at reduced size, those for IPUs on the stand-in for PopTorch."""
    monkeypatch.setenv("DATASETS_DIR", str(tmp_path))
    (tmp_path / "coco").symlink_to(drawn_pictures)
    log = ""
    for script, arguments in calls_of(name):
        if script == "train.py":
            arguments = [word for word in arguments if "wandb" not in word]  # as the tool does unless told otherwise
            folder = [] if "" in arguments else ["--checkpoint-output-dir", tmp_path]
            places = ["--vae-path", tiny_vqgan, *folder]
            for flag in ("--codes-cache", "--executable-cache-dir"):
                places += [flag, tmp_path] if flag in arguments else []
            ended = command(train.main, *arguments, *REDUCED.split(), *places)
        else:
            reduced = ["--dalle_path", tmp_path / "dalle_step_1.pt", "--outputs_dir", tmp_path, "--num_images", 2]
            ended = command(generate.main, *arguments, *reduced)
        assert ended.status == 0, ended.err
        log += ended.out + ended.err
    found = {}
    for figure, how in ENTRIES[name]["data"].items():
        assert how["reduction_type"] == "final"
        found[figure] = float(re.findall(how["regexp"], log)[-1])
    assert found["throughput"] > 0
    if "loss" in found:
        assert 3 < found["loss"] < 12 and (found["compile_time"] > 0) == (name in ON_IPUS)


@pytest.mark.parametrize("pod", ["4", "16", "64"])
def test_training_scripts_run_what_they_say(poptorch_standin, command, tiny_vqgan, tmp_path, pod):
    """Two epochs of a named configuration on generated pixels, without checkpoints; further flags pass through."""
    called = tmp_path / "called"
    for program in ("python", "poprun"):
        (tmp_path / program).write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$@" > {called}\n')
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.update(HOSTS="one,two", IPUOF_VIPU_API_PARTITION_ID="p")
    script = ["bash", ROOT / "training_scripts" / f"train_POD{pod}.sh", "--learning-rate", "0.001"]
    assert subprocess.run(script, cwd=tmp_path, env=environment, check=False).returncode == 0
    words = called.read_text().splitlines()
    assert words[0].endswith("poprun" if pod == "64" else "python")
    arguments = words[words.index("train.py") + 1 :]
    settings = args.train_arguments(arguments)
    assert settings.replication_factor * settings.ipus_per_replica == int(pod)
    assert (settings.epochs, settings.learning_rate, settings.checkpoint_output_dir) == (2, 0.001, "")
    assert settings.generated_data and settings.byteio and settings.no_codes_cache
    if pod == "4":
        ended = command(train.main, *arguments, "--device", "ipu", *REDUCED.split(), "--vae-path", tiny_vqgan)
        assert ended.status == 0 and "throughput" in ended.out, ended.err
