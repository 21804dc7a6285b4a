"""The forms other than a folder of .txt files: each gives the same images and captions as that folder does."""

import csv
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.codes import CodeCache, load_codes
from data.dataset import TextImageDataset
from data.files import NO_CAPTION, NO_IMAGE, ZERO_BYTES
from data.images import load_image
from data.sources import captions_lists, find_images, open_source, tar
from data.sources.table import NO_TEXT
from data.tokenizer import load_tokenizer
from tests.builders import one_line
from tests.conftest import YTTM

CAPTIONS = {"a": ["a dog", "two dogs, and a cat"], "b": ["a red bus"], "c": ["a man's hat"]}
ROWS = [(f"{name}.jpg", number, text) for name, texts in CAPTIONS.items() for number, text in enumerate(texts)]
PAIRS = [(name, text) for name, _, text in ROWS]
RESULTS = [{"image_id": number, "caption": text} for number, name in enumerate("abc") for text in CAPTIONS[name]]
VAE = SimpleNamespace(image_size=8, image_seq_len=4, num_tokens=256, fingerprint=lambda: "0123")


def bare_images(folder, suffix="jpg"):
    """Three images without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(CAPTIONS):
        random = np.random.default_rng(number)
        Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(folder / f"{name}.{suffix}")
    return folder


def table(*rows, **options):
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


def karpathy(splits, captions):
    images = [
        {"filepath": "val2014", "filename": f"{name}.jpg", "split": split, "sentences": [{"raw": t} for t in texts]}
        for (name, texts), split in zip(captions.items(), splits)
    ]
    return json.dumps({"images": images, "dataset": "coco"})


COCO = {"images": [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate("abc")]}
COCO["annotations"] = [{"id": 0, **result} for result in RESULTS]
FLICKR30K = [("image_name", " comment_number", " comment"), *((name, f" {n}", f" {text}") for name, n, text in ROWS)]
LISTS = {  # the file that lists the images: their folder, and what it says
    "metadata.jsonl": ("", "\n".join(json.dumps({"file_name": f"{n}.jpg", "text": t}) for n, t in CAPTIONS.items())),
    "metadata.csv": ("", table(("file_name", "text"), *PAIRS)),
    "captions.txt": ("Images", "\n".join(["image,caption", *map(",".join, PAIRS)])),  # Flickr8k quotes no commas
    "Flickr8k.token.txt": ("Flicker8k_Dataset", "\n".join(f"{name}#{n}\t{text}" for name, n, text in ROWS)),
    "results.csv": ("flickr30k_images", table(*FLICKR30K, delimiter="|")),
    "annotations/captions_train2014.json": ("train2014", json.dumps(COCO)),
    "dataset_coco.json": ("val2014", karpathy(("train", "restval", "train"), CAPTIONS)),
    "captions.json": ("", json.dumps({f"{name}.jpg": texts for name, texts in CAPTIONS.items()})),
    "dataset.json": ("val2014", karpathy(("train", "val", "test"), {name: ["x"] for name in CAPTIONS})),
    "all.csv": ("", "image,caption,split\na.jpg,x,train\nb.jpg,x,val\nc.jpg,x,test\n"),
}


def write_list(folder, name):
    images, content = LISTS[name]
    bare_images(folder / images)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    if "captions_train" in name:
        (folder / name.replace("captions", "instances")).write_text("{}")


def sidecars(folder):
    for name, texts in CAPTIONS.items():
        (bare_images(folder) / f"{name}.json").write_text(json.dumps({"caption": texts, "url": "x"}))


def metadata_parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names, texts = zip(*PAIRS)
    parquet.write_table(pyarrow.table({"file_name": names, "caption": texts}), bare_images(folder) / "metadata.parquet")


def write_tar(folder, shard, files):
    """Write a tar of texts and, under names of images, those images of the folder, which it replaces."""
    with tarfile.open(folder / shard, "a") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            data = (folder / name).read_bytes() if content is None else content.encode()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            if content is None:
                (folder / name).unlink()


def tar_shards(folder):
    """Two shards, as img2dataset writes them: the second has its captions in .json only."""
    bare_images(folder)
    for shard, names in (("00000", "ab"), ("00001", "c")):
        for name in names:
            text = {f"{name}.txt": "\n".join(CAPTIONS[name])} if shard == "00000" else {}
            more = {f"{name}.json": json.dumps({"caption": CAPTIONS[name][0], "url": "x"})}
            write_tar(folder, f"{shard}.tar", {f"{name}.jpg": None, **text, **more})
        (folder / f"{shard}_stats.json").write_text('{"count": 2}')


def shards_of_splits(folder):
    bare_images(folder)
    for name, split in zip(CAPTIONS, ("train", "val", "test")):
        write_tar(folder, f"{split}-0000.tar", {f"{name}.jpg": None, f"{name}.txt": "x"})


def coco_results(folder):
    bare_images(folder)
    for number, name in enumerate(CAPTIONS):
        (folder / f"{name}.jpg").rename(folder / f"COCO_val2014_{number:012}.jpg")
    (folder / "results.json").write_text(json.dumps(RESULTS))


def dataset_rows(folder):
    datasets = pytest.importorskip("datasets")
    source = bare_images(folder.with_name("originals"))
    columns = {"picture": [str(source / f"{name}.jpg") for name in CAPTIONS], "caption": list(CAPTIONS.values())}
    columns["id"] = ["x", "y", "z"]
    return datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())


def saved_dataset(folder):
    rows = dataset_rows(folder)
    rows.save_to_disk(str(folder / "train"), num_shards=3)
    rows.save_to_disk(str(folder / "train"), num_shards=2)  # leaves a file of three behind
    rows.select([2]).save_to_disk(str(folder / "test"))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def hub_parquet(folder):
    """Two files with images inside, as push_to_hub writes them, the first of two row groups; and a validation file."""
    rows = dataset_rows(folder)
    from datasets.table import embed_table_storage

    rows = rows.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
    (folder / "data").mkdir(parents=True)
    rows.select([0, 1]).to_parquet(folder / "data" / "train-00000-of-00002.parquet", batch_size=1)
    rows.select([2]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    rows.select([1]).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    (folder / "data" / "state.json").write_text('{"of": "another program"}')
    (folder / "README.md").write_text("---")


OTHERS = {"annotations/captions_train2014.json": ["instances_train2014.json"]}
OTHERS["tar_shards"] = ["00000_stats.json", "00001_stats.json"]
WRITERS = (metadata_parquet, coco_results, sidecars, tar_shards, shards_of_splits, saved_dataset, hub_parquet)
WRITERS = {writer.__name__: writer for writer in WRITERS}
SPLITS = ("dataset.json", "all.csv", "shards_of_splits")


def write_form(form, folder):
    WRITERS[form](folder) if form in WRITERS else write_list(folder, form)


@pytest.mark.parametrize("form", [form for form in (*LISTS, *WRITERS) if form not in SPLITS])
def test_every_form_gives_what_the_folder_gives(form, tmp_path):
    folder = tmp_path / "set"
    write_form(form, folder)
    source = open_source(folder)
    read = [source.captions(name) for name, _, _ in source.texts]
    assert read == list(CAPTIONS.values()) and len(set(source.images)) == len(CAPTIONS)
    plain = bare_images(tmp_path / "plain")
    for (name, _, _), original in zip(source.images, sorted(plain.iterdir())):
        assert np.array_equal(load_image(source.image(name), 8), load_image(original, 8))
    assert not any(source.skipped.values())
    if form not in ("saved_dataset", "hub_parquet"):
        assert [name.rpartition("/")[2] for name in source.others] == OTHERS.get(form, [])
    assert len(find_images(folder)) == len(CAPTIONS)

    tokenizer = load_tokenizer(YTTM)
    for _ in range(2):  # the second time from the caches
        dataset = TextImageDataset(folder, tokenizer, text_seq_len=16, image_size=8, cache_dir=tmp_path / "cache")
        cache = CodeCache(dataset.folder, tmp_path / "cache", VAE)
        seen = []

        def encode(pixels, seen=seen):
            seen.append(len(pixels))
            return (torch.nn.functional.avg_pool2d(pixels.mean(1), 4).flatten(1) * 255).round().long()

        pixels = dataset[1][1]
        dataset.attach_codes(*load_codes(dataset.images, encode, cache, paths=dataset.image_paths(), workers=1))
        assert torch.equal(dataset[1][1], encode(pixels[None])[0])
    assert sum(seen) == 1  # only that of the comparison


def test_text_files_come_first_and_files_can_be_named(tmp_path):
    write_list(tmp_path, "annotations/captions_train2014.json")
    captions = tmp_path / "annotations" / "captions_train2014.json"
    named = open_source(captions)
    assert [name for name, _, _ in named.images] == ["train2014/a.jpg", "train2014/b.jpg", "train2014/c.jpg"]
    with pytest.raises(ValueError, match=f"give {captions} instead"):
        open_source(tmp_path / "train2014")
    (tmp_path / "train2014" / "b.txt").write_text("from a file")
    source = open_source(tmp_path)
    assert [source.captions(name) for name, _, _ in source.texts] == [["from a file"]]
    assert "annotations/captions_train2014.json" in source.others


@pytest.mark.parametrize("form", [*SPLITS, "hub_parquet"])
def test_training_and_validation_read_their_own_split(form, tmp_path):
    write_form(form, tmp_path / "set")
    parts = [set(open_source(tmp_path / "set", validation=validation).texts) for validation in (False, True)]
    assert not parts[0] & parts[1] and [*map(len, parts)] == [3 if form == "hub_parquet" else 1, 1]


def test_tables_of_many_programs(tmp_path):
    """A list in a field, two columns without names, and images that were converted to another format since."""
    bare_images(tmp_path, "png")
    expected = dict(zip(("a.png", "b.png"), (["a dog", "two dogs"], ["a bus, parked"])))
    for content in (
        'raw,filename\n"[""a dog"", ""two dogs""]",a.jpg\n"a bus, parked",b.jpg\n',
        'image,caption_0,caption_1\na.png,a dog,two dogs\nb.png,"a bus, parked",\n',
        "a.png\ta dog\na.png\ttwo dogs\nb.png\ta bus, parked\n",
        "a.png,a dog\na.png,two dogs\nb.png,a bus, parked\n",
        "image| number| comment\na.jpg| 0| a dog\na.jpg| 1   lost\na.jpg| 2| two dogs\nb.jpg| 0| a bus, parked\n",
    ):
        (tmp_path / "list.csv").write_text(content)
        source = open_source(tmp_path)
        assert {name: source.captions(name) for name, _, _ in source.texts} == expected
        assert NO_TEXT not in source.skipped
    fields = ["[1, 2]", "[{[]: 1}]", "['a', 'b']", "[]"]
    assert captions_lists._captions_of(fields) == ["[1, 2]", "[{[]: 1}]", "a", "b"]


def test_lists_that_cannot_be_used(tmp_path):
    bare_images(tmp_path)
    for name, content, words in (
        ("captions.json", '{"images": [', "captions.json is not a JSON file, or is cut short: .*line 1"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"file', "metadata.jsonl, line 2: not a JSON object"),
        ("metadata.parquet", "PAR1 no", "metadata.parquet: cannot be read as a Parquet file"),
        ("notes.csv", "one,two\n1,2\n", "notes.csv: is no list of images and captions"),
        ("metadata.csv", "file_name,text\nz.jpg,a dog\n", "none of 1 listed images can be used .*missing"),
        ("metadata.csv", "image,caption\na.jpg,caf\udce9\n", "metadata.csv: is neither UTF-8 nor UTF-16; save"),
        ("labels.csv", "file_name,label\na.jpg,3\n", "labels.csv: has no column of captions, .* only file_name, label"),
        ("set.tar.gz", "", "set.tar.gz: is compressed; unpack it"),
        ("set.tar", "", "no image with a caption in 1 tar file"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
        with one_line(words):
            open_source(tmp_path / name)


def test_a_damaged_list_is_not_replaced_by_that_of_another_split(tmp_path):
    bare_images(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n{"file')
    (tmp_path / "val.jsonl").write_text('{"file_name": "b.jpg", "text": "x"}\n')
    with one_line("train.jsonl, line 2: not a JSON object"):
        open_source(tmp_path)


def test_damaged_shards_keep_what_can_be_read(tmp_path):
    tar_shards(tmp_path)
    more = {"sub/d.e.jpg": "", "sub/d.txt": "a dog", "f.jpg": "", "f.txt": "a dog", "lonely.png": "x", "g.txt": "a dog"}
    write_tar(tmp_path, "00001.tar", more)
    source = open_source(tmp_path, cache_dir=tmp_path)
    assert {reason: [path.name for path in paths] for reason, paths in source.skipped.items()} == {
        NO_IMAGE: ["d.txt", "g.txt"],
        NO_CAPTION: ["lonely.png"],
        ZERO_BYTES: ["f.jpg"],
    }
    assert len(source.images) == 3 and list(source.others) == ["00000_stats.json", "00001_stats.json"]
    write_tar(tmp_path, "00000.tar", {"a.jpg": "newer", "a.txt": "a newer dog"})
    again = open_source(tmp_path, cache_dir=tmp_path)
    name = "00000.tar/a.jpg"
    assert (again.image(name).read(), again.captions(name)) == (b"newer", ["a newer dog"])
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) * 3 // 10])
    cut = open_source(tmp_path, cache_dir=tmp_path)
    assert tar.CUT_SHORT in cut.skipped
    assert [name for name, _, _ in cut.images] == ["00000.tar/a.jpg", "00001.tar/c.jpg"]
    for damaged in "{", '{"version": 1, "shards": []}':
        (tmp_path / "tar-index.json").write_text(damaged)
        assert open_source(tmp_path, cache_dir=tmp_path).images == cut.images
    damaged = bytearray(whole)
    damaged[whole.index(b"b.jpg")] ^= 1  # a header, whose checksum no longer fits
    (tmp_path / "00000.tar").write_bytes(damaged)
    assert tar.CUT_SHORT in open_source(tmp_path, cache_dir=tmp_path).skipped


def test_sets_that_share_a_cache_index_their_shards_once(tmp_path, monkeypatch):
    for name in ("one", "two"):
        tar_shards(tmp_path / name)
    index, seen = tar.index_shard, []
    monkeypatch.setattr(tar, "index_shard", lambda path: seen.append(path) or index(path))
    for name in ("one", "two", "one", "two"):
        open_source(tmp_path / name, cache_dir=tmp_path)
    assert len(seen) == 4


def test_a_damaged_image_of_a_shard_is_skipped_as_a_file_is(tmp_path, logged):
    tar_shards(tmp_path)
    whole = (tmp_path / "00000.tar").read_bytes()
    start = open_source(tmp_path).image("00000.tar/b.jpg").offset
    (tmp_path / "00000.tar").write_bytes(whole[:start] + bytes(300) + whole[start + 300 :])
    dataset = TextImageDataset(tmp_path, load_tokenizer(YTTM), text_seq_len=16, image_size=8)
    cache = CodeCache(tmp_path, tmp_path / "cache", VAE)
    assert torch.equal(dataset[1][1], dataset[2][1])  # another image replaces it
    rows = load_codes(dataset.images, lambda x: torch.zeros(len(x), 4).long(), cache, paths=dataset.image_paths())
    dataset.attach_codes(*rows)
    assert [name for name, _, _ in dataset.images] == ["00000.tar/a.jpg", "00001.tar/c.jpg"]
    assert "00000.tar/b.jpg: not an image" in logged.text
    (tmp_path / "00001.tar").write_bytes(b"")
    with pytest.raises(OSError, match="00001.tar: has become shorter since it was indexed"):
        dataset.source.image("00001.tar/c.jpg").read()
