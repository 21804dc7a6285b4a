"""Drawing on the stand-in for PopTorch: the codes and pictures of a CPU, in calls of fixed shapes."""

import pytest
import torch

import backends
from models.sampling import Sampling
from models.transformer import PATTERNS
from models.vae import VQGanVAE
from models.vqgan_files import load_vqgan
from tests.backends.ipu.ipu_runs import settings
from tests.builders import one_line, samples, small_dalle
from tests.models.test_vae import sizes


def break_loops(poptorch, monkeypatch):
    """Make PopTorch unable to compile loops, which it says with its own error, no RuntimeError."""

    def fail(count, body, inputs):
        raise poptorch.Error("out of memory\nand more")

    monkeypatch.setattr(poptorch, "for_loop", fail)


@pytest.mark.parametrize("whole", [True, False], ids=["whole pictures", "code by code"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_codes_are_those_of_a_cpu(poptorch_standin, tiny_vae, whole, count, monkeypatch):
    model = small_dalle(tiny_vae, weight_std=0.3, depth=len(PATTERNS), attn_types=PATTERNS).eval()
    text, _ = samples(count)
    on_cpu, on_ipu = (backends.for_inference(device, "fp32") for device in ("cpu", "ipu"))
    if not whole:
        break_loops(poptorch_standin, monkeypatch)
    sampler = on_ipu.sampler(model, 3)
    for sampling in (Sampling(), Sampling(top_k=0.5, top_p=0.8, temperature=0.7, cond_scale=2.0)):
        for given in (None, torch.randint(0, 32, (count, 5)), torch.randint(0, 32, (count, 16))):
            draws = []
            for sample in (on_cpu.sampler(model, 3), sampler):
                generators = [torch.Generator().manual_seed(i) for i in range(count)]
                draws.append(sample(text, sampling, generator=generators, image_codes=given))
            assert draws[1].dtype == torch.int64 and torch.equal(*draws)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.text_emb.weight.dtype == torch.float32


def test_one_call_a_batch_or_a_code_if_the_loop_does_not_compile(poptorch_standin, tiny_vae, monkeypatch, logged):
    sampler = backends.for_inference("ipu", "fp32").sampler(small_dalle(tiny_vae), 4)
    sampler(samples(5)[0], generator=torch.Generator().manual_seed(0))
    calls = poptorch_standin.MACHINE.calls
    assert calls == ["StaticSampler"] * 2 and not logged.text.count("does not compile")
    assert sampler.image_sampler.executor._options._Popart._values["aliasZeroCopy"]  # the loop copies no weights
    break_loops(poptorch_standin, monkeypatch)
    sampler = backends.for_inference("ipu", "fp32").sampler(small_dalle(tiny_vae), 4)
    sampler(samples(5)[0], generator=torch.Generator().manual_seed(0))
    assert calls[2:] == ["FullPass"] * 2 * 16
    (warning,) = {line.getMessage() for line in logged.records if line.levelname == "WARNING"}
    assert "the sampler does not compile" in warning and "out of memory" in warning and "\n" not in warning


def test_a_compilers_error_is_one_line(poptorch_standin, tiny_vae, tiny_vqgan):
    poptorch_standin.MACHINE.ipus = 0
    backend, vae = backends.for_training(settings()), load_vqgan(tiny_vqgan)
    for fail in (
        lambda: backend.encode(vae)(torch.rand(1, 3, 32, 32)),
        lambda: backend.decode(vae)(torch.zeros(1, 16, dtype=torch.long)),
        lambda: backend.evaluator(small_dalle(tiny_vae))([samples(1)]),
        lambda: backend.sampler(small_dalle(tiny_vae), 1)(samples(1)[0]),
        lambda: backend.trainer(small_dalle(tiny_vae)).compile(samples(3)),
    ):
        with one_line(r"IPU: the \w+ does not compile: .*Failed to acquire \d IPU"):
            fail()


@pytest.mark.parametrize("gumbel", [False, True], ids=["VQModel", "GumbelVQ"])
def test_the_vqgan_runs_on_the_device_both_ways(poptorch_standin, gumbel):
    torch.manual_seed(0)
    vae = VQGanVAE(sizes(8, [2, 1], [8], patch_size=4, gumbel=gumbel), gumbel)
    backend = backends.for_training(settings())
    encode, decode = backend.encode(vae), backend.decode(vae)
    for count in (3, 2, 7):
        pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        codes = encode(pixels)
        assert codes.dtype == torch.int64 and torch.equal(codes, vae.get_codebook_indices(pixels))
        torch.testing.assert_close(decode(codes), vae.decode(codes), atol=1e-5, rtol=0)
        filled = torch.cat((codes[:, :8], torch.zeros_like(codes[:, 8:])), dim=1)  # two rows of four
        expected = vae.decode(filled)[:, :, :16]
        torch.testing.assert_close(decode(codes[:, :8], 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("fp16", 1e-2)])
def test_losses_are_those_of_a_cpu_whatever_the_batches(poptorch_standin, tiny_vae, precision, tolerance):
    model = small_dalle(tiny_vae).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    on_cpu, on_ipu = backends.for_inference("cpu", "fp32"), backends.for_inference("ipu", precision)
    text, codes = samples(7)
    batches = list(zip(text.split(3), codes.split(3)))
    expected, losses = (backend.evaluator(model)(batches) for backend in (on_cpu, on_ipu))
    assert list(losses) == ["total", "text", "image"] and losses == pytest.approx(expected, rel=tolerance)
    with torch.no_grad():
        assert expected["image"] == pytest.approx(float(model(text, codes, return_loss=True).image), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_program_of_each_role_holds_an_ipu(poptorch_standin, tiny_vqgan):
    """Two encoders, as for training and validation images, leave the four IPUs of a machine to training."""
    vae, other = load_vqgan(tiny_vqgan), load_vqgan(tiny_vqgan)
    backend = backends.for_training(settings("--gradient-accumulation 7 --ipus-per-replica 4 --layers-per-ipu 0,1,1,0"))
    first, second = backend.encode(vae), backend.encode(other)
    pixels = torch.rand(2, 3, 32, 32)
    codes = first(pixels)
    for encode in (second, first):
        assert torch.equal(encode(pixels), codes)
        assert list(poptorch_standin.MACHINE.holders.values()) == [1]
    backend.trainer(small_dalle(vae)).compile(samples(7))
    assert list(poptorch_standin.MACHINE.holders.values()) == [4]
