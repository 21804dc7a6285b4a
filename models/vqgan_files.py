"""Find, download and read the files of image tokenizers.

The official ImageNet VQGAN (f = 16, 1,024 codes) is downloaded once for all processes. Its file names are those of
dalle-pytorch, so a cache that it filled works here, too. No pickled code is run when weights are read.
"""

import itertools
import math
import os
import shutil
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
import yaml
from tqdm import tqdm

from models.discrete_vae import find_openai_files, load_discrete_vae, load_openai_dvae
from models.vae import ImageTokenizer, VQGanVAE
from utils.checkpoint import first_misfit
from utils.errors import first_line
from utils.files import atomic_write, hold_lock, remove_leftovers
from utils.foreign_pickle import read_weights

# File name in the cache -> address at Heidelberg University, as the authors of taming-transformers publish it.
OFFICIAL_FILES = {
    "vqgan.1024.model.ckpt": "https://heibox.uni-heidelberg.de/f/140747ba53464f49b476/?dl=1",
    "vqgan.1024.config.yml": "https://heibox.uni-heidelberg.de/f/6ecf2af6c658432c8298/?dl=1",
}
OFFICIAL_PARAMS = {  # model.params of its yaml
    "embed_dim": 256,
    "n_embed": 1024,
    "ddconfig": {
        "double_z": False,
        "z_channels": 256,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.0,
    },
}
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60  # without any byte; not for the whole file
VQ_MODELS = ("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel", "EMAVQ")  # classes with one network
WEIGHTS, YAML = (".ckpt", ".pt", ".pth", ".safetensors"), (".yaml", ".yml")
# Tensors for training alone: discriminator and LPIPS, averaged weights, and counts of a codebook that is a moving mean.
# A remap table (used) only renumbers codes.
ANCHOR = "encoder.conv_in.weight"  # a tensor that all of them have
NOT_NEEDED = (
    *("loss.", "model_ema.", "colorize", "quantize.used"),
    *("quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
)


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
        ValueError, OSError: a file is missing, cannot be downloaded or does not fit the other; names file and key.
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
    try:
        config_file = _find_config(weights_file, None if config_path is None else Path(config_path))
    except FileNotFoundError:
        read_weights(weights_file, ANCHOR, NOT_NEEDED)  # a file that is damaged, or no VQGAN, needs no configuration
        raise
    params, gumbel = _read_config(config_file)
    try:
        vae = VQGanVAE(params, gumbel)
    except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
        raise ValueError(f"{config_file}: {first_line(error)}") from error
    weights = read_weights(weights_file, ANCHOR, NOT_NEEDED)
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


def infer_params(weights: Mapping[str, torch.Tensor], fmap_size: int) -> Tuple[Dict[str, Any], bool]:
    """Return the params of a VQGAN with these weights, under the names of VQGan, and whether it is a GumbelVQ.

    Args:
        fmap_size: side of its code grid, which weights do not tell; ValueError if they lack another size.
    """
    gumbel = "quantize.embed.weight" in weights
    try:
        channels, in_channels = weights["encoder.conv_in.weight"].shape[:2]
        entries, width = weights[f"quantize.{'embed' if gumbel else 'embedding'}.weight"].shape
        names = (f"encoder.down.{level}.block.0.conv1.weight" for level in itertools.count())
        levels = range(sum(1 for _ in itertools.takewhile(lambda name: name in weights, names)))
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


def download_official_vqgan() -> Tuple[Path, Path]:
    """Return the paths of the official model's checkpoint and yaml; download those that are missing.

    The folder is $DALLE_CACHE, or ~/.cache/dalle. $MINIDALLE_VQGAN_URL names the base address of a mirror that
    serves the two file names. If several processes call this, one downloads and the others wait. A file appears under
    its name only when it is complete.

    Raises:
        OSError: the folder cannot be written or a download failed; says where to put the files by hand.
    """
    folder = Path(os.environ.get("DALLE_CACHE") or "~/.cache/dalle").expanduser()
    paths = [folder / name for name in OFFICIAL_FILES]
    if not all(path.is_file() for path in paths):
        with hold_lock(folder / "vqgan.1024.lock"):
            for path in paths:
                if not path.is_file():  # another process may have downloaded it while this one waited
                    mirror = os.environ.get("MINIDALLE_VQGAN_URL")
                    _download(f"{mirror.rstrip('/')}/{path.name}" if mirror else OFFICIAL_FILES[path.name], path)
    return paths[0], paths[1]


def _by_hand(problem: str, folder: Path) -> OSError:
    return OSError(
        f"{problem}; put {' and '.join(OFFICIAL_FILES)} into {folder} by hand, "
        "or name another VQGAN with --vqgan_model_path and --vqgan_config_path"
    )


def _download(address: str, path: Path) -> None:
    try:
        remove_leftovers(path.parent, path.name)  # the lock is ours
        with atomic_write(path) as file, urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response:
            total, about = response.length, f"downloading {path.name}"
            with tqdm.wrapattr(response, "read", total=total, unit="B", desc=about, disable=None) as source:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            file.flush()
            _verify(Path(file.name), path, total)
    except (OSError, HTTPException, ValueError) as error:  # a URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise _by_hand(f"could not download {address} ({reason})", path.parent) from error


def _verify(unfinished: Path, path: Path, total: Optional[int]) -> None:
    """Refuse a truncated file, and a page that a login or proxy serves instead of the file."""
    size = unfinished.stat().st_size
    if total is not None and size != total:
        raise ValueError(f"{size} of {total} bytes arrived")
    with unfinished.open("rb") as file:
        beginning = file.read(64).lstrip()
    if beginning[:1] == b"<":
        raise ValueError("what arrived is a web page")
    stream = beginning[:1] == b"\x80"  # torch.save's older format; the other is looked for by its directory at the end
    if path.suffix == ".ckpt" and not stream and not zipfile.is_zipfile(unfinished):
        raise ValueError("what arrived is not a checkpoint")
