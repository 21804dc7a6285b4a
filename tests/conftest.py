"""What several tests share: small real models, and dalle-pytorch as an independent oracle."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)


class TinyTokenizer(nn.Module):
    """An image tokenizer in four lines: a picture's code is its mean brightness in each of fmap × fmap cells."""

    def __init__(self, fmap_size=4, num_tokens=32):
        super().__init__()
        self.image_size, self.num_layers, self.num_tokens = fmap_size * 8, 3, num_tokens

    def get_codebook_indices(self, pixels):
        means = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 8).flatten(1)
        return (means * self.num_tokens).long().clamp(0, self.num_tokens - 1)


@pytest.fixture
def tiny_vae():
    return TinyTokenizer()


@pytest.fixture(scope="session")
def shared_data():
    """The real photographs and captions; they stand beside the project where it is developed and are no part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real photographs beside the project")
    return folder


@pytest.fixture(scope="session")
def dalle_pytorch():
    """dalle-pytorch 1.6.6 with the packages that it imports and we do not need stood in for by empty modules."""
    pytest.importorskip("axial_positional_embedding")
    pytest.importorskip("rotary_embedding_torch")
    stand_ins = {
        "pkg_resources": {"get_distribution": lambda name: types.SimpleNamespace(version="1.6.6")},
        "youtokentome": {},
        "transformers": {"BertTokenizer": None},
        "taming.models.vqgan": {"VQModel": None, "GumbelVQ": None},
        "omegaconf": {"OmegaConf": None},
        "requests": {},
    }
    kept = {name: sys.modules.get(name) for name in stand_ins}
    for name, members in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        importlib.util.find_spec("dalle_pytorch") or pytest.skip("dalle-pytorch is not installed")
        return importlib.import_module("dalle_pytorch.dalle_pytorch")
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
