"""The datasets: samples that depend on their key alone, whatever happens to images and to processes that read them."""

import multiprocessing
import os
import pickle
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train
from data import dataset as dataset_module
from data import loader
from data.dataset import TextImageDataset
from data.loader import RESTARTS, EpochOrder, GeneratedDataset, RunOrder, epoch_order, random_bits
from data.tokenizer import load_tokenizer
from tests.builders import assert_same_weights, one_line, python
from training.loop import Loop

LENGTH = 24


class Letters:
    """A token for each character, so that a test can read a row back."""

    vocab_size = 256
    fingerprint = "letters"
    unknown = path = None

    def encode(self, text):
        return list(map(ord, text))


def read(row):
    return "".join(map(chr, row.tolist())).rstrip("\0")


def make_set(folder, count=6, captions=3, size=(20, 16)):
    """Images of one color each, (10 i, 0, 0), with captions "picture i, way k"."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i, 0, 0)).save(folder / f"{i:03d}.png")
        lines = [f"picture {i}, way {k}" for k in range(captions)]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines))
    return folder


def dataset_of(folder, **options):
    return TextImageDataset(folder, Letters(), **{"text_seq_len": LENGTH, "image_size": 8, **options})


def test_a_sample(tmp_path):
    dataset = dataset_of(make_set(tmp_path))
    assert len(dataset) == 6
    text, image = dataset[3]
    assert text.dtype == torch.int64 and text.shape == (LENGTH,)
    assert read(text) in {f"picture 3, way {k}" for k in range(3)}
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8) and image.is_contiguous()
    assert torch.allclose(image[0], torch.tensor(30 / 255)) and (image[1:] == 0).all()
    assert torch.equal(dataset_of(tmp_path, byteio=True)[3][1], (image * 255).round().byte())
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(dataset[(2, 1)], copy[(2, 1)]))
    with pytest.raises(IndexError):
        dataset[6]
    assert len(list(dataset)) == 6


def test_draws_are_these_on_every_machine(tmp_path):
    """Written down once: a change here would break the exact resume of runs that are under way."""
    dataset = dataset_of(make_set(tmp_path), seed=42)
    ways = [[int(read(dataset[(epoch, i)][0])[-1]) for i in range(6)] for epoch in range(3)]
    assert ways == [[0, 1, 0, 0, 0, 1], [0, 1, 2, 0, 2, 0], [2, 2, 0, 0, 1, 0]]
    dropping = dataset_of(tmp_path, seed=42, caption_dropout=0.5)
    assert [[int(dropping[(epoch, i)][0].any()) for i in range(6)] for epoch in range(3)] == [
        [0, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1],
    ]
    assert epoch_order(8, 42, 0).tolist() == [3, 4, 5, 2, 7, 0, 1, 6]
    assert random_bits(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from seed 0, as published


def test_an_overlong_caption_names_its_file(tmp_path):
    folder = make_set(tmp_path)
    (folder / "004.txt").write_text("short\n" + "long " * 10)
    (folder / "001.txt").write_text("x" * LENGTH)
    with one_line("004.txt.*tokens long"):
        dataset_of(folder)
    rows = {read(dataset_of(folder, truncate_captions=True)[(epoch, 4)][0]) for epoch in range(20)}
    assert rows == {"short", ("long " * 10)[:LENGTH]}


def test_a_image_that_goes_bad_is_replaced_counted_and_logged_once(tmp_path, logged):
    folder = make_set(tmp_path)
    dataset = dataset_of(folder)
    whole = (folder / "005.png").read_bytes()
    (folder / "005.png").write_bytes(whole[:60])
    (folder / "000.png").unlink()
    for _ in range(3):
        text, image = dataset[(7, 5)]
        assert read(text).startswith("picture 1,") and torch.allclose(image[0], torch.tensor(10 / 255))
    assert torch.equal(text, dataset[(7, 1)][0])
    assert dataset.lost == 2
    _, first, second = logged.messages
    assert "005.png" in first and "000.png" in second


def test_workers_give_the_same_samples_and_share_the_count(tmp_path):
    folder = make_set(tmp_path, count=8)
    dataset = TextImageDataset(folder, load_tokenizer(), image_size=8, byteio=True, caption_dropout=0.2)
    (folder / "003.png").unlink()
    order = EpochOrder(len(dataset), 2, seed=5)
    batches = RunOrder(order, 0, 8)  # two epochs, of which workers learn from the keys
    here = list(DataLoader(dataset, batch_sampler=batches))
    dataset._flags.zero_()
    there = DataLoader(dataset, batch_sampler=batches, num_workers=2)
    for (text, image), (other_text, other_image) in zip(here, there):
        assert torch.equal(text, other_text) and torch.equal(image, other_image)
    assert dataset.lost == 1
    assert not all(torch.equal(text, other) for (text, _), (other, _) in zip(here[:4], here[4:]))


def test_images_that_could_not_be_encoded_leave(tmp_path, logged):
    dataset, _ = dataset_of(make_set(tmp_path)), logged.clear()
    codes = np.array([[5], [2], [1], [3]], dtype=np.uint16)
    dataset.attach_codes(codes, np.array([-1, 2, 1, 3, -1, 0]))
    assert [name for name, _, _ in dataset.images] == ["001.png", "002.png", "003.png", "005.png"]
    assert [read(dataset[i][0])[:9] for i in range(4)] == [f"picture {i}" for i in (1, 2, 3, 5)]
    assert [dataset[i][1].item() for i in range(4)] == [1, 2, 3, 5]
    assert "2 files" in logged.messages[-1] and "000.png, " in logged.messages[-1]


def test_a_validation_set_is_split_off_by_name(tmp_path):
    folder = make_set(tmp_path, count=20)
    dataset, other = dataset_of(folder, caption_dropout=1.0), dataset_of(folder, seed=7)
    for one in (dataset, other):
        one.attach_codes(np.arange(20, dtype=np.uint16)[:, None])
    validation = dataset.split_off(0.2)
    names = [[name for name, _, _ in part.images] for part in (dataset, validation)]
    assert len(names[1]) == 4 and sorted(names[0] + names[1]) == [f"{i:03d}.png" for i in range(20)]
    assert names[1] != names[1][:1] + [f"{i:03d}.png" for i in range(1, 4)] and names[1] == sorted(names[1])
    assert [name for name, _, _ in other.split_off(0.2).images] == names[1]  # whatever the seed
    for part, kept in zip((dataset, validation), names):
        assert [part[i][1].item() for i in range(len(part))] == [int(name[:3]) for name in kept]
    assert not dataset[0][0].any() and validation[0][0].any()  # without caption dropout
    assert read(validation.first_caption(0)) == f"picture {int(names[1][0][:3])}, way 0"
    (folder / "new.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "new.txt").write_text("new")
    grown = {name for name, _, _ in dataset_of(folder).split_off(0.2).images}
    assert len(grown & set(names[1])) >= 3
    with pytest.raises(ValueError, match="too few to split off"):
        dataset.split_off(0.99)


def test_generated_data():
    options = {"text_seq_len": 12, "num_text_tokens": 50, "image_size": 6, "seed": 1}
    dataset = GeneratedDataset(40, **options)
    assert all(torch.equal(a, b) for a, b in zip(dataset[7], GeneratedDataset(40, **options)[(9, 7)]))
    texts, images = (torch.stack(parts) for parts in zip(*dataset))
    assert texts.shape == (40, 12) and texts.min() == 1 and texts.max() == 49 and len(texts.unique(dim=0)) == 40
    assert images.shape == (40, 3, 6, 6) and 0 <= images.min() < 0.01 and 0.99 < images.max() < 1
    assert GeneratedDataset(40, **options, byteio=True)[3][1].dtype == torch.uint8
    dataset = GeneratedDataset(9, text_seq_len=5, num_text_tokens=9, num_image_codes=16, image_seq_len=64)
    codes = torch.stack([dataset[i][1] for i in range(9)])
    assert codes.dtype == torch.int64 and codes.shape == (9, 64) and codes.unique().tolist() == list(range(16))


@pytest.fixture
def trained(command, tiny_flags, picture_folder, tmp_path):
    """trained(*flags): train.py on pixels of picture_folder, 12 steps → (output folder, Ended)."""
    flags = ["--input-folder", picture_folder, "--no-codes-cache", "--epochs", 4, "--dataloader-workers", 2]

    def run(*more, name="out"):
        folder = tmp_path / name
        return folder, command(train.main, *tiny_flags, *flags, "--checkpoint-output-dir", folder, *more)

    return run


def after_updates(monkeypatch, count, act):
    """act() happens once, as soon as `count` updates are made."""
    update, made = Loop.update, []

    def updating(*arguments):
        losses = update(*arguments)
        made.append(losses)
        if len(made) == count:
            act()
        return losses

    monkeypatch.setattr(Loop, "update", updating)


def worker_reads(monkeypatch, bad, act=lambda path: os.kill(os.getpid(), signal.SIGKILL)):
    """act(path), by default the worker's death, where a worker reads an image for which bad(path)."""
    parent, read = os.getpid(), dataset_module.load_image

    def reading(path, size):
        if os.getpid() != parent and bad(path):
            act(path)
        return read(path, size)

    monkeypatch.setattr(dataset_module, "load_image", reading)


def test_when_no_picture_is_left_the_run_saves_and_ends(trained, picture_folder, monkeypatch):
    def spoil():
        for path in picture_folder.glob("*.png"):
            path.unlink()

    after_updates(monkeypatch, 4, spoil)
    folder, ended = trained()
    assert "Traceback" not in ended.out
    said = re.search(r"none of its 12 images can be read .* --pretrained-checkpoint (\S+)", ended.refused().err)
    step = torch.load(said[1], weights_only=True)["step"]
    assert said[1] == str(folder / f"dalle_step_{step}.pt") and 4 <= step < 12
    assert "12 images could not be read" in ended.out


def test_a_picture_that_kills_workers_is_left_out(trained, monkeypatch, picture_folder):
    worker_reads(monkeypatch, lambda path: path.name == "03.png")
    folder, ended = trained()
    ended.ok()
    told = [line for line in ended.out.splitlines() if "DataLoader worker" in line]
    assert len(told) == 1 and f"reading {picture_folder / '03.png'}; another image replaces it" in told[0]
    assert "1 image could not be read" in ended.out

    def unreadable(path):
        raise ValueError(f"{path}: cannot be read")

    monkeypatch.undo()
    worker_reads(monkeypatch, lambda path: path.name == "03.png", unreadable)
    other, ended = trained(name="other")
    ended.ok()
    assert_same_weights(folder / "dalle_3.pt", other / "dalle_3.pt")  # as if it had been unreadable


def test_workers_that_go_on_being_killed_end_the_run_and_are_counted_anew_after_a_while(tmp_path, monkeypatch, logged):
    dataset = dataset_of(make_set(tmp_path, count=4 * (RESTARTS + 2)))
    worker_reads(monkeypatch, lambda path: int(path.stem) % 4 == 0)
    order = [[index] for index in range(len(dataset))]
    with pytest.raises(loader.SamplesLost, match="if memory ran out, fewer --dataloader-workers need less$"):
        list(loader.read_in_workers(dataset, order, 1, 1, False))
    assert logged.text.count("new workers continue") == RESTARTS and f"reading {tmp_path / '000.png'}; " in logged.text
    dataset._flags.zero_()
    monkeypatch.setattr(loader, "CALM", 1)
    assert len(list(loader.read_in_workers(dataset, order, 1, 1, False))) == len(order)


def test_a_worker_killed_from_outside_changes_nothing(trained, monkeypatch):
    undisturbed, _ = trained("--gradient-accumulation", 3, "--batch-size", 1)
    killed = []

    def kill_one():
        victim = multiprocessing.active_children()[0]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)  # torch's handler is to find it

    step = Loop.update

    def killing_within(loop, batch):
        def parts():
            for number, part in enumerate(batch):
                if number == 1 and loop.run.step == 5 and not killed:
                    kill_one()  # gradients of one micro-batch of three are there
                yield part

        return step(loop, parts())

    monkeypatch.setattr(Loop, "update", killing_within)
    folder, ended = trained("--gradient-accumulation", 3, "--batch-size", 1, name="killed")
    assert ended.ok() and killed
    assert f"(pid {killed[0]}) is killed by signal: Killed" in ended.out and "new workers continue" in ended.out
    assert_same_weights(undisturbed / "dalle_3.pt", folder / "dalle_3.pt")


def test_ctrl_c_does_not_reach_a_worker_that_just_started():
    program = (
        "import os, signal\n"
        "from data.loader import GeneratedDataset, read_in_workers\n"
        "os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "dataset = GeneratedDataset(8, text_seq_len=4, num_text_tokens=9, image_size=8)\n"
        "print(len(list(read_in_workers(dataset, [[0, 1], [2, 3]], 2, workers=2, pin_memory=False))))\n"
    )
    done = python("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
