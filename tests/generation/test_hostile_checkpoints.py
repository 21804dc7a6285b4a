"""Files that claim more than they hold are refused before memory is allocated; what files say about captions."""

import copy
import resource
import subprocess
import sys

import torch

from generation.loading import load
from tests.conftest import ROOT
from utils import checkpoint

HUGE = 2**20


def with_hparams(**changes):
    def change(saved):
        saved["hparams"].update(changes)

    return change


def with_vqgan(**changes):
    def change(saved):
        params = saved["vae_params"]["params"]
        params.update({key: value for key, value in changes.items() if key in params})
        params["ddconfig"].update({key: value for key, value in changes.items() if key not in params})

    return change


def with_shared_values(saved):
    name = "model.text_emb.weight"
    saved["weights"][name] = torch.zeros(1).expand(saved["weights"][name].shape)


def with_long_text(saved):
    """A text so long that its positions fit into the file, and its attention mask into no memory."""
    saved["hparams"].update(text_seq_len=HUGE, dim=1, heads=1, dim_head=1)


HOSTILE = {
    "width": with_hparams(dim=HUGE),
    "depth": with_hparams(depth=10**9),
    "no depth": with_hparams(depth=-1),
    "heads": with_hparams(heads=HUGE, dim_head=HUGE),
    "text": with_hparams(text_seq_len=2**40),
    "long text": with_long_text,
    "word": with_hparams(dim="wide"),
    "codes": with_vqgan(n_embed=2**40),
    "blocks": with_vqgan(num_res_blocks=10**9),
    "levels": with_vqgan(ch_mult=[1] * 40, resolution=2**40),
    "channels": with_vqgan(ch=32 * HUGE),
    "patches": with_vqgan(patch_size=2**40, in_channels=3 * 2**80, out_ch=3 * 2**80),
    "shared values": with_shared_values,
}


def test_hostile_sizes_are_refused_in_little_memory(tiny_checkpoint, tmp_path):
    saved = checkpoint.read(tiny_checkpoint)
    for name, change in HOSTILE.items():
        hostile = copy.deepcopy(saved)
        change(hostile)
        torch.save(hostile, tmp_path / f"{name}.pt")
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
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
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
