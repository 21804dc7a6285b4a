"""The commands with --device ipu, on the stand-in for PopTorch: configurations, resuming, drawing, PopRun."""

import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

import generate
import train
from tests.builders import assert_same_weights, start, weights_in
from tests.conftest import ROOT, STANDIN
from utils import checkpoint

IPU = ("--device", "ipu", "--async-dataloader")


@pytest.mark.parametrize("name, stages", [("unit_test", 1), ("L16", 4)])
def test_a_configuration_runs_to_its_end(poptorch_standin, command, tiny_vqgan, tmp_path, name, stages):
    """At reduced width and accumulation; its file opens on a CPU and draws there and on an IPU."""
    reduced = "--hidden-size 32 --num-attention-heads 2 --dim-head 16 --max-steps 2 --batch-size 1"
    places = ("--gradient-accumulation", 7, "--vae-path", tiny_vqgan, "--checkpoint-output-dir", tmp_path)
    ended = command(train.main, "--config", name, "--generated-data", *IPU, *reduced.split(), *places).ok()
    assert re.search(r"Compiled model in \d+\.\d+ secs", ended.out)
    assert len(re.findall(r"stage \d on IPU", ended.out)) == stages
    assert re.search(r"step 2/2 .* loss: \d+\.\d+ .*throughput: \d+\.\d+ samples/sec", ended.out)
    path = tmp_path / "dalle_step_2.pt"
    assert checkpoint.read(path)["hparams"]["fp16"] is (name != "unit_test")
    for device in ("cpu", "ipu"):
        flags = f"--num_images 3 --batch_size 2 --seed 1 --precision fp32 --device {device}".split()
        place = ["--dalle_path", path, "--outputs_dir", tmp_path / device]
        ended = command(generate.main, *place, "--text", "a dog", *flags).ok()
        assert re.search(r"throughput: \d+\.\d+ images/sec", ended.out)
    pictures = [(tmp_path / device / "a_dog" / "2-seed-3.jpg").read_bytes() for device in ("cpu", "ipu")]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("pixels", [False, True], ids=["codes", "pixels"])
def test_real_pictures_train_as_on_a_cpu(poptorch_standin, command, tiny_flags, tmp_path, pixels):
    flags = ["--epochs", 2, "--gradient-accumulation", 2, "--batch-size", 2, "--optimizer", "Adam"]
    flags += ["--no-codes-cache", "--byteio"] if pixels else ["--codes-cache", tmp_path / "codes"]
    for device in ("ipu", "cpu"):
        place = ["--device", device, "--checkpoint-output-dir", tmp_path / device]
        command(train.main, *tiny_flags, *flags, *place).ok()
    for name in ("dalle_0.pt", "dalle_1.pt"):
        assert_same_weights(tmp_path / "ipu" / name, tmp_path / "cpu" / name, 2e-4)
    before, after = (weights_in(tmp_path / "cpu" / f"dalle_{epoch}.pt")["text_emb.weight"] for epoch in (0, 1))
    assert (after - before).abs().max() > 2e-3  # an epoch moves weights by more than the tolerance


def test_a_resumed_run_is_the_run_that_never_stopped(poptorch_standin, command, tiny_flags, tmp_path):
    flags = [*tiny_flags, *IPU, "--epochs", 3, "--ff-dropout", 0, "--gradient-accumulation", 3, "--batch-size", 1]
    flags += ["--ipus-per-replica", 2, "--layers-per-ipu", "1,1", "--embedding-serialization-factor", 4]
    runs = {name: [*flags, "--checkpoint-output-dir", tmp_path / name] for name in ("whole", "part", "rest")}
    command(train.main, *runs["whole"]).ok()
    command(train.main, *runs["part"], "--max-steps", 5).ok()
    ended = command(train.main, *runs["rest"], "--pretrained-checkpoint", tmp_path / "part" / "dalle_step_5.pt").ok()
    assert "at step 5" in ended.out and "afresh" not in ended.out + ended.err
    assert_same_weights(tmp_path / "rest" / "dalle_2.pt", tmp_path / "whole" / "dalle_2.pt")


def test_compile_only_needs_neither_data_nor_device(poptorch_standin, command, tiny_vqgan, tmp_path):
    flags = ["--config", "L16", "--hidden-size", 32, "--num-attention-heads", 2, "--dim-head", 16, "--compile-only"]
    flags += ["--gradient-accumulation", 8, "--executable-cache-dir", tmp_path / "cache", "--vae-path", tiny_vqgan]
    nowhere = ("--input-folder", tmp_path / "nothing", "--checkpoint-output-dir", "")
    ended = command(train.main, *flags, *IPU, *nowhere).ok()
    assert "Compiled model in" in ended.out and "throughput" not in ended.out
    assert list((tmp_path / "cache").iterdir())


def test_synthetic_data_is_timed_and_never_saved(poptorch_standin, command, tiny_flags, tmp_path):
    flags = ["--synthetic-data", "--max-steps", 2, "--checkpoint-output-dir", tmp_path]
    assert "throughput:" in command(train.main, *tiny_flags, *IPU, *flags).ok().out
    assert not list(tmp_path.glob("*.pt"))


def test_what_cannot_work_is_refused_in_one_line(poptorch_standin, command, tiny_flags):
    for flags, told in (
        ("--gradient-accumulation 2 --ipus-per-replica 2 --layers-per-ipu 1,1", "2 stages needs 3"),
        ("--gradient-accumulation 4 --ipus-per-replica 3 --layers-per-ipu 0,1,1 --cls-ipu-id 0", "4 stages needs 7"),
        ("--optimizer Muon", "Adam or AdamW"),
        ("--precision bf16", "fp16 or fp32"),
        ("--embedding-serialization-factor 7", "does not divide"),
        ("--executable-cache-dir /proc/cache", "--executable-cache-dir /proc/cache: cannot be written"),
        ("--gradient-accumulation 100", "one step takes 400 samples"),
    ):
        command(train.main, *tiny_flags, *IPU, *flags.split()).refused(told)


@pytest.mark.parametrize("validation_steps, place", [(3, "validation stopped"), (100, "training stopped")])
def test_a_device_that_fails_is_one_line(poptorch_standin, command, tiny_flags, tmp_path, validation_steps, place):
    """Weights cannot be read from it any more, as PopTorch does when a program ends."""
    flags = "--epochs 4 --gradient-accumulation 1 --lr-scheduler constant --validation-split 0.1"
    places = ["--checkpoint-output-dir", tmp_path, "--validation-steps", validation_steps]
    command(train.main, *tiny_flags, "--max-steps", 1)  # images have their codes from now on
    poptorch_standin.MACHINE.fails_after = 3
    ended = command(train.main, *tiny_flags, *IPU, *flags.split(), *places).refused()
    problem = f"IPU: {place}: 'poptorch_py_error': Application exception: all tiles stopped"
    assert f"{problem}; the last good checkpoint is {tmp_path / 'dalle_0.pt'}" in ended.err


def test_sampling_settings_share_one_program(poptorch_standin, command, tiny_checkpoint, tmp_path):
    settings = [{"top_k": 3}, {"cond_scale": 2.0, "top_p": 0.7}, {"temperature": 2.0, "top_k": 0.9, "top_p": 0.9}]
    prompts = [json.dumps({"prompt": "a red circle", "seed": 5, **one}) for one in settings]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    flags = ["--dalle_path", tiny_checkpoint, "--prompts_file", tmp_path / "prompts.jsonl", "--num_images", 2]
    flags += ["--format", "png", "--executable_cache_dir", tmp_path / "programs"]
    images = {}
    for device in ("cpu", "ipu"):
        command(generate.main, *flags, "--device", device, "--outputs_dir", tmp_path / device).ok()
        paths = sorted((tmp_path / device).rglob("*-seed-*.png"))
        images[device] = np.stack([np.array(Image.open(path)) for path in paths]).astype(int)
    assert sorted(poptorch_standin.MACHINE.compiled) == ["StaticSampler", "VqganDecoder"]
    assert "FullPass" not in poptorch_standin.MACHINE.calls
    assert len(list((tmp_path / "programs").iterdir())) == 2
    assert len(images["ipu"]) == 6 and abs(images["cpu"] - images["ipu"]).max() <= 1  # pixels are rounded
    assert len({image.tobytes() for image in images["ipu"]}) == 6


SHOW_SHARES = """
import sys
import train, training.checkpoints, training.run
write = training.checkpoints.write
def writing(path, what):
    print("writes", path.name)
    write(path, what)
training.checkpoints.write = writing
load_codes = training.run.load_codes
def encoding(images, encode, *places, **more):
    def encode_and_print(pixels):
        print("encodes", len(pixels))
        return encode(pixels)
    return load_codes(images, encode_and_print, *places, **more)
training.run.load_codes = encoding
if __name__ == "__main__":
    train.main(sys.argv[1:])
"""


def test_instances_share_the_data_and_train_as_one(poptorch_standin, command, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--device", "ipu", "--no-async-dataloader", "--epochs", 2, "--replication-factor", 2]
    flags += ["--batch-size", 1, "--gradient-accumulation", 2, "--embedding-serialization-factor", 2]
    alone = command(train.main, *flags, "--checkpoint-output-dir", tmp_path / "alone", "--random-seed", 7)
    flags += ["--codes-cache", tmp_path / "codes"]  # images are encoded on the IPUs that train afterwards
    flags += ["--checkpoint-output-dir", tmp_path / "together"]
    processes = []
    for index in range(2):  # as PopRun starts them; of their seeds, the first one's is for all
        numbers = {"NUM_TOTAL_REPLICAS": 2, "NUM_LOCAL_REPLICAS": 1, "INSTANCE_INDEX": index, "NUM_INSTANCES": 2}
        environment = {f"POPDIST_{name}": str(number) for name, number in numbers.items()}
        environment.update(PYTHONPATH=f"{STANDIN}{os.pathsep}{ROOT}", STANDIN_STORE=str(tmp_path / "store"))
        processes.append(start("-c", SHOW_SHARES, *flags, "--random-seed", 7 + index, env=environment))
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert sum(int(count) for out, _ in ended for count in re.findall(r"^encodes (\d+)$", out, re.M)) == 12
    assert_same_weights(tmp_path / "together" / "dalle_1.pt", tmp_path / "alone" / "dalle_1.pt", 1e-5)
    first, second = ("\n".join(part) for part in ended)
    assert "throughput" in first and "12 images, 6 steps of 4 samples" in first
    losses = [re.search(r"step 6/6 .* (loss: .*) lr", log).group(1) for log in (alone.out, first)]
    assert losses[0] == losses[1]  # means over both instances
    assert "throughput" not in second and "writes" not in second  # rank 0 writes and logs
    assert re.findall(r"^writes (.*)$", first, re.M) == ["dalle_0.pt", "dalle_1.pt"]
    assert sorted(path.name for path in (tmp_path / "together").glob("*.pt")) == ["dalle_0.pt", "dalle_1.pt"]


def test_what_poprun_overrides_and_needs(poptorch_standin, command, tiny_flags, monkeypatch, logged):
    from backends.ipu.backend import Instances

    for name, number in ("TOTAL_REPLICAS", "2"), ("LOCAL_REPLICAS", "2"), ("INSTANCES", "1"):
        monkeypatch.setenv(f"POPDIST_NUM_{name}", number)
    monkeypatch.setenv("POPDIST_INSTANCE_INDEX", "0")
    for given, lines in ((None, 0), (2, 0), (1, 1)):  # generate.py has no --replication-factor
        assert Instances(given).replicas == 2 and len(logged.messages) == lines
    monkeypatch.setitem(sys.modules, "horovod", None)
    command(train.main, *tiny_flags, *IPU).refused("Horovod", "pip install -r requirements-ipu.txt")
    monkeypatch.setitem(sys.modules, "popdist", None)
    command(train.main, *tiny_flags, *IPU).refused("popdist wheel")  # else each instance would train alone
