"""CLIP score and FID of generated images, with packages and weights that the user installs.

The packages are open_clip_torch and torch-fidelity (requirements-metrics.txt). Weights always come from a file; nothing
is downloaded and no pickled code is run. Papers: CLIP score, Hessel et al. 2021 (arXiv:2104.08718), here without its
factor 2.5; FID, Heusel et al. 2017 (arXiv:1706.08500).
"""

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch
from torch import Tensor

from utils.errors import first_line

MISSING = "{}: the package {} cannot be imported; pip install -r requirements-metrics.txt, or omit the flag"


def clip_score(weights: str, name: str, device: torch.device) -> Callable[..., Tensor]:
    """Load a CLIP model of open_clip; return score(PIL images, their texts): 100 × each pair's cosine, float (K,).

    Raises:
        ValueError, FileNotFoundError: a package or file is missing, or the weights are not this model's; one line.
    """
    path = _existing(weights, "--clip-weights")
    with _refused(MISSING.format("--clip-weights", "open_clip_torch")):
        import open_clip
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise ValueError(f"--clip-model {name}: no model of open_clip {open_clip.__version__} (such as ViT-B-32)")
    if any("hf_" in key for key in config.get("text_cfg", {})):
        raise ValueError(f"--clip-model {name}: its text network would be downloaded; choose one such as ViT-B-32")
    with _refused(f"--clip-weights {path}: no weights of {name}"), _silent():
        model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False, pretrained_text=False)
        open_clip.load_checkpoint(model, str(path), weights_only=True)
    model, tokenizer = model.to(device).eval(), open_clip.get_tokenizer(name)

    @torch.no_grad()
    def score(images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images]).to(device)
        of_images = model.encode_image(pixels, normalize=True)  # (K, D)
        of_texts = model.encode_text(tokenizer(list(texts)).to(device), normalize=True)
        return 100 * (of_images * of_texts).sum(dim=1).float().cpu()

    return score


class InceptionDistance:
    """FID between two sets of images: add() any number to "generated" and "real", then call distance().

    Args:
        weights: path of torch-fidelity's weights-inception-2015-12-05-….pth.

    Raises:
        ValueError, FileNotFoundError: a package or file is missing, or the weights are others; one line.
    """

    def __init__(self, weights: str, device: torch.device):
        path = _existing(weights, "--fid-weights")
        with _refused(MISSING.format("--fid-weights", "torch-fidelity")):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        with _refused(f"--fid-weights {path}: no weights of FID's InceptionV3"), tempfile.TemporaryDirectory() as place:
            # The package would unpickle anything in the file, so it gets a copy of the tensors alone.
            torch.save(torch.load(path, map_location="cpu", weights_only=True), f"{place}/weights.pth")
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], f"{place}/weights.pth")
        self.device = device
        self.network.to(device)
        self.features: Dict[str, List[Tensor]] = {"generated": [], "real": []}

    @torch.no_grad()
    def add(self, which: str, images: Tensor) -> None:
        """Add images uint8 (B, 3, S, S) to one set."""
        self.features[which].append(self.network(images.to(self.device))[0].cpu())

    def distance(self) -> float:
        """Return the FID; each set needs at least 2 images, and with fewer than thousands the FID is too high."""
        from torch_fidelity import metric_fid

        sides = [metric_fid.fid_features_to_statistics(torch.cat(parts).double()) for parts in self.features.values()]
        return metric_fid.fid_statistics_to_metric(*sides, verbose=False)[metric_fid.KEY_METRIC_FID]


def _existing(path: str, flag: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file; weights are not downloaded; give their path")
    return path


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the layer that does not fit, or of a torchvision that does not fit this torch
        raise ValueError(f"{what} ({first_line(error)})") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress warnings; open_clip warns of random weights, which they are until they are loaded."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
