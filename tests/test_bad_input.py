"""What each command says to bad input: one line on stderr that names the file, flag or value, exit status 2, nothing
written, and nothing of a file's pickled code run.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

import evaluate
import generate
import process_captions
import train
import train_vqgan
from models.vqgan_files import load_vqgan
from tests.builders import PickledCall
from tests.conftest import ROOT, YTTM

BROKEN_CHECKPOINTS = "README.md empty_file binary cut cut_early pickled pickle_alone folder missing a_list no_hparams"
BROKEN_CHECKPOINTS += " vqgan/vqgan.ckpt"


@pytest.fixture(scope="module")
def things(tmp_path_factory, drawn_pictures, tiny_vqgan, tiny_checkpoint):
    """A folder of things to get wrong; the file names are in the tests' flags."""
    place = tmp_path_factory.mktemp("things")
    (place / "folder").mkdir()
    (place / "empty_file").touch()
    (place / "README.md").write_text("# A readme\n\n- of text\n")
    (place / "binary").write_bytes(bytes(range(256)) * 20)
    whole = tiny_checkpoint.read_bytes()
    (place / "good").write_bytes(whole)
    (place / "cut").write_bytes(whole[: len(whole) // 2])
    (place / "cut_early").write_bytes(whole[:100])
    evil = PickledCall(os.mkdir, str(place / "marker"))
    torch.save({"hparams": {}, "weights": {}, "extra": evil}, place / "pickled")
    (place / "pickle_alone").write_bytes(pickle.dumps(evil))
    torch.save([1, 2], place / "a_list")
    torch.save({"weights": {"model.text_emb.weight": torch.zeros(2)}}, place / "no_hparams")
    shutil.copytree(tiny_vqgan, place / "vqgan")

    for name in ("uncaptioned", "unreadable", "latin1"):
        shutil.copytree(drawn_pictures, place / name)
    for caption in (place / "uncaptioned").glob("*.txt"):
        caption.unlink()
    for caption in (place / "latin1").glob("*.txt"):
        caption.write_bytes("ein grünes Herz\n".encode("latin-1"))
    for number, picture in enumerate(sorted((place / "unreadable").glob("*.png"))):
        picture.write_bytes([b"", picture.read_bytes()[:90], b"<html>not here</html>"][number % 3])

    for name in ("no_params", "no_yaml", "other_sizes", "pickled_vqgan"):
        shutil.copytree(tiny_vqgan, place / name)
    (place / "no_params" / "vqgan.yaml").write_text("model:\n  target: taming.models.vqgan.VQModel\n")
    (place / "no_yaml" / "vqgan.yaml").write_text("model: [\n\t}\n")
    config = yaml.safe_load((tiny_vqgan / "vqgan.yaml").read_text())
    config["model"]["params"]["n_embed"] = 32
    (place / "other_sizes" / "vqgan.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": {"x": evil}}, place / "pickled_vqgan" / "vqgan.ckpt")

    (place / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a dog"}]}))
    return place


@pytest.fixture
def refused(command, things, tiny_flags, drawn_pictures, tmp_path, monkeypatch):
    """refused(command's name, flags, *words): the command ends with one line that holds the words, and writes nothing.

    In the flags {name} is a path among the things; the command's own valid flags stand before them.
    """
    out = tmp_path / "out"
    vqgan = f"--input-folder {drawn_pictures} --image-size 32 --patch-size 8 --ch 32 --ch-mult 1 --attn-resolutions= "
    vqgan += f"--num-res-blocks 1 --max-steps 3 --continuous-steps 1 --dataloader-workers 0 --output-dir {out}"
    draw = f"--dalle_path {things}/good --num_images 1 --precision fp32 --outputs_dir {out} --text=red"
    captions = ["--captions", str(things / "captions.json"), "--out-dir", str(out)]

    def captions_main(words):
        monkeypatch.setattr(sys, "argv", ["process_captions.py", *words])
        process_captions.main()

    mains = {
        "train": (train.main, [*tiny_flags, "--checkpoint-output-dir", str(out)]),
        "train_vqgan": (train_vqgan.main, vqgan.split()),
        "generate": (generate.main, draw.split()),
        "evaluate": (evaluate.main, f"--dalle_path {things}/good --prompts 1 --outputs-dir {out}".split()),
        "process_captions": (captions_main, captions),
    }
    monkeypatch.setattr("models.vqgan_training.SEED_CELLS", 1024)

    def run(name, flags, *words):
        main, fixed = mains[name]
        flags = flags.split() if isinstance(flags, str) else flags
        ended = command(main, *fixed, *[flag.format(place=things) for flag in flags])
        ended.refused("error: ", *(word.format(place=things) for word in words))
        assert "Traceback" not in ended.out and not (things / "marker").exists()
        assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}

    return run


PLACES = {
    "train --input-folder": "missing folder unreadable",
    "train_vqgan --input-folder": "missing folder README.md",
    "train --bpe-path": "missing empty_file binary good",
    "generate --bpe-path": "folder README.md",
    "train --vae-path": "missing folder no_params other_sizes",
    "generate --vqgan_model_path": "no_yaml pickled_vqgan",
    "train --pretrained-checkpoint": BROKEN_CHECKPOINTS,
    "generate --dalle_path": BROKEN_CHECKPOINTS,
    "evaluate --dalle_path": BROKEN_CHECKPOINTS,
}


@pytest.mark.parametrize("flag, path", [(flag, path) for flag, paths in PLACES.items() for path in paths.split()])
def test_files_that_cannot_be_read(refused, flag, path):
    name, flag = flag.split()
    refused(name, f"{flag} {{place}}/{path}", f"{{place}}/{path}")


CONTINUED = "--epochs 2 --pretrained-checkpoint {place}/good "


def test_values_that_cannot_be_used(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, flags, words in (
        ("train", "--input-folder {place}/uncaptioned", ["12 images and 0 .txt files"]),
        ("train", "--input-folder {place}/latin1", ["12 × neither UTF-8 nor UTF-16"]),
        ("train", "--input-folder {place}/unreadable --no-codes-cache", ["{place}/unreadable"]),
        ("train", "--text-seq-len 4", ["--truncate-captions"]),
        ("train", "--batch-size 13", ["13 samples"]),
        ("train", CONTINUED + "--hidden-size 64", ["{place}/good", "text_emb.weight is (8208, 32), not (8208, 64)"]),
        ("train", CONTINUED + "--num-hidden-layers 3", ["{place}/good", "transformer.layers.2"]),
        ("train", CONTINUED + "--sandwich-norm", ["{place}/good", "norm_out"]),
        ("train", CONTINUED + "--epochs 1", ["{place}/good", "give more --epochs or --max-steps"]),
        ("train", "--no-such-flag", ["--no-such-flag"]),
        ("train", "--checkpoint-output-dir {place}/README.md/below", ["{place}/README.md"]),
        ("train", "--codes-cache {place}/README.md/below", ["{place}/README.md"]),
        ("train_vqgan", "--image-size 36", ["--image-size", "36"]),
        ("train_vqgan", "--output-dir {place}/README.md/below", ["{place}/README.md"]),
        ("generate", ["--text", "red|\u2581"], ["--text", "no words"]),
        ("generate", ["--text", "red \udcff"], ["not valid Unicode"]),
        ("generate", ["--text", "red|" + "red " * 17], ["--text", "17 tokens", "16"]),
        ("generate", "--outputs_dir {place}/README.md/below", ["{place}/README.md"]),
        ("evaluate", "--max-pairs 3", ["--max-pairs", "--input-folder"]),
        ("evaluate", "--prompt-set train", ["--prompt-set", "score"]),
        ("evaluate", "--outputs-dir {place}/README.md/below", ["{place}/README.md"]),
        ("process_captions", "--captions {place}/missing.json", ["{place}/missing.json"]),
        ("process_captions", "--out-dir {place}/README.md/below", ["{place}/README.md"]),
        *((name, "--device abacus", ["--device"]) for name in ("train_vqgan", "evaluate")),
        *((name, f"--device {device}", ["--device"]) for name in ("train", "generate") for device in ("ipu", "cuda")),
    ):
        refused(name, flags, *words)


def test_a_checkpoint_of_another_vqgan_or_vocabulary(refused, things, tiny_vqgan, tmp_path):
    stored = torch.load(tiny_vqgan / "vqgan.ckpt", weights_only=True)
    stored["state_dict"]["quantize.embedding.weight"] += 1
    shutil.copytree(tiny_vqgan, tmp_path / "other")
    torch.save(stored, tmp_path / "other" / "vqgan.ckpt")
    sides = [load_vqgan(folder).fingerprint()[:12] for folder in (tiny_vqgan, tmp_path / "other")]
    going_on = "--epochs 2 --pretrained-checkpoint {place}/good"
    refused("train", f"{going_on} --vae-path {tmp_path}/other", "{place}/good", "--vae-path", *sides)
    numbers = YTTM.read_text().split("\n")
    numbers[1], numbers[2] = (f"{a.split()[0]} {b.split()[1]}" for a, b in (numbers[1:3], numbers[2:0:-1]))
    (tmp_path / "swapped.txt").write_text("\n".join(numbers))  # two characters have changed their ids
    refused("train", f"{going_on} --bpe-path {tmp_path}/swapped.txt", "{place}/good", "--bpe-path")
    refused("generate", f"--bpe_path {tmp_path}/swapped.txt", f"{tmp_path}/swapped.txt", "{place}/good")
    refused("generate", f"--vqgan_model_path {tmp_path}/other", f"{tmp_path}/other", "{place}/good", *sides)


@pytest.mark.parametrize("words, named", [(["photos"], "FOLDER"), (["--config", "demo"], "--config")])
def test_run_train_sh_refuses_before_it_installs(words, named, tmp_path):
    done = subprocess.run(["bash", ROOT / "run_train.sh", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert named in done.stderr and len(done.stderr.splitlines()) == 1
