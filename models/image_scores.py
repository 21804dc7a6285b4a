"""CLIP score and FID of drawn pictures, by networks whose packages and weights the user brings.

The packages are open_clip_torch and torch-fidelity (requirements-metrics.txt), imported when asked for. Weights always
come from a file; nothing is downloaded and no pickled code is run. Papers: CLIP score, Hessel et al. 2021
(arXiv:2104.08718), here without its factor 2.5; FID, Heusel et al. 2017 (arXiv:1706.08500).
"""

import contextlib
import logging
import tempfile
from pathlib import Path

import torch

INSTALL = "pip install -r requirements-metrics.txt"


def clip_score(weights, name, device):
    """→ score(PIL pictures, their texts): 100 × each pair's cosine, float (K,). name: a model of open_clip's.

    ValueError or FileNotFoundError, in one line, for a missing package or file, an unknown model, or other weights.
    """
    path = _existing(weights, "--clip-weights")
    with _needed("--clip-weights", "open_clip_torch"):
        import open_clip
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise ValueError(f"--clip-model {name}: no model of open_clip {open_clip.__version__} (such as ViT-B-32)")
    if any("hf_" in key for key in config.get("text_cfg", {})):
        raise ValueError(f"--clip-model {name}: its text network would be downloaded; take one such as ViT-B-32")
    with _refused(f"--clip-weights {path}: no weights of {name}"), _silent():
        model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False, pretrained_text=False)
        open_clip.load_checkpoint(model, str(path), weights_only=True)
    model, tokenizer = model.to(device).eval(), open_clip.get_tokenizer(name)

    @torch.no_grad()
    def score(pictures, texts):
        pixels = torch.stack([preprocess(picture) for picture in pictures]).to(device)
        seen = model.encode_image(pixels, normalize=True)  # (K, D)
        said = model.encode_text(tokenizer(list(texts)).to(device), normalize=True)
        return 100 * (seen * said).sum(dim=1).float().cpu()

    return score


class InceptionDistance:
    """FID between two sets of pictures: add() any number to "drawn" and "real", then distance().

    weights: InceptionV3's as torch-fidelity and torchmetrics use them (weights-inception-2015-12-05-….pth). ValueError
    or FileNotFoundError, in one line, for a missing package or file, or other weights.
    """

    def __init__(self, weights, device):
        path = _existing(weights, "--fid-weights")
        with _needed("--fid-weights", "torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        with _refused(f"--fid-weights {path}: no weights of FID's InceptionV3"), tempfile.TemporaryDirectory() as place:
            # The package would unpickle whatever the file holds, so it is given a copy of the tensors alone.
            torch.save(torch.load(path, map_location="cpu", weights_only=True), f"{place}/weights.pth")
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], f"{place}/weights.pth")
        self.device = device
        self.network.to(device)
        self.features = {"drawn": [], "real": []}

    @torch.no_grad()
    def add(self, which, pictures):
        """pictures: uint8 (B, 3, S, S)."""
        self.features[which].append(self.network(pictures.to(self.device))[0].cpu())

    def distance(self):
        """Two pictures of each kind are the least; figures of fewer than some thousands are too high."""
        from torch_fidelity import metric_fid

        sides = [metric_fid.fid_features_to_statistics(torch.cat(parts).double()) for parts in self.features.values()]
        return metric_fid.fid_statistics_to_metric(*sides, verbose=False)[metric_fid.KEY_METRIC_FID]


def _existing(path, flag):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file; weights are not downloaded, give their path")
    return path


@contextlib.contextmanager
def _needed(flag, package):
    try:
        yield
    except (ImportError, RuntimeError) as error:  # the latter: a torchvision that does not fit this torch
        missing = f"the package {package} cannot be imported ({' '.join(str(error).split())}); {INSTALL}"
        raise ValueError(f"{flag}: {missing}, or leave the flag out") from None


@contextlib.contextmanager
def _refused(what):
    try:
        yield
    except Exception as error:  # whatever the layer that meets other weights raises
        raise ValueError(f"{what} ({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})") from None


@contextlib.contextmanager
def _silent():
    """Within: no warnings in the log; open_clip's says that weights are random, which they are for a moment."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
