"""Image tokenizers against taming's and OpenAI's own modules, precision, frozenness, and what load_vqgan reads."""

import copy
import importlib.util
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file
from taming.modules.vqvae.quantize import GumbelQuantize
from torch import nn
from torch.nn import functional as F

from benchmarks import peer
from models.discrete_vae import OpenAIDiscreteVAE
from models.vae import ImageTokenizer, VQGanVAE, build_image_tokenizer
from models.vqgan_files import load_vqgan
from tests.builders import PickledCall, one_line

# (resolution, ch_mult, attn_resolutions, patch_size) and what follows: (image_size, num_layers, fmap_size).
SHAPES = [
    ((8, [1], [], 1), (8, 0, 8)),
    ((16, [1, 2], [8], 1), (16, 1, 8)),
    ((16, [1, 1, 2], [4, 16], 1), (16, 2, 4)),
    ((8, [1], [], 2), (16, 1, 8)),
    ((8, [2, 1], [8], 2), (16, 2, 4)),
]
BOTH = pytest.mark.parametrize("gumbel", [False, True], ids=["VQModel", "GumbelVQ"])


def sizes(resolution=16, ch_mult=(1, 2), attn_resolutions=(8,), patch_size=1, gumbel=False, **more):
    width = 3 * patch_size**2
    ddconfig = {"double_z": False, "z_channels": 12, "resolution": resolution, "in_channels": width, "out_ch": width}
    ddconfig.update(ch=32, ch_mult=list(ch_mult), num_res_blocks=1, attn_resolutions=list(attn_resolutions))
    ddconfig["dropout"] = 0.0
    params = {"embed_dim": 12 if gumbel else 6, "n_embed": 50, "ddconfig": ddconfig}
    return {**params, **({"patch_size": patch_size} if patch_size > 1 else {}), **more}


class Taming(peer.TamingVQGAN):
    """taming's VQModel or GumbelVQ as its source puts it together, without Lightning and the loss."""

    def __init__(self, params, gumbel=False):
        super().__init__(params)
        self.patch_size, self.gumbel = params.get("patch_size", 1), gumbel
        if gumbel:
            channels = params["ddconfig"]["z_channels"]
            self.quantize = GumbelQuantize(channels, self.width, n_embed=params["n_embed"]).requires_grad_(False)
        latents = self.latents(pictures(self, count=16, seed=9)).permute(0, 2, 3, 1).flatten(0, 2)
        if gumbel:  # spread the logits, so that many codes are used
            self.quantize.proj.bias.copy_(-self.quantize.proj(latents.t()[None, :, None]).mean(dim=(0, 2, 3)))
        else:
            self.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[: params["n_embed"]]])

    def latents(self, images):
        return self.quant_conv(self.encoder(F.pixel_unshuffle(2 * images - 1, self.patch_size)))

    def codes(self, images):
        latents = self.latents(images)
        if self.gumbel:  # taming adds noise even in evaluation; these are the logits without it
            return self.quantize(latents, return_logits=True)[3].argmax(dim=1)
        return self.quantize(latents)[2][2]

    def pixels(self, codes):
        latents = self.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, self.quant_conv.out_channels))
        return (F.pixel_shuffle(self.decoder(self.post_quant_conv(latents)), self.patch_size) + 1) / 2


def pictures(taming, count=4, seed=1):
    """Random pictures with something in them at every scale."""
    generator = torch.Generator().manual_seed(seed)
    side = taming.encoder.resolution * taming.patch_size
    images = torch.rand(count, 3, side, side, generator=generator) * 0.5
    return images + F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=side) * 0.5


def both(gumbel=False, **options):
    params = sizes(gumbel=gumbel, **options)
    taming, ours = Taming(params, gumbel), VQGanVAE(params, gumbel)
    ours.model.load_state_dict(taming.state_dict())
    return ours, taming


@BOTH
@pytest.mark.parametrize(("shape", "expected"), SHAPES)
def test_codes_pixels_and_sizes_are_tamings(shape, expected, gumbel):
    resolution, ch_mult, attn_resolutions, patch_size = shape
    options = {"ch_mult": ch_mult, "attn_resolutions": attn_resolutions, "patch_size": patch_size}
    ours, taming = both(gumbel, resolution=resolution, **options)
    assert (ours.image_size, ours.num_layers, ours.fmap_size) == expected
    assert ours.num_tokens == 50 and ours.image_seq_len == expected[2] ** 2
    images = pictures(taming)
    codes = taming.codes(images)
    assert codes.shape == (4, expected[2], expected[2]) and len(codes.unique()) > 5
    found = ours.get_codebook_indices(images)
    assert found.dtype == torch.long and torch.equal(found, codes.flatten(1))
    assert torch.equal(ours(images), found)
    pixels = taming.pixels(codes)
    assert pixels.std() > 0.01
    torch.testing.assert_close(ours.decode(found), pixels.clamp(0, 1), atol=1e-5, rtol=0)
    assert ours.decode(found).shape == images.shape


@BOTH
def test_codes_are_looked_up_in_fp32_though_the_model_is_in_half_precision(gumbel):
    ours, taming = both(gumbel, n_embed=64)
    ours.to(torch.bfloat16)
    images = pictures(taming, count=8)
    latents = ours.model.encode((2 * images - 1).bfloat16())
    assert latents.dtype == torch.bfloat16
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    if gumbel:
        weight, bias = ours.model.quantize.proj.weight.flatten(1), ours.model.quantize.proj.bias
        exact = (flat.double() @ weight.double().t() + bias.double()).argmax(dim=1)
        coarse = (flat @ weight.t() + bias).argmax(dim=1)
    else:
        exact = torch.cdist(flat.double(), ours.model.codebook.double()).argmin(dim=1)
        coarse = torch.cdist(flat.float(), ours.model.codebook.float()).bfloat16().argmin(dim=1)
    assert not torch.equal(coarse, exact)  # or the test could not tell
    assert torch.equal(ours.get_codebook_indices(images).flatten(), exact)
    assert ours.decode(exact.reshape(8, -1)).dtype == torch.float32


@BOTH
def test_frozen_in_evaluation_mode_and_the_same_each_time(gumbel):
    params = sizes(gumbel=gumbel)
    params["ddconfig"]["dropout"] = 0.5
    vae = VQGanVAE(params, gumbel)
    assert not any(module.training for module in vae.model.modules())
    nn.Sequential(vae).train()
    assert not any(module.training for module in vae.modules())
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    codes = vae.get_codebook_indices(images)
    pixels = vae.decode(codes)
    assert torch.equal(vae.get_codebook_indices(images), codes) and torch.equal(vae.decode(codes), pixels)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    vae.requires_grad_(True)  # as a caller may for all of a model
    assert not pixels.requires_grad and not vae.decode(codes).requires_grad


def test_images_and_codes_of_another_shape_are_refused():
    vae = VQGanVAE(sizes())
    for shape in ((3, 16, 16), (2, 3, 16, 8), (2, 16, 16, 3)):
        with pytest.raises(ValueError, match=r"takes \(batch, 3, 16, 16\)"):
            vae.get_codebook_indices(torch.zeros(shape))
    with pytest.raises(ValueError, match="side"):
        vae.decode(torch.zeros((2, 5), dtype=torch.long))


def test_the_fingerprint_tells_networks_apart():
    vae = VQGanVAE(sizes())
    mark = vae.fingerprint()
    assert len(mark) == 64 and copy.deepcopy(vae).fingerprint() == mark
    finer = VQGanVAE(sizes(attn_resolutions=[8, 4]))  # a value that changes no weight
    finer.load_state_dict(vae.state_dict())
    assert finer.fingerprint() != mark
    weight = vae.model.decoder.conv_out.weight
    weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    assert vae.fingerprint() != mark


def write_pair(folder, gumbel=False, change=None):
    """A .ckpt with what Lightning leaves beside the weights, and its .yaml with what concerns training."""
    params = sizes(gumbel=gumbel)
    taming = Taming(params, gumbel)
    state = {**taming.state_dict(), "loss.perceptual_loss.net.weight": torch.ones(2), "loss.logvar": torch.zeros(())}
    if change:
        change(state)
    optimizer = {"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    saved = {"epoch": 3, "state_dict": state, "optimizer_states": [optimizer], "callbacks": {nn.Module: {"best": 1.5}}}
    torch.save(saved, folder / "last.ckpt")
    params.update(lossconfig={"target": "no.such.Loss", "params": {"disc_start": 1}}, monitor="val/rec_loss")
    params.update(remap="no/such/file.npy", ckpt_path="elsewhere", sane_index_shape=True)
    params["ddconfig"]["unheard_of"] = 1
    model = {"target": "taming.models.vqgan." + ("GumbelVQ" if gumbel else "VQModel"), "params": params}
    config = {"model": {**model, "base_learning_rate": 4.5e-6}, "data": {"target": "main.DataModuleFromConfig"}}
    (folder / "last.yaml").write_text(yaml.safe_dump(config))
    return folder / "last.ckpt", taming


@BOTH
def test_a_pair_of_files_gives_tamings_codes(tmp_path, gumbel):
    path, taming = write_pair(tmp_path, gumbel)
    images = pictures(taming)
    expected, elsewhere = taming.codes(images).flatten(1), tmp_path / "other name.txt"
    elsewhere.write_text(path.with_suffix(".yaml").read_text())
    for vae in (load_vqgan(path), load_vqgan(str(path), str(elsewhere)), load_vqgan(tmp_path)):
        assert torch.equal(vae(images), expected)
        assert vae.hparams["target"] == ("GumbelVQ" if gumbel else "VQModel")


OTHERS = {"model.diffusion_model.out.0.weight": torch.ones(2), "cond_stage_model.logit_scale": torch.ones(())}
WRAPPINGS = {
    "DataParallel": {"prefix": "module."},
    "a model key": {"keys": ("model",)},
    "nested keys": {"keys": ("checkpoint", "vqgan"), "prefix": "module.vqgan."},
    "latent-diffusion": {"model_ema.encoderconv_inweight": torch.ones(2), "model_ema.decay": torch.tensor(0.9)},
    "a whole diffusion model": {"prefix": "first_stage_model.", **OTHERS},
    "a moving codebook": {"quantize.embedding.cluster_size": torch.ones(50)},
}


@BOTH
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_weights_are_found(tmp_path, wrapping, gumbel):
    path, taming = write_pair(tmp_path, gumbel)
    options = {"prefix": "", "keys": ("state_dict",), **WRAPPINGS[wrapping]}
    prefix, keys = options.pop("prefix"), options.pop("keys")
    saved = {**{f"{prefix}{name}": tensor for name, tensor in taming.state_dict().items()}, **options}
    for key in reversed(keys):
        saved = {"epoch": 3, key: saved}
    torch.save(saved, path)
    images = pictures(taming)
    assert torch.equal(load_vqgan(path)(images), taming.codes(images).flatten(1))
    torch.save(options, path)
    with one_line("no tensor of it is named"):
        load_vqgan(path)


def test_safetensors_and_configurations_of_latent_diffusion(tmp_path):
    path, taming = write_pair(tmp_path)
    images, config = pictures(taming), yaml.safe_load(path.with_suffix(".yaml").read_text())["model"]
    save_file(taming.state_dict(), tmp_path / "vq.safetensors")
    path.unlink()
    path.with_suffix(".yaml").unlink()
    first_stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": config["params"]}
    whole = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": first_stage}}
    for model in (first_stage, whole):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        assert torch.equal(load_vqgan(tmp_path)(images), taming.codes(images).flatten(1))


def test_missing_files_are_named(tmp_path):
    path, _ = write_pair(tmp_path)
    path.with_suffix(".yaml").unlink()
    for files, message in (
        ((tmp_path / "gone.ckpt",), "gone.ckpt: no such VQGAN checkpoint"),
        ((path, tmp_path / "gone.yaml"), "gone.yaml: no such VQGAN configuration .*last.ckpt"),
        ((path,), "last.yaml: no such VQGAN configuration"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_vqgan(*files)
    with pytest.raises(ValueError, match="x.yaml: .*give the .ckpt"):
        load_vqgan(config_path="x.yaml")


def test_a_yaml_that_describes_no_vqgan_and_weights_that_do_not_fit_are_named(tmp_path):
    path, _ = write_pair(tmp_path)
    for text, message in (
        ("model: {target: taming.models.vqgan.VQModel}", "it has no model.params"),
        ("model: [1, 2", "not a yaml file"),
        ("model: {params: !!python/object/apply:os.getcwd []}", "not a yaml file"),
        ("model: {target: a.b.VQModel, params: {n_embed: 4}}", "ddconfig must be a mapping"),
        ("model: {target: a.b.AutoencoderKL, params: {}}", "'a.b.AutoencoderKL' is neither a VQModel nor a GumbelVQ"),
    ):
        path.with_suffix(".yaml").write_text(text)
        with one_line(f"last.yaml: .*{message}"):
            load_vqgan(path)
    for change, message in (
        (lambda state: state.pop("quant_conv.bias"), "quant_conv.bias is missing"),
        (lambda state: state.update({"quant_conv.scale": torch.ones(1)}), "quant_conv.scale is not part of this model"),
        (lambda state: state.update({"quantize.embedding.weight": torch.ones(51, 6)}), r"is \(51, 6\), not \(50, 6\)"),
        (lambda state: state.update({"encoder.conv_in.bias": "text"}), "'encoder.conv_in.bias'"),
    ):
        path, _ = write_pair(tmp_path, change=change)
        with pytest.raises(ValueError, match=f"last.ckpt: .*{message}"):
            load_vqgan(path)


TOUCH = "touch it_ran"


@pytest.fixture(scope="module")
def halves():
    """A small encoder and decoder of OpenAI's package, with random weights."""
    if importlib.util.find_spec("dall_e") is None:
        pytest.skip("OpenAI's DALL-E package is not installed")
    from dall_e import Decoder, Encoder

    torch.manual_seed(0)
    encoder = Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    return encoder, Decoder(n_init=16, n_hid=64, n_blk_per_group=1, vocab_size=512)


def save_halves(folder, halves, zipped=True):
    for name, half in zip(("encoder.pkl", "decoder.pkl"), halves):
        torch.save(half, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_codes_and_pixels_are_openais(halves, tmp_path, zipped):
    vae = load_vqgan(str(save_halves(tmp_path, halves, zipped)))
    assert isinstance(vae, OpenAIDiscreteVAE) and (vae.image_size, vae.fmap_size, vae.num_tokens) == (256, 32, 512)
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        expected = halves[0](0.8 * images + 0.1).argmax(1).flatten(1)
        assert torch.equal(vae(images), expected) and len(expected.unique()) > 5
        one_hot = torch.nn.functional.one_hot(expected.view(1, 32, 32), 512).permute(0, 3, 1, 2).float()
        pixels = ((halves[1](one_hot)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(vae.decode(expected), pixels, atol=1e-5, rtol=0)
    again: ImageTokenizer = build_image_tokenizer(vae.hparams)
    again.load_state_dict(vae.state_dict())
    assert again.fingerprint() == vae.fingerprint()


def test_a_module_that_is_something_else_is_refused_and_not_run(halves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other, message in (
        (PickledCall(os.system, TOUCH), "encoder.pkl: .*it is not a module"),
        (torch.nn.Linear(1, 1), "no enc.blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vqgan(str(save_halves(tmp_path, (other, halves[1]))))
    assert not (tmp_path / "it_ran").exists()


def test_the_real_sizes_are_the_defaults():
    with torch.device("meta"):
        vae = OpenAIDiscreteVAE({})
    assert sum(parameter.numel() for parameter in vae.parameters()) == 97_616_006  # of OpenAI's package
    with pytest.raises(ValueError, match="'Thing' with its params is no image tokenizer"):
        build_image_tokenizer({"target": "Thing", "params": {}})
