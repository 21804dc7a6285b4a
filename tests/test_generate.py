"""generate.py as a user starts it, with checkpoints of train.py and, by its layout, of the reference application."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from generation import command as command_module
from generation import images
from generation.command import save_images
from generation.loading import read_model
from models.dalle import DALLE
from models.sampling import sample_codes
from models.vqgan_files import load_vqgan
from tests.builders import WholePassStepper, contents, python, reference_weights, tokenize
from tests.conftest import ROOT, YTTM

HOSTILE = ["../../up", "..", ".", "...", "/etc/passwd", "a/b", "a\\b", "a b", "a_b", ".hidden", "~", "-rf", "a:b*c?"]
HOSTILE += ["con\x01\x1b[31m", "x" * 300, "x" * 299 + "y", "é" * 300, "日本 語", "日本_語", "grid.png", "prompt"]


@pytest.fixture
def drawn(command, tiny_checkpoint, tmp_path):
    """drawn(*flags) runs generate.py: by default, three images of "a red circle" in tmp_path / "out"."""
    fixed = ["--dalle_path", tiny_checkpoint, "--text", "a red circle", "--num_images", 3, "--precision", "fp32"]
    return lambda *flags: command(generate.main, *fixed, "--outputs_dir", tmp_path / "out", *flags)


def folders(outputs):
    return [path for path in outputs.iterdir() if path.is_dir()]


def numbered(folder, number):
    """Return a prompt's image by its number; the name has its seed, too."""
    (path,) = folder.glob(f"{number}-seed-*.*")
    return path


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_a_checkpoint_is_all_it_needs(tiny_checkpoint, tmp_path):
    alone = tmp_path / "alone.pt"
    alone.write_bytes(tiny_checkpoint.read_bytes())
    words = ["--dalle_path", alone, "--text", "a red circle|two  blue stars ", "--num_images", "3", "--batch_size", "2"]
    done = python(ROOT / "generate.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    names = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert names == {"a_red_circle", "two_blue_stars", "results.jsonl"}
    for folder in (tmp_path / "outputs").glob("*_*"):
        assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"0", "1", "2", "grid.png", "caption.txt"}
        assert all(Image.open(numbered(folder, number)).size == (32, 32) for number in range(3))
    assert (tmp_path / "outputs" / "two_blue_stars" / "caption.txt").read_text() == "two blue stars\n"


def test_images_are_saved_as_they_were_decoded(drawn, tiny_checkpoint, tmp_path):
    drawn("--seed", 11)
    model, tokenizer, _ = read_model(tiny_checkpoint)
    generators = [torch.Generator().manual_seed(11 + number) for number in range(3)]
    text = tokenize(tokenizer, ["a red circle"] * 3, 16)
    decoded = model.vae.decode(sample_codes(model, text, WholePassStepper(model), generator=generators))
    expected = (decoded * 255).round().permute(0, 2, 3, 1).numpy()
    assert expected.min() > 10 and expected.max() < 245  # so that stretching the contrast would change the images
    folder = tmp_path / "out" / "a_red_circle"
    for number in range(3):
        difference = pixels(numbered(folder, number)) - expected[number]
        assert np.abs(difference).mean() < 5 and np.abs(difference.mean()) < 0.5  # JPEG's part
    grid = pixels(folder / "grid.png")  # two columns, two pixels of white between
    assert grid.shape == (70, 70, 3) and (grid[36:68, 36:68] == 255).all()
    for number, (top, left) in enumerate([(2, 2), (2, 36), (36, 2)]):
        assert np.array_equal(grid[top : top + 32, left : left + 32], expected[number])


def test_files_are_written_while_the_next_images_are_generated(drawn, tmp_path, monkeypatch):
    order, is_generating = [], threading.Event()
    generate_batch, save = images.generate_batch, command_module.save_images

    def note_and_generate(loaded, specs, on_code=None):
        order.append(f"generate {specs[0].prompt}")
        if len(order) > 1:
            is_generating.set()
        return generate_batch(loaded, specs, on_code)

    def save_late(pictures, *given):
        assert is_generating.wait(60)
        order.append(f"save {pictures[0].info['prompt']}")
        return save(pictures, *given)

    monkeypatch.setattr(images, "generate_batch", note_and_generate)
    monkeypatch.setattr(command_module, "save_images", save_late)
    drawn("--text", "a red circle|a blue star", "--batch_size", 3)
    assert sorted(order[:3]) == ["generate a blue star", "generate a red circle", "save a red circle"]
    assert order[3:] == ["save a blue star"] and len(folders(tmp_path / "out")) == 2
    for lost in ("a red circle", "a blue star"):  # before others are generated, and after all are
        monkeypatch.setattr(command_module, "save_images", lambda pictures, *_, lost=lost: fill_disk(pictures, lost))
        drawn("--text", "a red circle|a blue star").refused("out/a.jpg: No space left on device")


@pytest.mark.parametrize("stops", [False, True])
def test_a_full_disk_is_noticed_after_a_batch_and_after_ctrl_c(drawn, monkeypatch, stops):
    batches, is_lost = [], threading.Event()
    generate_batch = images.generate_batch

    def generate_after_loss(loaded, specs, on_code=None):
        batches.append(specs[0].prompt)
        if specs[0].prompt == "a blue star":
            assert is_lost.wait(60)
            if stops:
                raise KeyboardInterrupt
        return generate_batch(loaded, specs, on_code)

    def lose(pictures, *_):
        is_lost.set()
        fill_disk(pictures, "a red circle")

    monkeypatch.setattr(images, "generate_batch", generate_after_loss)
    monkeypatch.setattr(command_module, "save_images", lose)
    drawn("--text", "a red circle|a blue star", "--batch_size", 1).refused("out/a.jpg: No space left on device")
    assert batches.count("a blue star") < 3


def fill_disk(pictures, lost):
    if pictures[0].info["prompt"] == lost:
        raise OSError(28, "No space left on device", "out/a.jpg")


def test_without_a_seed_images_differ_and_the_seed_is_logged(drawn, tmp_path):
    outs = [drawn("--outputs_dir", tmp_path / name, "--num_images", 1).ok().out for name in "01"]
    seed = outs[0].partition("seed ")[2].partition(",")[0]
    drawn("--outputs_dir", tmp_path / "2", "--num_images", 1, "--seed", seed).ok()
    images = [numbered(tmp_path / name / "a_red_circle", 0).read_bytes() for name in "012"]
    assert images[0] == images[2] != images[1]


def test_a_second_run_keeps_the_images_of_the_first(drawn, tmp_path):
    drawn("--seed", 1)
    folder = tmp_path / "out" / "a_red_circle"
    before = contents(folder)
    drawn("--seed", 2, "--num_images", 2)
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"3-seed-2.jpg", "4-seed-3.jpg", "grid-3.png"}


def test_every_prompt_gets_its_own_folder_in_the_output_folder(tmp_path):
    def saved(prompt, outputs):
        image = Image.new("RGB", (8, 8))
        image.info.update(prompt=prompt, seed=7)
        return save_images([image], outputs)

    outputs = tmp_path / "deep" / "outputs"
    folders = [saved(prompt, outputs) for prompt in HOSTILE]
    assert len(set(folders)) == len(HOSTILE)
    for prompt, folder in zip(HOSTILE, folders):
        assert folder.resolve().parent == outputs.resolve() and not folder.name.startswith(".")
        assert (folder / "caption.txt").read_text(encoding="utf-8") == prompt + "\n" and numbered(folder, 0)
        assert len(folder.name.partition("-")[0]) <= 100 and folder.name.isprintable()
    assert [*tmp_path.iterdir()] == [tmp_path / "deep"] and [*(tmp_path / "deep").iterdir()] == [outputs]
    assert folders[HOSTILE.index("a/b")].name == "a_b"
    again = saved("a/b", outputs)
    assert again == folders[HOSTILE.index("a/b")] and numbered(again, 1)
    (outputs / "taken").write_text("a file")
    assert saved("taken", outputs).name == "taken-2"


def test_flags_override_the_checkpoints_settings(drawn, tiny_checkpoint, tmp_path):
    def different(outputs):
        return len({Image.open(path).tobytes() for path in (outputs / "a_red_circle").glob("*-seed-*.jpg")})

    assert "top_k 0.99, top_p None, temperature 1.0, cond_scale 1.0" in drawn().out
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["sampling"] = {"top_k": 1.0, "top_p": None, "temperature": 0.7, "cond_scale": 1.5}
    torch.save(checkpoint, tmp_path / "advised.pt")
    advised = ["--dalle_path", tmp_path / "advised.pt", "--num_images", 4]
    ended = drawn(*advised, "--outputs_dir", tmp_path / "one")
    assert "top_k 1.0, top_p None, temperature 0.7, cond_scale 1.5" in ended.out
    assert different(tmp_path / "one") == 1  # the same image four times
    ended = drawn(*advised, "--outputs_dir", tmp_path / "all", "--top_k", 0, "--top_p", 0.9, "--cond_scale", 1)
    assert "top_k 0.0 (recommended 1.0), top_p 0.9 (recommended None), temperature 0.7, cond_scale 1.0 (" in ended.out
    assert different(tmp_path / "all") == 4


def test_the_model_completes_a_prompt(drawn, tmp_path):
    ended = drawn("--gentxt", "--seed", 3).ok()
    (folder,) = folders(tmp_path / "out")
    caption = (folder / "caption.txt").read_text(encoding="utf-8")
    assert caption.startswith("a red circle ") and caption.count("\n") == 1
    assert "completed prompt: a red circle" in ended.out
    drawn("--gentxt", "--seed", 3)
    assert folders(tmp_path / "out") == [folder] and numbered(folder, 5)


REFERENCE = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "text_seq_len": 80, "loss_img_weight": 7}
REFERENCE["attn_types"] = ("axial_row", "full")


def write_reference(path, vqgan, weights=None, split=1, half=False, sandwich_norm=False, **more):
    """Write a dalle_<epoch>.pt with a VQGAN's weights as the reference does; `more` are further entries."""
    weights = reference_weights() if weights is None else weights
    stored = {f"model.{name}": tensor for name, tensor in weights.items()}
    if split > 1:
        pieces = stored.pop("model.text_emb.weight").chunk(split)
        stored.update({f"model.text_emb.split_embeddings.{i}.weight": piece.clone() for i, piece in enumerate(pieces)})
    for name, tensor in vqgan.items():
        stored[f"model.vae.model.{name}"] = tensor.half() if half else tensor
    hparams = {**REFERENCE, "num_text_tokens": 8192, "ff_dropout": 0.0, "attn_dropout": 0.0, "fp16": half}
    hparams.update(sandwich_norm=sandwich_norm, embedding_ipu_id=0, embedding_serialization_factor=split)
    hparams.update(layers_per_ipu=[0, 2], cls_ipu_id=1, byteio=False, **more.pop("hparams", {}))
    adam = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    scheduler = {"last_epoch": 3, "_step_count": 4, "base_lrs": [1e-3]}
    saved = {"hparams": hparams, "vae_params": {}, "epoch": 3, "weights": stored}
    torch.save({**saved, "opt_state": adam, "scheduler_state": scheduler, **more}, path)
    return path


@pytest.fixture(scope="module")
def their_vocabulary(tmp_path_factory):
    """A vocabulary of 8,192 tokens under the reference's file name; our file of that name has other ids."""
    lines = YTTM.read_text().splitlines()
    lines[1:3] = [line.split()[0] + " " + other.split()[1] for line, other in zip(lines[1:3], lines[2:0:-1])]
    path = tmp_path_factory.mktemp("theirs") / YTTM.name
    path.write_text("\n".join(lines) + "\n")
    return path


def weights_of(vqgan):
    stored = torch.load(vqgan / "vqgan.ckpt", weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in stored.items() if not name.startswith("loss.")}


@pytest.mark.parametrize("kind", [{}, {"split": 8, "half": True}, {"split": 4, "sandwich_norm": True}])
def test_a_checkpoint_of_the_reference(drawn, tiny_vqgan, their_vocabulary, tmp_path, kind):
    sandwich_norm = kind.get("sandwich_norm", False)
    weights = reference_weights(sandwich_norm=sandwich_norm)
    damaged = {name: torch.zeros_like(x) for name, x in weights_of(tiny_vqgan).items()}  # the flags' VQGAN wins
    path = write_reference(tmp_path / "dalle_3.pt", damaged, weights, **kind)
    files = ["--vqgan_model_path", tiny_vqgan / "vqgan.ckpt", "--vqgan_config_path", tiny_vqgan / "vqgan.yaml"]
    drawn("--dalle_path", path, *files, "--bpe_path", their_vocabulary, "--text", "red " * 75, "--seed", 1)
    (folder,) = folders(tmp_path / "out")
    assert len(folder.name) == 100 and Image.open(numbered(folder, 2)).size == (32, 32)
    assert len(np.unique(pixels(folder / "grid.png"))) > 10

    vae = load_vqgan(str(tiny_vqgan))
    expected = DALLE(vae=vae, num_text_tokens=8192, sandwich_norm=sandwich_norm, **REFERENCE).eval()
    missing, unexpected = expected.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("vae.") for name in missing)
    loaded, tokenizer, _ = read_model(path, *files[1::2], their_vocabulary)
    text = tokenize(tokenizer, ["a red circle", "two blue stars"], 80)
    codes = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded(text, codes), expected(text, codes))
        assert torch.equal(loaded.vae.decode(codes), vae.decode(codes))


WINDOWS = {  # rows above a code, columns to its left, and columns to its right, that conv_like sees
    "the reference": ({}, (2, 2, 2)),
    "train.py, layout 2": ({"step": 12, "versions": {"layout": 2}}, (2, 2, 2)),
    "train.py before": ({"step": 12}, (4, 4, 0)),
}


@pytest.mark.parametrize("writer", WINDOWS)
def test_conv_like_is_that_of_the_writer(command, tiny_flags, tiny_vqgan, their_vocabulary, tmp_path, writer):
    more, (above, left, right) = WINDOWS[writer]
    types = {"hparams": {"attn_types": ("conv_like",)}}
    path = write_reference(tmp_path / "dalle_3.pt", weights_of(tiny_vqgan), **types, **more)
    flags = ["--text-seq-len", 80, "--attn-types", "conv_like", "--learning-rate", 1e-30, "--max-steps", 13]
    flags += ["--bpe-path", their_vocabulary]
    place = ["--checkpoint-output-dir", tmp_path / "onward", "--pretrained-checkpoint", path, "--epochs", 5]
    assert command(train.main, *tiny_flags, *flags, *place).status == 0

    expected = DALLE(vae=load_vqgan(str(tiny_vqgan)), num_text_tokens=8192, **{**REFERENCE, "attn_types": ("full",)})
    expected.eval().load_state_dict(reference_weights(), strict=False)
    mask = expected.transformer.layers[0][0].fn.fn.mask  # both layers have it
    for query in range(15):
        row, column = divmod(query, 4)
        for key in range(query):
            up, sideways = row - key // 4, column - key % 4
            mask[81 + query, 81 + key] = up <= above and -right <= sideways <= left
    text, codes = torch.randint(8192, (2, 80)), torch.randint(64, (2, 16))
    for file in (path, tmp_path / "onward" / "dalle_step_13.pt"):
        loaded, _, _ = read_model(file, tiny_vqgan / "vqgan.ckpt", bpe_path=their_vocabulary)
        with torch.no_grad():
            torch.testing.assert_close(loaded(text, codes), expected(text, codes))


@pytest.mark.parametrize("moments", ["with bias correction", "without", ""])
def test_training_continues_from_the_reference(command, tiny_flags, tiny_vqgan, their_vocabulary, tmp_path, moments):
    weights, more = reference_weights(), {}
    if moments:  # as PopTorch's Adam has them
        pieces = {f"model.{name}": tensor for name, tensor in weights.items() if name != "text_emb.weight"}
        parts = enumerate(weights["text_emb.weight"].chunk(4))
        pieces.update({f"model.text_emb.split_embeddings.{i}.weight": part for i, part in parts})
        state = {f"{kind}___{name}": tensor.abs() for kind in ("Accl1", "Accl2") for name, tensor in pieces.items()}
        if moments != "without":
            state.update({f"Step___{name}": torch.tensor([21.0]) for name in pieces})
        groups = [{"lr": 1e-3, "params": [0, 1]}, {"lr": 1e-3, "params": [2]}]
        more["opt_state"] = {"state": {}, "param_groups": groups, "ipu_state": state, "ipu_param": {}}
    path = write_reference(tmp_path / "dalle_3.pt", weights_of(tiny_vqgan), split=4, half=True, **more)
    flags = ["--text-seq-len", 80, "--attn-types", "axial_row,axial_row", "--learning-rate", 1e-30]
    flags += ["--bpe-path", their_vocabulary, "--adam-betas", "0.9999999,0.9999999"]
    flags += ["--pretrained-checkpoint", path, "--epochs", 4, "--checkpoint-output-dir", tmp_path / "onward"]
    ended = command(train.main, *tiny_flags, *flags).ok()
    assert "at step 9" in ended.out  # after three epochs of three steps each
    assert ("optimizer state" in ended.out and "starts afresh" in ended.out) == (not moments)
    assert "--attn-types axial_row,axial_row, was axial_row,full" in ended.out
    onward = torch.load(tmp_path / "onward" / "dalle_3.pt", weights_only=True)
    assert onward["step"] == 12 and onward["epoch"] == 3
    assert all(torch.equal(onward["weights"][f"model.{name}"], tensor) for name, tensor in weights.items())
    if moments:
        adam = onward["opt_state"][0]["state"]
        assert {int(own["step"]) for own in adam.values()} == {(1_000_000 if moments == "without" else 21) + 3}
        torch.testing.assert_close(adam[0]["exp_avg"], weights["text_emb.weight"].abs(), atol=1e-4, rtol=0)


def test_checkpoints_of_the_reference_are_not_replaced(command, tiny_flags, tiny_vqgan, their_vocabulary, tmp_path):
    """Ours of epoch 3 has their name, and older ones than --keep-checkpoints are removed."""
    for epoch in range(4):
        path = write_reference(tmp_path / f"dalle_{epoch}.pt", weights_of(tiny_vqgan))
    before = contents(tmp_path)
    flags = ["--text-seq-len", 80, "--attn-types", "axial_row,full", "--bpe-path", their_vocabulary, "--epochs", 5]
    for start in (["--pretrained-checkpoint", path], ["--resume"]):
        ended = command(train.main, *tiny_flags, *flags, *start, "--checkpoint-output-dir", tmp_path)
        ended.refused("dalle_3.pt: is of another program")
    assert contents(tmp_path) == before


def test_our_vocabulary_of_the_same_name_is_refused(command, drawn, tiny_flags, tiny_vqgan, tmp_path):
    """Both have 8,192 tokens: with the wrong one, a prompt would become other words without a warning."""
    path = write_reference(tmp_path / "dalle_3.pt", weights_of(tiny_vqgan))
    flags = ["--text-seq-len", 80, "--attn-types", "axial_row,full", "--pretrained-checkpoint", path]
    files = ["--vqgan_model_path", tiny_vqgan / "vqgan.ckpt", "--bpe_path", YTTM]
    for ended in (drawn("--dalle_path", path, *files), command(train.main, *tiny_flags, *flags)):
        ended.refused("dalle_3.pt", "bpe_yttm_vocab.txt", "another program")


def test_clips_vocabulary_is_the_default_and_any_bytes_make_a_caption(drawn, tiny_vqgan, tmp_path):
    weights, more = reference_weights(text_tokens=49408), {"hparams": {"num_text_tokens": 49408}}
    path = write_reference(tmp_path / "dalle_3.pt", weights_of(tiny_vqgan), weights, **more)
    flags = ["--dalle_path", path, "--vqgan_model_path", tiny_vqgan / "vqgan.ckpt", "--num_images", 1]
    drawn(*flags, "--gentxt", "--temperature", 2).ok()  # random weights: halves of characters among the 80 tokens
    drawn(*flags, "--bpe_path", YTTM).refused("49408 text tokens", "8192", "--bpe_path")
