"""dalle-pytorch 1.6.6, which is measured here and compared with in tests, without what we need nothing of."""

import importlib.util
import sys
import types


def load():
    """The module dalle_pytorch.dalle_pytorch, or None where it is not installed (pip install --no-deps)."""
    wanted = ("dalle_pytorch", "axial_positional_embedding", "rotary_embedding_torch")
    if any(importlib.util.find_spec(name) is None for name in wanted):
        return None
    empty = {
        "pkg_resources": {"get_distribution": lambda name: types.SimpleNamespace(version="1.6.6")},
        "youtokentome": {},
        "transformers": {"BertTokenizer": None},
        "taming.models.vqgan": {"VQModel": None, "GumbelVQ": None},
        "omegaconf": {"OmegaConf": None},
        "requests": {},
    }
    kept = {name: sys.modules.get(name) for name in empty}
    for name, members in empty.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        return importlib.import_module("dalle_pytorch.dalle_pytorch")
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def model_like(module, vae, **sizes):
    """A dalle-pytorch DALLE of the sizes of ours; its image tokenizer is a small one that costs next to nothing."""
    small = module.DiscreteVAE(
        image_size=vae.image_size, num_layers=vae.num_layers, num_tokens=vae.num_tokens, codebook_dim=8, hidden_dim=8
    )
    return module.DALLE(vae=small, rotary_emb=False, shift_tokens=False, **sizes)
