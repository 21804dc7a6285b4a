"""The fast VQGAN against models/vae.py, the plain one: same codes, close pixels, and a picture for itself."""

import copy

import pytest
import torch

from backends.native import compilation, inference
from backends.native.backend import NativeBackend
from data.shapes import make_sample
from models.vae import VQGanVAE
from tests.builders import cpu_only

SIDE, PICTURES = 64, 8


@pytest.fixture(scope="module", params=[False, True], ids=["VQModel", "GumbelVQ"])
def vae(request):
    """Two levels, attention in both halves, blocks that change their width; entries are latents of the pictures."""
    sizes = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "z_channels": 16}
    ddconfig = {"in_channels": 12, "out_ch": 12, "resolution": SIDE // 2, "double_z": False, **sizes}
    torch.manual_seed(0)
    params = {"ddconfig": ddconfig, "n_embed": 128, "embed_dim": 16, "patch_size": 2}
    vae = VQGanVAE(params, gumbel=request.param)
    with torch.no_grad():
        latents = vae.model.encode(2 * pictures() - 1).permute(0, 2, 3, 1).reshape(-1, 16)
        vae.model.codebook.copy_(latents[torch.randperm(len(latents))[:128]])
        vae.model.decoder.conv_out.weight.mul_(0.5)  # most pixels lie inside [0, 1] and are not cut off
    return vae


def pictures():
    drawn = [torch.from_numpy(make_sample("train", number, size=SIDE)[0]) for number in range(PICTURES)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 255


def codes(count=PICTURES):
    return torch.randint(0, 128, (count, 16 * 16), generator=torch.Generator().manual_seed(1))


def on_cpu(precision):
    return NativeBackend("cpu", precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_are_those_of_the_plain_network_in_any_precision(vae, precision):
    found = on_cpu(precision).encode(vae)(pictures())
    assert found.dtype == torch.int64 and torch.equal(found, vae.get_codebook_indices(pictures()))
    assert len(found.unique()) > 20


def test_pixels_are_those_of_the_plain_network_or_in_bf16_close(vae):
    exact, found = (on_cpu(precision).decode(vae)(codes()) for precision in ("fp32", "bf16"))
    expected = vae.decode(codes())
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=0)
    inside = ((expected > 0.01) & (expected < 0.99)).float().mean()
    assert exact.dtype == found.dtype == torch.float32 and inside > 0.5
    psnr = -10 * (found - expected).square().mean().log10()
    assert 40 < psnr < 80  # it is not fp32 in disguise either
    assert (found - expected).abs().max() < 0.05


@cpu_only("a GPU decodes a whole batch at once")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_picture_does_not_depend_on_its_batch(vae, precision):
    decode = on_cpu(precision).decode(vae)
    whole = decode(codes())
    for size in (1, 3):
        assert torch.equal(torch.cat([decode(part) for part in codes().split(size)]), whole)


def test_the_network_itself_is_left_as_it_is(vae):
    before = copy.deepcopy(vae)
    for precision in ("fp32", "bf16"):
        on_cpu(precision).encode(vae)(pictures()[:1])
        on_cpu(precision).decode(vae)(codes(1))
    assert vae.fingerprint() == before.fingerprint()
    assert [type(module) for module in vae.modules()] == [type(module) for module in before.modules()]
    for tensor, expected in zip(vae.state_dict().values(), before.state_dict().values()):
        assert tensor.dtype == expected.dtype and tensor.stride() == expected.stride()


@cpu_only("the stand-in for a GPU has no compiler")
@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="compiled from torch 2.1 on")
def test_a_network_is_compiled_after_many_images_for_one_shape(vae, monkeypatch, logged):
    """With the same result; if torch cannot compile, it stays as it was."""
    compile_with = torch.compile
    monkeypatch.setattr(compilation, "COMPILED_FROM", 8)
    expected = vae.get_codebook_indices(pictures())

    def encoder_of(backend):
        monkeypatch.setattr(torch, "compile", lambda network: compile_with(network, backend=backend))
        fast = inference.fast_copy(vae, "decoder", torch.float32, torch.device("cpu"))
        fast.model.encoder = compilation.CompiledLater(fast.model.encoder)
        return fast

    def no_compiler(graph, inputs):
        raise OSError("no compiler")

    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    fast = encoder_of("eager")
    for count, compiled in ((4, 0), (4, 1), (3, 1), (4, 1), (8, 1)):
        assert torch.equal(fast(pictures()[:count]), expected[:count]) and frames["ok"] == compiled
    fast = encoder_of(no_compiler)
    assert torch.equal(fast(pictures()), expected) and torch.equal(fast(pictures()), expected)
    (record,) = logged.records
    assert "not compiled, which only costs speed" in record.message and record.message.endswith("no compiler")
