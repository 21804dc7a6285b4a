"""The official VQGAN (f = 16, 256 × 256), untrained: pictures to codes and back, beside taming's own network."""

import torch

from backends.native.backend import NativeBackend
from benchmarks import peer
from benchmarks.limits import convolution_operations, repeated
from models.official_vqgan import OFFICIAL_PARAMS
from models.vae import VQGanVAE

PICTURES = 4  # handed over at once


def params_of(quick):
    small = {"ch": 32, "resolution": 64, "attn_resolutions": [4]}
    return {**OFFICIAL_PARAMS, "ddconfig": {**OFFICIAL_PARAMS["ddconfig"], **(small if quick else {})}}


def tokenizer(quick):
    torch.manual_seed(0)
    return VQGanVAE(params_of(quick))


def some_pixels(vae):
    return torch.rand(PICTURES, 3, vae.image_size, vae.image_size)


def some_codes(vae):
    return torch.randint(0, vae.num_tokens, (PICTURES, vae.image_seq_len))


def encoding(quick):
    """Codes are computed in fp32 whatever the precision, see backends/native/inference.py."""
    vae, backend = tokenizer(quick), NativeBackend()
    pixels, encode = some_pixels(vae), backend.encode(vae)
    seconds = repeated(lambda: encode(pixels), backend.device, quick)
    operations = convolution_operations(vae.model.encoder, pixels[:1])
    return [taken / PICTURES for taken in seconds], {"operations": operations, "precision": "fp32"}


def decoding(quick):
    vae, backend = tokenizer(quick), NativeBackend()
    codes, decode = some_codes(vae), backend.decode(vae)
    seconds = repeated(lambda: decode(codes), backend.device, quick)
    latents = torch.zeros(1, vae.hparams["params"]["ddconfig"]["z_channels"], vae.fmap_size, vae.fmap_size)
    operations = convolution_operations(vae.model.decoder, latents)
    precision = "bf16" if backend.precision == "bf16" else "fp32"
    return [taken / PICTURES for taken in seconds], {"operations": operations, "precision": precision}


def their_encoding(quick):
    vae, device = tokenizer(quick), NativeBackend().device
    network, pixels = peer.taming_vqgan(params_of(quick)).to(device), some_pixels(vae).to(device)
    with torch.no_grad():
        return [taken / PICTURES for taken in repeated(lambda: network.codes(2 * pixels - 1), device, quick)]


def their_decoding(quick):
    vae, device = tokenizer(quick), NativeBackend().device
    network, codes = peer.taming_vqgan(params_of(quick)).to(device), some_codes(vae).to(device)
    with torch.no_grad():
        return [taken / PICTURES for taken in repeated(lambda: network.pixels(codes), device, quick)]
