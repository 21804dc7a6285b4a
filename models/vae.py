"""The image tokenizer: a frozen VQGAN that encodes an image as a square grid of codes, and decodes codes to an image.

The networks are those of CompVis taming-transformers (Encoder, Decoder, VectorQuantizer2, GumbelQuantize), assembled
under taming's parameter names, without its Lightning wrapper. No pickled code is run when weights are read. In place of
a VQGAN, the discrete VAEs of DALLE-pytorch can be loaded, too.

Papers: VQGAN, Esser et al. 2021 (arXiv:2012.09841); Gumbel-softmax codes, Jang et al. 2017 (arXiv:1611.01144).
"""

import contextlib
import functools
import io
import itertools
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import nn

from models.discrete_vae import (
    DiscreteVAE,
    OpenAIDiscreteVAE,
    find_openai_files,
    load_discrete_vae,
    load_openai_dvae,
)
from models.image_tokenizer import ImageTokenizer, size_in
from models.official_vqgan import download_official_vqgan
from utils.checkpoint import first_misfit
from utils.files import first_line
from utils.foreign_pickle import read_weights

GROUP_NORM_GROUPS = 32  # taming's GroupNorm has this many groups at every width
COMMITMENT_COST = 0.25  # taming's own; used by training only
VQ_MODELS = ("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel", "EMAVQ")  # classes with one network
WEIGHTS, YAML = (".ckpt", ".pt", ".pth", ".safetensors"), (".yaml", ".yml")
# Tensors for training alone: discriminator and LPIPS, averaged weights, and counts of a codebook that is a moving mean.
# A remap table (used) only renumbers codes.
NOT_NEEDED = (
    *("loss.", "model_ema.", "colorize", "quantize.used"),
    *("quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
)


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
    names = ("ch", "out_ch", "num_res_blocks", "in_channels", "resolution", "z_channels")
    ddconfig: Dict[str, Any] = {name: size_in(given, name) for name in names}
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


def infer_params(weights: Mapping[str, torch.Tensor], fmap_size: int) -> Tuple[Dict[str, Any], bool]:
    """Return the params of a VQGAN with these weights, under the names of VQGan, and whether it is a GumbelVQ.

    Args:
        fmap_size: side of its code grid, which weights do not tell.

    Raises:
        ValueError: a tensor that tells a size is missing.
    """
    gumbel = "quantize.embed.weight" in weights
    try:
        channels, in_channels = weights["encoder.conv_in.weight"].shape[:2]
        entries, width = weights[f"quantize.{'embed' if gumbel else 'embedding'}.weight"].shape
        levels = list(
            itertools.takewhile(lambda n: f"encoder.down.{n}.block.0.conv1.weight" in weights, itertools.count())
        )
        blocks = itertools.takewhile(lambda n: f"encoder.down.0.block.{n}.conv1.weight" in weights, itertools.count())
        ddconfig = {
            "double_z": False,
            "z_channels": len(weights["encoder.conv_out.weight"]),
            "resolution": fmap_size * 2 ** (len(levels) - 1),
            "in_channels": in_channels,
            "out_ch": in_channels,
            "ch": channels,
            "ch_mult": [len(weights[f"encoder.down.{level}.block.0.conv1.weight"]) // channels for level in levels],
            "num_res_blocks": len(list(blocks)),
            "dropout": 0.0,
        }
    except KeyError as error:
        raise ValueError(f"its VQGAN has no {error.args[0]}") from None
    attended = [level for level in levels if f"encoder.down.{level}.attn.0.norm.weight" in weights]
    ddconfig["attn_resolutions"] = [ddconfig["resolution"] // 2**level for level in attended]
    ddconfig["resamp_with_conv"] = len(levels) < 2 or "encoder.down.0.downsample.conv.weight" in weights
    if "encoder.mid.attn_1.norm.weight" not in weights:
        ddconfig["attn_type"] = "none"
    patch_size = math.isqrt(in_channels // 3)
    return {"embed_dim": width, "n_embed": entries, "patch_size": patch_size, "ddconfig": ddconfig}, gumbel


def build_tokenizer(hparams: Mapping[str, Any]) -> ImageTokenizer:
    """Return the untrained image tokenizer that `hparams` of another one describe.

    Raises:
        ValueError: they describe none.
    """
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


def load_vqgan(model_path: Optional[str] = None, config_path: Optional[str] = None) -> ImageTokenizer:
    """Load a VQGAN from weights and a yaml, of any resolution, channel multipliers and codebook size.

    The weights may be wrapped in other dicts and in a prefix of their names, as CompVis, latent-diffusion and
    DataParallel save them. Other image tokenizers are recognized by their files: DALLE-pytorch's vae.pt, and a folder
    with OpenAI's encoder.pkl and decoder.pkl.

    Args:
        model_path: the .ckpt, .pt, .pth or .safetensors, or a folder with one; None is the official ImageNet model
            (f = 16, 1,024 codes), which is downloaded once.
        config_path: the .yaml; None is the file of the same name next to the weights, or the only one of their folder.

    Raises:
        FileNotFoundError: a file is missing.
        OSError: the official model could not be downloaded.
        ValueError: the yaml describes no VQGAN, or the weights do not fit it; names file and key.
    """
    if model_path is None and config_path is not None:
        raise ValueError(f"{config_path}: a VQGAN configuration needs weights; give the .ckpt file, too")
    if model_path is None:
        model_path, config_path = map(str, download_official_vqgan())
    openai_files = find_openai_files(Path(model_path))
    if openai_files:
        return load_openai_dvae(openai_files)
    weights_file = _find_weights(Path(model_path))
    if config_path is None and weights_file.suffix == ".pt":
        discrete = load_discrete_vae(weights_file)
        if discrete is not None:
            return discrete
    config_file = _find_config(weights_file, None if config_path is None else Path(config_path))

    params, gumbel = _read_config(config_file)
    try:
        vae = VQGanVAE(params, gumbel)
    except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
        raise ValueError(f"{config_file}: {first_line(error)}") from error
    weights = read_weights(weights_file, skip=NOT_NEEDED, anchor="encoder.conv_in.weight")
    misfit = first_misfit(vae.model, weights)
    if misfit:
        raise ValueError(f"{weights_file}: does not fit its configuration: {misfit}")
    vae.model.load_state_dict(weights)
    return vae


def _find_weights(path: Path) -> Path:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
        found = [file for file in found if file.suffix == WEIGHTS[0]] or found  # train_vqgan.py's state is a .pt
        if len(found) != 1:
            raise FileNotFoundError(
                f"{path}: a VQGAN folder must have exactly one file of weights ({', '.join(WEIGHTS)}); this one has "
                f"{len(found)}"
            )
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such VQGAN checkpoint")
    return path


def _find_config(weights: Path, config: Optional[Path]) -> Path:
    if config is None:
        named = [weights.with_suffix(suffix) for suffix in YAML]
        others = [path for path in weights.parent.iterdir() if path.suffix in YAML]
        existing = [path for path in named if path.is_file()] or (others if len(others) == 1 else [])
        config = existing[0] if existing else named[0]
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such VQGAN configuration (the .yaml for {weights.name})")
    return config


def _read_config(path: Path) -> Tuple[Dict[str, Any], bool]:
    """Return model.params of a yaml, and whether it is a GumbelVQ; the target is compared, never imported."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not text, or an impossible date
        raise ValueError(f"{path}: not a yaml file ({first_line(error)})") from error
    model: Any = config.get("model", config) if isinstance(config, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    if isinstance(params, dict) and isinstance(params.get("first_stage_config"), dict):  # of a whole diffusion model
        model = params["first_stage_config"]
        params = model.get("params")
    if not isinstance(params, dict):
        raise ValueError(f"{path}: not a VQGAN configuration: it has no model.params")
    kind = str(model.get("target", "")).rpartition(".")[2]
    if kind not in (*VQ_MODELS, "GumbelVQ"):
        raise ValueError(f"{path}: model.target {model.get('target')!r} is neither a VQModel nor a GumbelVQ")
    return params, kind == "GumbelVQ"
