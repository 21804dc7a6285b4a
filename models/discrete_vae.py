"""The image tokenizers of DALLE-pytorch other than the VQGAN: its own DiscreteVAE, and OpenAI's dVAE.

Both find codes as the largest of num_tokens logits. Parameter names are those of dalle_pytorch.DiscreteVAE and of
OpenAI's DALL-E package. Paper: Ramesh et al. 2021 (arXiv:2102.12092).
"""

import itertools
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.vae import MOST_BLOCKS, ImageTokenizer, size_in
from utils.checkpoint import first_misfit
from utils.errors import first_line
from utils.foreign_pickle import read_entries, read_module

EPSILON = 0.1  # OpenAI's networks see pixels in [ε, 1 − ε]
OPENAI_FILES = ("encoder.pkl", "decoder.pkl")


class ResBlock(nn.Module):
    """Two 3 × 3 convolutions and one of 1 × 1, as a residual block."""

    def __init__(self, width: int):
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class DiscreteNetwork(nn.Module):
    """Encoder, codebook and decoder of a DiscreteVAE; each of num_layers levels halves the side of the image."""

    def __init__(self, *, num_tokens: int, codebook_dim: int, hidden_dim: int, num_layers: int, num_resnet_blocks: int):
        super().__init__()
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        encoder: List[nn.Module] = []
        decoder: List[nn.Module] = []
        first = hidden_dim if num_resnet_blocks else codebook_dim
        for level in range(num_layers):
            down = nn.Conv2d(3 if level == 0 else hidden_dim, hidden_dim, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(first if level == 0 else hidden_dim, hidden_dim, 4, stride=2, padding=1)
            encoder.append(nn.Sequential(down, nn.ReLU()))
            decoder.append(nn.Sequential(up, nn.ReLU()))
        blocks = [ResBlock(hidden_dim) for _ in range(num_resnet_blocks)]
        widen = [nn.Conv2d(codebook_dim, hidden_dim, 1)] if blocks else []
        self.encoder = nn.Sequential(*encoder, *blocks, nn.Conv2d(hidden_dim, num_tokens, 1))
        blocks = [ResBlock(hidden_dim) for _ in range(num_resnet_blocks)]
        self.decoder = nn.Sequential(*widen, *blocks, *decoder, nn.Conv2d(hidden_dim, 3, 1))


class DiscreteVAE(ImageTokenizer):
    """DALLE-pytorch's DiscreteVAE.

    Args:
        params: the arguments of dalle_pytorch.DiscreteVAE, which has defaults for most; those for training alone are
            ignored. ValueError if one is not a whole number, or the images have no three channels.
    """

    DEFAULTS = {"image_size": 256, "num_tokens": 512, "codebook_dim": 512, "num_layers": 3, "hidden_dim": 64}

    def __init__(self, params: Dict[str, Any]):
        sizes = {name: size_in(params, name, default) for name, default in self.DEFAULTS.items()}
        blocks = params.get("num_resnet_blocks", 0)
        sizes["num_resnet_blocks"] = size_in(params, "num_resnet_blocks", most=MOST_BLOCKS) if blocks else 0
        size_in(sizes, "num_layers", most=MOST_BLOCKS)
        if size_in(params, "channels", 3) != 3:
            raise ValueError(f"its images have {params['channels']} channels, not 3")
        image_size = sizes.pop("image_size")
        super().__init__(
            DiscreteNetwork(**sizes),
            {"target": "DiscreteVAE", "params": {"image_size": image_size, **sizes}},
            image_size=image_size,
            num_layers=sizes["num_layers"],
            num_tokens=sizes["num_tokens"],
            largest=sizes["hidden_dim"] * image_size**2 // 4,
        )

    def find_codes(self, images: Tensor) -> Tensor:
        return self.model.encoder(2 * images - 1).argmax(dim=1)

    def decode_grid(self, codes: Tensor) -> Tensor:
        return (self.model.decoder(self.model.codebook(codes).permute(0, 3, 1, 2)) + 1) / 2


class Convolution(nn.Module):
    """A convolution that keeps the size of the image; its parameters are called w and b."""

    def __init__(self, channels: int, out: int, side: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(out, channels, side, side) / math.sqrt(channels * side**2))
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class OpenAIBlock(nn.Module):
    """Four convolutions of the given sides, as a residual block whose output counts `gain`."""

    def __init__(self, channels: int, out: int, sides: List[int], gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = Convolution(channels, out, 1) if channels != out else nn.Identity()
        layers: Dict[str, nn.Module] = {}
        widths = [channels, *[out // 4] * 3, out]
        for number, (before, after, side) in enumerate(zip(widths, widths[1:], sides), start=1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = Convolution(before, after, side)
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class OpenAIHalf(nn.Module):
    """Encoder or decoder of OpenAI's dVAE: four groups of blocks, with `change` between them, and two convolutions."""

    def __init__(self, widths: List[int], blocks: int, first_side: int, sides: List[int], change: str):
        super().__init__()
        layers: Dict[str, nn.Module] = {"input": Convolution(widths[0], widths[1], first_side)}
        for group in range(1, 5):
            width, out = widths[group : group + 2]
            parts: Dict[str, nn.Module] = {
                f"block_{number}": OpenAIBlock(width if number == 1 else out, out, sides, 1 / (4 * blocks) ** 2)
                for number in range(1, blocks + 1)
            }
            if group < 4:
                parts[change] = nn.MaxPool2d(2) if change == "pool" else nn.Upsample(scale_factor=2, mode="nearest")
            layers[f"group_{group}"] = nn.Sequential(OrderedDict(parts))
        last = Convolution(widths[5], widths[6], 1)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class OpenAIDiscreteVAE(ImageTokenizer):
    """OpenAI's dVAE (f = 8, 8,192 codes).

    Args:
        params: sizes that differ from OpenAI's: num_tokens, width (of the encoder's first level and the decoder's
            last), first_width (of the decoder) and blocks (of a group). ValueError if one is no whole number.
    """

    DEFAULTS = {"num_tokens": 8192, "width": 256, "first_width": 128, "blocks": 2}

    def __init__(self, params: Dict[str, Any]):
        sizes = {name: size_in(params, name, default) for name, default in self.DEFAULTS.items()}
        codes, width, first, blocks = sizes.values()
        size_in(sizes, "blocks", most=MOST_BLOCKS)
        widths = [width, 2 * width, 4 * width, 8 * width]
        model = nn.Module()
        model.enc = OpenAIHalf([3, width, *widths, codes], blocks, 7, [3, 3, 3, 1], "pool")
        model.dec = OpenAIHalf([codes, first, *widths[::-1], 6], blocks, 1, [1, 3, 3, 3], "upsample")
        hparams = {"target": "OpenAIDiscreteVAE", "params": sizes}
        super().__init__(model, hparams, image_size=256, num_layers=3, num_tokens=codes, largest=width * 256**2)

    def find_codes(self, images: Tensor) -> Tensor:
        return self.model.enc((1 - 2 * EPSILON) * images + EPSILON).argmax(dim=1)

    def decode_grid(self, codes: Tensor) -> Tensor:
        one_hot = F.one_hot(codes, self.num_tokens).permute(0, 3, 1, 2).float()
        return (self.model.dec(one_hot)[:, :3].sigmoid() - EPSILON) / (1 - 2 * EPSILON)


def infer_openai_params(weights: Mapping[str, Tensor]) -> Dict[str, Any]:
    """Return the params of an OpenAIDiscreteVAE with these weights; ValueError if one that tells a size is missing."""
    names = {"num_tokens": "enc.blocks.output.conv.w", "width": "enc.blocks.input.w"}
    names["first_width"] = "dec.blocks.input.w"
    for name in names.values():
        if name not in weights:
            raise ValueError(f"its dVAE has no {name}")
    first_convs = (f"enc.blocks.group_1.block_{number}.res_path.conv_1.w" for number in itertools.count(1))
    blocks = itertools.takewhile(lambda name: name in weights, first_convs)
    return {**{size: len(weights[name]) for size, name in names.items()}, "blocks": len(list(blocks))}


def load_discrete_vae(path: Path) -> Optional[DiscreteVAE]:
    """Load a vae.pt of train_vae.py; None if it is something else, ValueError if its weights do not fit its sizes."""
    try:
        saved = read_entries(path)
    except ValueError:
        return None
    if not isinstance(saved.get("hparams"), dict) or "codebook.weight" not in saved["weights"]:
        return None
    try:
        vae = DiscreteVAE(saved["hparams"])
    except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
        raise ValueError(f"{path}: {first_line(error)}") from error
    misfit = first_misfit(vae.model, saved["weights"])
    if misfit:
        raise ValueError(f"{path}: does not fit its hparams: {misfit}")
    vae.model.load_state_dict(saved["weights"])
    return vae


def find_openai_files(folder: Path) -> Optional[List[Path]]:
    """Return encoder.pkl and decoder.pkl in a folder; None if it does not have both."""
    paths = [folder / name for name in OPENAI_FILES]
    return paths if all(path.is_file() for path in paths) else None


def load_openai_dvae(paths: List[Path]) -> OpenAIDiscreteVAE:
    """Load OpenAI's encoder.pkl and decoder.pkl without running the classes in them; ValueError if damaged."""
    parts = {part: read_module(path) for part, path in zip(("enc", "dec"), paths)}
    weights = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    try:
        vae = OpenAIDiscreteVAE(infer_openai_params(weights))
        misfit = first_misfit(vae.model, weights)
        if misfit:
            raise ValueError(misfit)
    except ValueError as error:
        raise ValueError(f"{paths[0].parent}: not OpenAI's dVAE: {error}") from error
    vae.model.load_state_dict(weights)
    return vae
