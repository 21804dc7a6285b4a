"""Run small models on the stand-in and print what was found as JSON, for test_contract.py.

python tests/cuda_contract/contract.py PART…, in the project's folder
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import standin

gpu = standin.install("h100")
sys.path[0] = os.getcwd()

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from backends.native.backend import NativeBackend, NativeTrainingBackend  # noqa: E402
from data.loader import TextImageDataset  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from generation.images import complete_caption, generate_batch, plan_image  # noqa: E402
from generation.loading import load  # noqa: E402
from models.sampling import Sampling  # noqa: E402
from tests.builders import small_dalle, train_settings  # noqa: E402
from tests.conftest import SHAPES, TinyTokenizer  # noqa: E402

PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
SETTINGS = {
    "plain": Sampling(),
    "nucleus, guided": Sampling(top_k=None, top_p=0.9, temperature=0.9, cond_scale=1.5),
    "given codes": Sampling(top_k=8.0),
}


def samples(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (count, 6), generator=random)
    text[::2, 4:] = 0
    return text, torch.randint(0, 32, (count, 16), generator=random)


def sampling():
    """What a code costs in bf16, one at a time."""
    text, codes = samples(2)
    model = small_dalle(TinyTokenizer(), attn_types=PATTERNS, depth=4, dim_head=32)
    sample = NativeBackend("cuda", "bf16").sampler(model, 2, 1)
    costs = []
    for count in (0, 12):  # codes that are given, so that the difference is the cost of twelve codes
        gpu.reset()
        sample(text, image_codes=codes[:, :count])
        costs.append(gpu.counts())
    per_code = {name: (costs[0][name] - costs[1][name]) / 12 for name in costs[0]}
    replays = gpu.launches["graph"]
    return {
        **codes_of((",".join(PATTERNS),)),
        "per_code": per_code,
        "replays": replays,
        "attention": sorted(gpu.attention),
    }


def codes_of(all_types):
    """Sample with each setting on both devices, in fp32; return which codes are equal, and cuDNN's plans."""
    text, codes = samples(5)
    text = text[[0, 0, 1, 1, 2]]
    equal = {}
    for types in all_types:
        model = small_dalle(TinyTokenizer(), weight_std=0.3, attn_types=tuple(types.split(",")), depth=4)
        for name, settings in SETTINGS.items():
            given = codes[:, : 5 if name == "given codes" else 0]
            found = []
            for device in ("cpu", "cuda"):
                noise = [torch.Generator().manual_seed(seed) for seed in range(5)]
                sample = NativeBackend(device, "fp32").sampler(model, 5, 1 if name == "plain" else 4)
                found.append(sample(text, settings, generator=noise, image_codes=given))
            equal[f"{types} {name}"] = torch.equal(*found)
    return {"equal": equal, "plans": len(gpu.plans)}


def training():
    """Losses on both devices, and what a step costs in bf16."""
    losses, costs, attention = {}, {}, set()
    flags = "--batch-size 2 --gradient-accumulation 3 --max-grad-norm 1 --optimizer "
    for device in ("cpu", "cuda"):
        backend = NativeTrainingBackend(train_settings(flags + "AdamW", device=device))
        trainer = backend.trainer(small_dalle(TinyTokenizer(), attn_types=PATTERNS, depth=4))
        trainer.set_lr(1e-3)
        text, codes = samples(6)
        losses[device] = [trainer.step(zip(text.split(2), codes.split(2))) for _ in range(3)]
        losses[device].append(trainer.evaluate([zip(text.split(4), codes.split(4))]))
    for rest in ("AdamW", "Muon --ema-decay 0.9"):
        backend = NativeTrainingBackend(train_settings(flags + rest, device="cuda", precision="bf16"))
        trainer = backend.trainer(small_dalle(TinyTokenizer(), attn_types=PATTERNS, depth=4, dim_head=32))
        batch = [[part.pin_memory() for part in pair] for pair in zip(text.split(2), codes.split(2))]
        trainer.compile(iter(batch))
        trainer.step(batch)
        gpu.reset()
        trainer.step(batch)
        costs[rest] = gpu.counts()
        trainer.evaluate([batch])
        attention |= set(gpu.attention)
    return {"losses": losses, "costs": costs, "attention": sorted(attention)}


def loading():
    """What the samples of a step cost if a set of codes is on the device, and whether they are the CPU's."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(8):
            Image.new("RGB", (8, 8)).save(f"{folder}/{number}.png")
            Path(folder, f"{number}.txt").write_text("red\nblue blue\n"[: 4 if number % 2 else None])
        dataset = TextImageDataset(folder, load_tokenizer(), text_seq_len=6, image_size=8, caption_dropout=0.3)
    dataset.attach_codes(samples(8)[1].numpy().astype("uint16"))
    dataset = dataset.split_off(0.75)
    dataset.caption_dropout, order = 0.3, [[(epoch, index) for index in (3, 0, -1, 4)] for epoch in range(6)]
    steps, costs = {}, {}
    for device in ("cpu", "cuda"):
        backend = NativeTrainingBackend(train_settings("--batch-size 2 --gradient-accumulation 2", device=device))
        backend.samples_per_step, loader = 4, backend.loader(dataset, order)
        first = list(next(loader))
        gpu.reset()
        read = [first, *(list(step) for step in loader)]
        costs[device] = {name: count / 5 for name, count in gpu.counts().items()}
        steps[device] = [[torch.cat(parts).cpu() for parts in zip(*step)] for step in read]
    pairs = zip(*(sum(read, []) for read in steps.values()))
    return {"equal": all(torch.equal(*pair) for pair in pairs), "per_step": costs["cuda"]}


def demo():
    """The bundled model: codes, a completed caption, encoding, and what happens without memory."""
    loads = {device: load(SHAPES, device=device) for device in ("cpu", "cuda")}
    codes, captions, encoded = {}, {}, {}
    for device, loaded in loads.items():
        specs = [plan_image(loaded, "a small red circle above a large blue square", seed) for seed in range(2)]
        codes[device] = generate_batch(loaded, specs)
        captions[device] = complete_caption(loaded, "a small red", 1)[1]  # the sampler has moved the model
        pixels = loads["cpu"].decode(codes["cpu"])
        gpu.reset()
        encoded[device] = loaded.encode(pixels)
    found = {"codes": torch.equal(*codes.values()), "encoded": torch.equal(*encoded.values()), "tf32": dict(gpu.tf32)}
    gpu.limit = gpu.allocated + 2**19
    try:
        generate_batch(loads["cuda"], specs)
    except ValueError as error:
        found["out_of_memory"] = str(error)
    gpu.limit = float("inf")
    found["afterwards"] = torch.equal(generate_batch(loads["cuda"], specs), codes["cpu"])
    return {**found, "captions": captions}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        found = {part: globals()[part]() for part in sys.argv[1:]}
    print(json.dumps(found))
