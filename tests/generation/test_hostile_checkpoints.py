"""Files that claim more than they hold are refused before memory is allocated; what files say about captions."""

import resource

import torch

from generation.loading import load
from tests.builders import python
from utils import checkpoint

HUGE = 2**20


HOSTILE = {  # what a file says of its network
    "width": {"dim": HUGE},
    "depth": {"depth": 10**9},
    "no depth": {"depth": -1},
    "heads": {"heads": HUGE, "dim_head": HUGE},
    "text": {"text_seq_len": 2**40},
    # Its positions fit into the file, and its attention mask into no memory.
    "long text": {"text_seq_len": HUGE, "dim": 1, "heads": 1, "dim_head": 1},
    "word": {"dim": "wide"},
    "codes": {"n_embed": 2**40},
    "blocks": {"num_res_blocks": 10**9},
    "levels": {"ch_mult": [1] * 40, "resolution": 2**40},
    "channels": {"ch": 32 * HUGE},
    "patches": {"patch_size": 2**40, "in_channels": 3 * 2**80, "out_ch": 3 * 2**80},
    "shared values": {},
}


def test_hostile_sizes_are_refused_in_little_memory(tiny_checkpoint, tmp_path):
    for name, changes in HOSTILE.items():
        saved = checkpoint.read(tiny_checkpoint)
        params = saved["vae_params"]["params"]
        for key, value in changes.items():
            (place,) = (part for part in (saved["hparams"], params, params["ddconfig"]) if key in part)
            place[key] = value
        if not changes:
            text_emb = saved["weights"]["model.text_emb.weight"]
            saved["weights"]["model.text_emb.weight"] = torch.zeros(1).expand(text_emb.shape)
        torch.save(saved, tmp_path / f"{name}.pt")
    code = f"""if True:
        import pathlib, resource, time
        from generation.loading import load
        load({str(tiny_checkpoint)!r}, device="cpu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.pt")):
            started = time.monotonic()
            try:
                print(path.stem, "was loaded:", load(path, device="cpu"))
            except ValueError as error:
                assert "\\n" not in str(error) and len(str(error)) < 400, error
            assert time.monotonic() - started < 5, path
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)  # noqa: E731  spares the machine
    ended = python("-c", code, preexec_fn=limit)
    assert ended.returncode == 0, ended.stderr[-2000:]
    *loaded, kilobytes = ended.stdout.splitlines()
    assert loaded == [] and int(kilobytes) < 100_000


def test_words_and_examples_go_from_training_into_exported_files(tiny_checkpoint, tmp_path):
    path = tmp_path / "exported.safetensors"
    checkpoint.write_safetensors(path, checkpoint.read(tiny_checkpoint), half=True)
    models = [load(one, device="cpu", precision="fp32") for one in (tiny_checkpoint, path)]
    for loaded in models:
        assert loaded.words == models[0].words and loaded.words["circle"] > 1
        assert loaded.examples == models[0].examples and 0 < len(loaded.examples) <= 12
        assert loaded.unknown_words("A red Circle, two dogs and dogs!") == ["two", "dogs", "and"]
