"""Loading of a checkpoint into a model that is ready to generate.

A checkpoint of train.py contains its vocabulary, and its VQGAN's sizes or weights. One of the reference application
contains the VQGAN's weights alone; its sizes are those of the official f = 16 model unless a file gives others.
"""

import functools
import hashlib
import inspect
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

import backends
from backends.base import Backend
from data.tokenizer import Tokenizer, load_tokenizer
from models.dalle import DALLE
from models.sampling import Sampling
from models.vae import ImageTokenizer, VQGanVAE, build_image_tokenizer, hash_tensors
from models.vqgan_files import infer_params, load_vqgan
from utils import checkpoint
from utils.errors import first_line
from utils.files import AnyPath

DEMO = Path(__file__).resolve().parent.parent / "demo" / "dalle.safetensors"
# Models of fewer bytes of fp32 weights are not faster in half precision, whose rounding may change a code from one
# batch size to another.
LEAST_BYTES_FOR_HALF = 300e6
REQUIRED_HPARAMS = (
    *("num_text_tokens", "text_seq_len", "dim", "depth", "heads", "dim_head", "loss_img_weight", "attn_types"),
    "sandwich_norm",
)
OPTIONAL_HPARAMS = ("rotary_emb", "shift_tokens", "stable", "reversible", "shared_attn_ids", "shared_ff_ids")


class LoadedModel:
    """A model that is ready to generate; `sampler`, `encode` and `decode` are its backend's functions for it."""

    def __init__(
        self,
        path: AnyPath,
        saved: Dict[str, Any],
        model: DALLE,
        tokenizer: Tokenizer,
        recommended: Sampling,
        backend: Backend,
        batch_size: int,
        window: Optional[int],
    ):
        self.path, self.model, self.tokenizer = str(path), model, tokenizer
        # Guidance needs a model that was trained without captions, too.
        self.guidable = bool(saved.get("settings", {}).get("caption_dropout"))
        self.recommended = recommended if self.guidable else recommended._replace(cond_scale=1.0)
        # The training captions' words with their counts, and some captions; empty if the file does not have them.
        self.words, self.examples = checkpoint.read_summary(saved.get("captions"))
        # The batch size may be lowered before the first use of `sampler`.
        self.backend, self.batch_size, self.window = backend, batch_size, window
        self.fingerprint = hash_tensors(model.state_dict(), hashlib.sha256())  # of all weights, the VQGAN's included

    @property
    def side(self) -> int:
        """Rows of codes of an image, and codes of a row."""
        return self.model.fmap_size

    def unknown_words(self, prompt: str) -> List[str]:
        """Return a prompt's words that no training caption has; none if the checkpoint does not keep their words."""
        return [word for word in dict.fromkeys(checkpoint.split_words(prompt)) if self.words and word not in self.words]

    @functools.cached_property
    def sampler(self) -> Callable[..., Tensor]:
        return self.backend.sampler(self.model, self.batch_size, self.window)

    def drop_sampler(self) -> None:
        """Free the memory of the sampler, which has keys and values of its last batch; the next use makes another."""
        vars(self).pop("sampler", None)

    @functools.cached_property
    def encode(self) -> Callable[[Tensor], Tensor]:
        return self.backend.encode(self.model.vae)

    @functools.cached_property
    def decode(self) -> Callable[..., Tensor]:
        return self.backend.decode(self.model.vae)


def load(
    dalle_path: Optional[str] = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: Optional[int] = None,
    window: Optional[int] = None,
    vqgan_model_path: Optional[str] = None,
    vqgan_config_path: Optional[str] = None,
    bpe_path: Optional[str] = None,
    executable_cache_dir: Optional[str] = None,
    saved: Optional[Dict[str, Any]] = None,
) -> LoadedModel:
    """Load a checkpoint of train.py or of the reference application.

    Args:
        dalle_path: None loads the bundled model.
        device, precision, executable_cache_dir: as the flags of generate.py.
        batch_size: images at once; None uses what suits the machine and fits half of its free memory.
        window: codes of an image that a pass computes; the images are the same. None uses what is fastest.
        saved: the file's contents, if they were read already.

    Raises:
        ValueError, OSError: the file cannot be used; one line.
    """
    path = DEMO if dalle_path is None else dalle_path
    saved = checkpoint.read(path) if saved is None else saved
    model, tokenizer, recommended = read_model(path, vqgan_model_path, vqgan_config_path, bpe_path, saved)
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vae."))
    if precision == "auto" and 4 * weights < LEAST_BYTES_FOR_HALF:
        precision = "fp32"
    backend = backends.for_inference(device, precision, executable_cache_dir)
    if backend.kind == "ipu" and not model.transformer.is_plain:
        raise ValueError(f"{path}: has options of DALLE-pytorch that do not run on IPUs; generate with --device cpu")
    batch_size = batch_size or backend.images_at_once(model)
    return LoadedModel(path, saved, model, tokenizer, recommended, backend, batch_size, window)


def load_from_flags(settings: Namespace, saved: Optional[Dict[str, Any]] = None) -> LoadedModel:
    """Call load with the flags that generate.py, evaluate.py and app.py share."""
    options = {name: value for name, value in vars(settings).items() if name in inspect.signature(load).parameters}
    return load(**options, saved=saved)


def read_model(
    path: AnyPath,
    vqgan_model_path: Optional[str] = None,
    vqgan_config_path: Optional[str] = None,
    bpe_path: Optional[str] = None,
    saved: Optional[Dict[str, Any]] = None,
) -> Tuple[DALLE, Tokenizer, Sampling]:
    """Build the DALLE of a checkpoint, in evaluation mode, its tokenizer, and its recommended sampling settings.

    Averaged weights are used if the file has them. Its sizes are checked before memory is allocated for them.

    Args:
        saved: the file's contents, if they were read already.
    """
    saved = checkpoint.read(path) if saved is None else saved
    weights = checkpoint.model_weights(saved["weights"])
    weights.update(checkpoint.model_weights(saved.get("ema_weights", {})))
    tokenizer = read_tokenizer(path, bpe_path, saved.get("tokenizer", {}))
    hparams = saved["hparams"]
    missing = [name for name in REQUIRED_HPARAMS if name not in hparams]
    if missing:
        raise ValueError(f"{path}: its hparams lack {', '.join(missing)}")
    if tokenizer.vocab_size != hparams["num_text_tokens"]:
        raise ValueError(
            f"{path}: was trained with {hparams['num_text_tokens']} text tokens, but the vocabulary "
            f"{bpe_path or 'of CLIP'} has {tokenizer.vocab_size}; give the right one with --bpe_path"
        )
    checkpoint.check_vocabulary(path, saved, tokenizer.fingerprint, "--bpe_path")
    if not isinstance(hparams["depth"], int) or not 0 < hparams["depth"] <= len(weights):
        raise ValueError(f"{path}: its hparams describe no model (depth is {hparams['depth']!r})")
    build_vae, weights = find_vqgan(path, vqgan_model_path, vqgan_config_path, saved, weights)

    def build() -> DALLE:
        return DALLE(
            vae=build_vae(),
            **{name: hparams[name] for name in (*REQUIRED_HPARAMS, *OPTIONAL_HPARAMS) if name in hparams},
        )

    check_sizes(path, build, weights)
    model = build()
    model.load_state_dict(weights)
    return model.eval(), tokenizer, Sampling().override(saved.get("sampling", {}))


def find_vqgan(
    path: AnyPath,
    vqgan_model_path: Optional[str],
    vqgan_config_path: Optional[str],
    saved: Dict[str, Any],
    weights: Dict[str, Tensor],
) -> Tuple[Callable[[], ImageTokenizer], Dict[str, Tensor]]:
    """Return a function that builds a checkpoint's VQGAN, and the weights with those of a VQGAN from elsewhere."""
    params = saved.get("vae_params", {})
    if not vqgan_model_path and params.get("target"):
        return functools.partial(build_image_tokenizer, params), weights
    if not vqgan_model_path and any(name.startswith("vae.") for name in weights):
        inside = {
            name[len("vae.model.") :]: tensor for name, tensor in weights.items() if name.startswith("vae.model.")
        }
        try:
            params, gumbel = infer_params(inside, grid_side(weights, saved["hparams"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; give the VQGAN with --vqgan_model_path") from None
        return functools.partial(VQGanVAE, params, gumbel), weights
    vae = load_vqgan(vqgan_model_path, vqgan_config_path)
    if vqgan_model_path:
        check_fingerprint(vqgan_model_path, vae.fingerprint(), path, saved.get("vqgan"), "--vqgan_model_path")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("vae.")}
    return lambda: vae, {**weights, **{f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}}


def grid_side(weights: Dict[str, Tensor], hparams: Dict[str, Any]) -> int:
    """Return the side of a model's code grid; ValueError if its weights do not tell it."""
    if "image_pos_emb.weights_0" in weights:
        return weights["image_pos_emb.weights_0"].shape[1]
    if "transformer.pos_emb" in weights and isinstance(hparams["text_seq_len"], int):
        return math.isqrt(max(0, weights["transformer.pos_emb"].shape[1] - hparams["text_seq_len"] - 1))
    raise ValueError("it has no embeddings of image positions")


def check_sizes(path: AnyPath, build: Callable[[], DALLE], weights: Dict[str, Tensor]) -> None:
    """Raise ValueError if the model that `build` makes does not fit a file's weights, before memory is allocated.

    It is built without storage first, because a few bytes of hparams may claim terabytes. Attention masks, which are
    not among the weights, may take at most 1 GiB more memory than those.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: its hparams describe no model ({first_line(error)})") from None
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{path}: does not fit its hparams and VQGAN: {misfit} (see --vqgan_model_path)")
    masks = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if masks > stored + 2**30:
        raise ValueError(f"{path}: its hparams ask for {masks / 2**30:.0f} GiB of attention masks")


def read_tokenizer(path: AnyPath, bpe_path: Optional[str], entry: Dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a file's `tokenizer` entry, or the one at bpe_path if its fingerprint is the same."""
    vocabulary, keep_ids = entry.get("vocabulary"), bool(entry.get("keeps_ids"))
    if bpe_path is None and vocabulary is not None:
        return load_tokenizer(vocabulary=bytes(vocabulary.tolist()), keep_ids=keep_ids)
    tokenizer = load_tokenizer(bpe_path, keep_ids=keep_ids)
    check_fingerprint(bpe_path or "CLIP's vocabulary", tokenizer.fingerprint, path, entry.get("sha256"), "--bpe_path")
    return tokenizer


def check_fingerprint(name: str, found: str, path: AnyPath, expected: Optional[str], flag: str) -> None:
    """Raise ValueError if a file is not the one that the checkpoint at `path` expects; None expects nothing."""
    if expected not in (None, found):
        raise ValueError(
            f"{name}: fingerprint {checkpoint.short(found)}, but {path} was trained with {checkpoint.short(expected)}; "
            f"leave {flag} out"
        )
