"""The image tokenizer: a frozen VQGAN that encodes an image as a square grid of codes, and decodes codes to an image.

The networks are those of CompVis taming-transformers (Encoder, Decoder, VectorQuantizer2, GumbelQuantize), assembled
under taming's parameter names, without its Lightning wrapper.

Papers: VQGAN, Esser et al. 2021 (arXiv:2012.09841); Gumbel-softmax codes, Jang et al. 2017 (arXiv:1611.01144).
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import nn

MOST_BLOCKS = 64  # of residual blocks or levels; more in a file would take forever to build
GROUP_NORM_GROUPS = 32  # taming's GroupNorm has this many groups at every width
COMMITMENT_COST = 0.25  # taming's own; used by training only


class ImageTokenizer(nn.Module):
    """A frozen network that encodes images as codes and decodes codes; calling it with images returns their codes.

    A subclass defines find_codes and decode_grid.

    Args:
        hparams: plain values from which build_image_tokenizer builds the network: {"target": name, "params": sizes}.
        image_size: side of the images in pixels.
        num_layers: log2 of the downsampling factor f.
        num_tokens: number of codes.
        largest: values of an image's largest activation, which decides how many images are encoded at once.

    Attributes:
        fmap_size: side of the code grid, image_size / f.
        image_seq_len: fmap_size².
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: Dict[str, Any],
        *,
        image_size: int,
        num_layers: int,
        num_tokens: int,
        largest: int,
    ):
        super().__init__()
        self.hparams, self.image_size, self.num_layers, self.num_tokens = hparams, image_size, num_layers, num_tokens
        self.fmap_size = image_size // 2**num_layers
        self.image_seq_len = self.fmap_size**2
        self.largest = largest
        self.model: Any = model.requires_grad_(False).eval()

    def find_codes(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels float32 (B, 3, H, W) in [0, 1] as codes int64 (B, h, w)."""
        raise NotImplementedError

    def decode_grid(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes int64 (B, h, w) to pixels (B, 3, H, W), about in [0, 1]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "ImageTokenizer":
        """Stay in evaluation mode, because dropout would change an image's codes."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See get_codebook_indices."""
        return self.get_codebook_indices(images)

    @torch.no_grad()
    def get_codebook_indices(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, image_size, image_size) in [0, 1] as codes int64 (B, image_seq_len), row by row.

        Runs in the parameters' precision, without autocast and TF32; the nearest codes are found in fp32.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(images.shape)} for a VQGAN that takes (batch, %d, %d, %d)" % expected
            )
        with _no_autocast(images.device), _no_tf32():
            return self.find_codes(images.float()).flatten(1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, rows: Optional[int] = None) -> torch.Tensor:
        """Decode codes int64 (B, h·w), row by row, to pixels float32 (B, 3, h·f, w·f) in [0, 1].

        Args:
            rows: h, for the upper part of an image; None means a square.
        """
        side = math.isqrt(codes.shape[-1])
        if codes.dim() != 2 or (rows is None and side**2 != codes.shape[-1]):
            raise ValueError(f"codes of shape {tuple(codes.shape)} are not (batch, side * side)")
        rows = side if rows is None else rows
        with _no_autocast(codes.device):
            return self.decode_grid(codes.reshape(len(codes), rows, -1)).clamp(0, 1)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the configuration and all weights as fp32."""
        digest = hashlib.sha256(json.dumps(self.hparams, sort_keys=True).encode())
        return hash_tensors({name: tensor.float() for name, tensor in self.model.state_dict().items()}, digest)


def hash_tensors(tensors: Mapping[str, torch.Tensor], digest: Any) -> str:
    """Add names, shapes and values to a digest of hashlib, and return it in hex."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _no_autocast(device: torch.device) -> ContextManager[Any]:
    # torch 2.0.1 refuses to switch off autocast of other devices.
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device_type=device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Compute in fp32 on GPUs, too; from Ampere on, torch's convolutions round to TF32, which changes codes."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


class VQGan(nn.Module):
    """A trainable VQGAN: encoder, codebook and decoder, for pixels in [-1, 1].

    B images of H × W pixels become latents and codes on a grid of h × w = H/f × W/f, with D = embed_dim.

    Args:
        params: as returned by `check_params`.
        gumbel: codes are the largest of `n_embed` logits (GumbelVQ) instead of the nearest entry (VQModel).
    """

    def __init__(self, params: Dict[str, Any], gumbel: bool = False):
        super().__init__()
        ddconfig, embed_dim = params["ddconfig"], params["embed_dim"]
        self.patch_size = params["patch_size"]
        self.gumbel = gumbel
        with contextlib.redirect_stdout(io.StringIO()):  # taming's Decoder prints its latent shape
            self.encoder = Encoder(**ddconfig)
            self.decoder = Decoder(**ddconfig)
        if ddconfig.get("attn_type") == "none":  # latent-diffusion's option
            self.encoder.mid.attn_1 = self.decoder.mid.attn_1 = nn.Identity()
        if gumbel:
            self.quantize = GumbelQuantize(ddconfig["z_channels"], embed_dim, n_embed=params["n_embed"])
        else:
            self.quantize = VectorQuantizer2(params["n_embed"], embed_dim, beta=COMMITMENT_COST)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    @property
    def codebook(self) -> nn.Parameter:
        """The entries, (n_embed, D)."""
        return self.quantize.embed.weight if self.gumbel else self.quantize.embedding.weight

    def decoding_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that only decoding uses."""
        return itertools.chain(self.post_quant_conv.parameters(), self.decoder.parameters())

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] as latents (B, D, h, w), not yet quantized."""
        # An IPU has no pixel_unshuffle; this rearrangement has its channel order.
        patches = rearrange(pixels, "b c (h p) (w q) -> b (c p q) h w", p=self.patch_size, q=self.patch_size)
        return self.quant_conv(self.encoder(patches))

    def nearest(self, latents: torch.Tensor, handicap: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return the codes of latents (B, D, h, w), int64 (B, h, w).

        Computed in fp32: in half precision, neighboring entries of a large codebook become equal, and codes change.

        Args:
            handicap: (n_embed,), added to the squared distances, so that training can prefer some entries; a GumbelVQ
                has no distances.
        """
        latents = latents.float()
        if self.gumbel:  # the most likely code; the paper adds noise in training only
            proj = self.quantize.proj
            return F.conv2d(latents, proj.weight.float(), proj.bias.float()).argmax(dim=1)
        flat = rearrange(latents, "b d h w -> (b h w) d")
        codebook = self.codebook.float()
        # |z - e|² in the order of taming's own sum, so that ties fall the same way.
        distances = flat.pow(2).sum(dim=1, keepdim=True) + codebook.pow(2).sum(dim=1) - 2 * flat @ codebook.t()
        if handicap is not None:
            distances = distances + handicap
        return distances.argmin(dim=1).reshape(latents.shape[0], latents.shape[2], latents.shape[3])

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the quantized latents (B, D, h, w) of codes int64 (B, h, w)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, D, h, w) to pixels (B, 3, H, W), about in [-1, 1] and not clamped."""
        patches = self.decoder(self.post_quant_conv(latents))
        return rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size)


class VQGanVAE(ImageTokenizer):
    """A frozen VQGAN.

    Args:
        params: `model.params` of a taming yaml: ddconfig, n_embed, embed_dim and, for small images, patch_size.
            Keys for training alone (lossconfig, monitor, …) are ignored.
        gumbel: GumbelVQ instead of VQModel.

    Raises:
        ValueError: a size in `params` is missing or cannot be built; the message names it.
    """

    def __init__(self, params: Dict[str, Any], gumbel: bool = False):
        params = check_params(params, gumbel)
        ddconfig, patch_size = params["ddconfig"], params["patch_size"]
        super().__init__(
            VQGan(params, gumbel),
            {"target": "GumbelVQ" if gumbel else "VQModel", "params": params},
            image_size=ddconfig["resolution"] * patch_size,
            num_layers=len(ddconfig["ch_mult"]) - 1 + patch_size.bit_length() - 1,
            num_tokens=params["n_embed"],
            largest=ddconfig["ch"] * ddconfig["resolution"] ** 2,
        )

    def find_codes(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (2 * images - 1).to(self.model.quant_conv.weight.dtype)
        return self.model.nearest(self.model.encode(pixels))

    def decode_grid(self, codes: torch.Tensor) -> torch.Tensor:
        return (self.model.decode(self.model.lookup(codes)).float() + 1) / 2


def check_params(params: Any, gumbel: bool = False) -> Dict[str, Any]:
    """Check `model.params` of a taming yaml, and return what is needed to build the network, as plain values.

    `remap` is ignored: it renumbers the codes that some data set uses, and codes here are positions in the codebook.

    Returns:
        {"ddconfig", "n_embed", "embed_dim", "patch_size"}.

    Raises:
        ValueError: a value is missing, not a number, or cannot be built.
    """
    if not isinstance(params, dict):
        raise ValueError("model.params must be a mapping with ddconfig, n_embed and embed_dim")
    given = params.get("ddconfig")
    if not isinstance(given, dict):
        raise ValueError("model.params.ddconfig must be a mapping with taming's encoder sizes")
    names = ("ch", "out_ch", "in_channels", "resolution", "z_channels")
    ddconfig: Dict[str, Any] = {name: size_in(given, name) for name in names}
    ddconfig["num_res_blocks"] = size_in(given, "num_res_blocks", most=MOST_BLOCKS)
    ddconfig["ch_mult"] = _sizes(given, "ch_mult")
    ddconfig["attn_resolutions"] = _sizes(given, "attn_resolutions", may_be_empty=True)
    ddconfig["resamp_with_conv"] = bool(given.get("resamp_with_conv", True))
    ddconfig["dropout"] = given.get("dropout", 0.0)
    if isinstance(ddconfig["dropout"], bool) or not isinstance(ddconfig["dropout"], (int, float)):
        raise ValueError(f"dropout must be a number, not {ddconfig['dropout']!r}")
    if given.get("double_z", True):
        raise ValueError("double_z must be false: with true the encoder is a KL autoencoder's, which has no codes")
    ddconfig["double_z"] = False
    if given.get("attn_type") == "none":
        ddconfig["attn_type"] = "none"

    checked = {"ddconfig": ddconfig, "n_embed": size_in(params, "n_embed"), "embed_dim": size_in(params, "embed_dim")}
    patch_size = checked["patch_size"] = size_in(params, "patch_size", default=1)
    levels = len(ddconfig["ch_mult"])
    if patch_size & (patch_size - 1):
        raise ValueError(f"patch_size must be a power of two, not {patch_size}")
    if ddconfig["ch"] % GROUP_NORM_GROUPS:
        raise ValueError(f"ch must be a multiple of {GROUP_NORM_GROUPS} (group normalization), not {ddconfig['ch']}")
    if ddconfig["resolution"] % 2 ** (levels - 1):
        raise ValueError(
            f"resolution {ddconfig['resolution']} cannot be halved {levels - 1} times, as {levels} ch_mult levels need"
        )
    for name in ("in_channels", "out_ch"):
        if ddconfig[name] != 3 * patch_size**2:
            raise ValueError(f"{name} must be 3 * patch_size² = {3 * patch_size**2}, not {ddconfig[name]}")
    if gumbel and checked["embed_dim"] != ddconfig["z_channels"]:
        raise ValueError(f"GumbelVQ needs embed_dim {checked['embed_dim']} = z_channels {ddconfig['z_channels']}")
    return checked


def _sizes(mapping: Dict[str, Any], name: str, may_be_empty: bool = False) -> List[int]:
    values = mapping.get(name)
    if not isinstance(values, (list, tuple)) or not (values or may_be_empty):
        raise ValueError(f"{name} must be a list of whole numbers, not {values!r}")
    return [size_in({name: value}, name) for value in values]


def size_in(mapping: Dict[str, Any], name: str, default: Optional[int] = None, most: int = 1 << 20) -> int:
    """Return a size among others; ValueError if it is no whole number from 1 to `most`."""
    value = mapping.get(name, default)
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
    return value


def build_image_tokenizer(hparams: Mapping[str, Any]) -> ImageTokenizer:
    """Return the untrained image tokenizer that `hparams` of another one describe.

    Raises:
        ValueError: they describe none.
    """
    from models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE

    builders: Dict[str, Callable[[Any], ImageTokenizer]] = {
        "VQModel": VQGanVAE,
        "GumbelVQ": functools.partial(VQGanVAE, gumbel=True),
        "DiscreteVAE": DiscreteVAE,
        "OpenAIDiscreteVAE": OpenAIDiscreteVAE,
    }
    target = hparams.get("target")
    if target not in builders or not isinstance(hparams.get("params"), dict):
        raise ValueError(f"{target!r} with its params is no image tokenizer; there are {', '.join(builders)}")
    return builders[target](hparams["params"])
