"""What the program promises of a CUDA GPU, on the stand-in; test_contract.py runs these tests in another process."""

import collections

import pytest
import standin
import torch
from PIL import Image

from backends.native import compilation
from backends.native.backend import NativeBackend, NativeTrainingBackend
from data.dataset import TextImageDataset
from data.tokenizer import load_tokenizer
from generation.images import complete_caption, generate_batch, plan_image
from generation.loading import load
from models.sampling import Sampling
from tests.builders import samples, small_dalle, train_settings
from tests.conftest import SHAPES

GPU = standin.GPU
PATTERNS = ("full", "axial_row", "axial_col", "conv_like")


def assert_no_boolean_mask(causal):
    """Causal layers need no mask, other patterns have a bias that is made once."""
    assert causal in GPU.attention and not any("bool" in kind for kind in GPU.attention), GPU.attention


def test_a_code_costs_few_launches_and_waits(tiny_vae):
    """One code at a time; a pass and the choice of its codes are one launch, of a captured graph."""
    text, codes = samples(2)
    model = small_dalle(tiny_vae, attn_types=PATTERNS, depth=4, dim_head=32)
    sample, costs = NativeBackend("cuda", "bf16").sampler(model, 2, 1), []
    for count in (0, 0, 12):  # codes that are given, so that the difference is the cost of twelve codes
        GPU.reset()
        sample(text, image_codes=codes[:, :count])
        costs.append(GPU.counts())
    per_code = {name: (costs[1][name] - costs[2][name]) / 12 for name in costs[0]}
    assert all(per_code[name] <= 1 for name in ("launches", "copies", "waits")), per_code
    assert GPU.launches["graph"] == 3  # of the last four codes, the first comes from the pass over the captions
    assert_no_boolean_mask("flash bfloat16")
    assert not GPU.plans  # cuDNN would build one for each form of input


def uniform_numbers(generators, count):
    """What a GPU with Triton generates."""
    return torch.stack([torch.rand(count, generator=generator) for generator in generators]).cuda()


GUIDED = Sampling(top_k=None, top_p=0.9, temperature=0.9, cond_scale=1.5)


@pytest.mark.parametrize("sampling, given, window", [(Sampling(), 0, 1), (GUIDED, 0, 4), (Sampling(top_k=8.0), 5, 4)])
def test_codes_in_fp32_are_the_cpus(tiny_vae, sampling, given, window):
    text, codes = samples(5)
    model = small_dalle(tiny_vae, weight_std=0.3, attn_types=PATTERNS, depth=4)
    found = []
    for device in ("cpu", "cuda"):
        noise = [torch.Generator().manual_seed(seed) for seed in range(5)]
        sample = NativeBackend(device, "fp32").sampler(model, 5, window)
        if device == "cuda" and window > 1:
            sample.stepper.uniform_numbers = uniform_numbers
        found.append(sample(text[[0, 0, 1, 1, 2]], sampling, generator=noise, image_codes=codes[:, :given]))
    assert torch.equal(*found) and not GPU.plans
    assert sample.stepper.graphs.keys() == {(sampling, window)}


FLAGS = "--batch-size 2 --gradient-accumulation 3 --max-grad-norm 1 --optimizer "


def test_training_equals_the_cpus(tiny_vae):
    losses = []
    for device in ("cpu", "cuda"):
        backend = NativeTrainingBackend(train_settings(FLAGS + "AdamW", device=device))
        trainer = backend.trainer(small_dalle(tiny_vae, attn_types=PATTERNS, depth=4))
        trainer.set_lr(1e-3)
        text, codes = samples(6)
        losses.append([trainer.step(zip(text.split(2), codes.split(2))) for _ in range(3)])
        losses[-1].append(trainer.evaluate([zip(text.split(4), codes.split(4))]))
    for expected, ours in zip(*losses):
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "rest, precision, launches, waits",
    [("AdamW", "bf16", 343, 1), ("Muon --ema-decay 0.9", "bf16", 448, 1), ("Muon --ema-decay 0.9", "fp16", 469, 2)],
)
def test_an_update_costs_few_launches_and_waits(tiny_vae, rest, precision, launches, waits):
    backend = NativeTrainingBackend(train_settings(FLAGS + rest, device="cuda", precision=precision))
    trainer = backend.trainer(small_dalle(tiny_vae, attn_types=PATTERNS, depth=4, dim_head=32))
    batch = [[part.pin_memory() for part in pair] for pair in zip(*(part.split(2) for part in samples(6)))]
    trainer.compile(iter(batch))
    trainer.step(batch)
    GPU.reset()
    trainer.step(batch)
    costs = GPU.counts()
    trainer.evaluate([batch])
    assert costs["launches"] <= launches and costs["copies"] <= 7 and costs["waits"] <= waits, costs
    assert_no_boolean_mask("cudnn bfloat16" if precision == "bf16" else "cudnn float16")


def test_layers_and_losses_are_compiled_for_training_and_for_evaluating_the_average(tiny_vae, monkeypatch):
    calls = collections.Counter()

    def compiled(function):
        return lambda *given: calls.update([function.__name__]) or function(*given)

    monkeypatch.setattr(compilation, "WORTH_COMPILING", 0)
    monkeypatch.setattr(torch, "compile", compiled)
    backend = NativeTrainingBackend(train_settings(FLAGS + "AdamW --ema-decay 0.9", device="cuda", precision="bf16"))
    trainer = backend.trainer(small_dalle(tiny_vae, attn_types=PATTERNS, depth=4, dim_head=32))
    trainer.compile(None)
    for use in (trainer.step, lambda batch: trainer.evaluate([batch])):
        calls.clear()
        use([samples(6)])
        assert calls == {"compute_layer": 4, "fusible_row_losses": 2}


def test_the_samples_of_an_update_are_gathered_on_the_device(tmp_path):
    """They are the CPU's, and cost one copy of their rows, whatever the number of micro-batches."""
    for number in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("red" if number % 2 else "red\nblue blue")
    dataset = TextImageDataset(tmp_path, load_tokenizer(), text_seq_len=6, image_size=8)
    dataset.attach_codes(samples(8)[1].numpy().astype("uint16"))
    dataset = dataset.split_off(0.75)
    dataset.caption_dropout, order = 0.3, [[(epoch, index) for index in (3, 0, -1, 4)] for epoch in range(6)] + [[]]
    found = []
    for device in ("cpu", "cuda"):
        backend = NativeTrainingBackend(train_settings("--batch-size 2 --gradient-accumulation 2", device=device))
        steps = backend.loader(dataset, order)
        first = list(next(steps))
        GPU.reset()
        found.append([first, *(list(step) for step in steps)])
        costs = GPU.counts()
    ours, expected = ([[torch.cat(parts).cpu() for parts in zip(*step)] for step in steps] for steps in found)
    assert all(torch.equal(*pair) for pair in zip(sum(ours, []), sum(expected, [])))
    assert costs["copies"] == 5 and costs["waits"] == 0 and costs["launches"] <= 20, costs


def test_the_bundled_model(monkeypatch):
    """Codes, completed captions, encoding and decoding are the CPU's; out of memory is one line."""
    ours, theirs = (load(SHAPES, device=device) for device in ("cuda", "cpu"))
    specs = [plan_image(theirs, "a small red circle above a large blue square", seed) for seed in range(2)]
    codes = generate_batch(theirs, specs)
    assert torch.equal(generate_batch(ours, specs), codes)
    captions = [complete_caption(loaded, "a small red", 1)[1] for loaded in (ours, theirs)]
    assert captions[0] == captions[1] and captions[0].startswith("a small red ")
    pixels = theirs.decode(codes)
    compiled = []  # after some images, in fp32, too
    monkeypatch.setattr(compilation, "COMPILED_FROM", 4)
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    for number in range(3):
        GPU.reset()
        assert torch.equal(ours.encode(pixels), theirs.encode(pixels)) and not GPU.tf32
        torch.testing.assert_close(ours.decode(codes), pixels)
        assert len(compiled) == (2 if number else 0)
    GPU.limit = GPU.allocated + 2**19
    with pytest.raises(ValueError, match="^out of memory: 2 images at once are too many; --batch_size 1 needs half$"):
        generate_batch(ours, specs)
    GPU.limit = float("inf")
    assert torch.equal(generate_batch(ours, specs), codes)
