"""A checkpoint → all that drawing needs. How the file is read is utils/checkpoint.py's business, drawing drawing.py's.

A checkpoint of ours brings its VQGAN and vocabulary along. One of the reference application brings the VQGAN's weights:
its configuration is the official f = 16 model's unless a file says otherwise.
"""

import functools
import hashlib
from pathlib import Path

import torch

import backends
from data.tokenizer import load_tokenizer
from data.words import read_summary
from models.dalle import DALLE
from models.official_vqgan import OFFICIAL_PARAMS
from models.sampling import Sampling
from models.vae import VQGanVAE, load_vqgan
from utils import checkpoint

DEMO = Path(__file__).resolve().parent.parent / "demo" / "dalle.safetensors"
# A model of fewer bytes of fp32 weights is not faster in half precision, where a rounding may change a code from one
# batch size to another.
HALF_FROM = 300e6
AT_ONCE = {"cpu": 32, "cuda": 256, "ipu": 4}  # pictures, from where on more at once are no faster; as many as fit


class LoadedModel:
    """A model that is ready to draw.

    model (DALLE, in eval mode), tokenizer, recommended (sampling settings), path, fingerprint (of the weights),
    guidable (whether it was trained without captions, too, as guidance needs), backend, batch_size (pictures at once;
    may be lowered before the first drawing), words ({word: count} of the training captions) and examples (captions);
    both are empty if the file does not have them.
    """

    def __init__(self, path, saved, model, tokenizer, recommended, backend, batch_size):
        self.path, self.model, self.tokenizer, self.recommended = str(path), model, tokenizer, recommended
        self.guidable = bool(saved.get("settings", {}).get("caption_dropout"))
        if not self.guidable:  # whatever the run's settings said
            self.recommended = recommended._replace(cond_scale=1.0)
        self.words, self.examples = read_summary(saved.get("captions"))
        self.backend, self.batch_size = backend, batch_size
        self.fingerprint = fingerprint(model)

    @property
    def side(self):
        """Rows of codes of a picture, and codes of a row."""
        return self.model.fmap_size

    @functools.cached_property
    def sampler(self):
        return self.backend.sampler(self.model, self.batch_size)

    @functools.cached_property
    def encode(self):
        return self.backend.encode(self.model.vae)

    @functools.cached_property
    def decode(self):
        return self.backend.decode(self.model.vae)


def load(
    dalle_path=None,
    *,
    device="auto",
    precision="auto",
    batch_size=None,
    vqgan_model_path=None,
    vqgan_config_path=None,
    bpe_path=None,
    saved=None,
):
    """A file of train.py or of the reference → LoadedModel. ValueError or OSError, in one line.

    dalle_path None: the demo that ships with the program. device, precision: as generate.py's flags. batch_size None:
    what the machine does well and its memory holds. saved: the file's dict, where it was read already.
    """
    path = DEMO if dalle_path is None else dalle_path
    saved = checkpoint.read(path) if saved is None else saved
    model, tokenizer, recommended = read_model(path, vqgan_model_path, vqgan_config_path, bpe_path, saved)
    if precision == "auto" and 4 * parameters(model) < HALF_FROM:
        precision = "fp32"
    backend = backends.for_inference(device, precision)
    batch_size = batch_size or fitting_batch(model, backend)
    return LoadedModel(path, saved, model, tokenizer, recommended, backend, batch_size)


def load_from_flags(settings, **more):
    """load() by the flags that generate.py, evaluate.py and app.py share."""
    names = ("device", "precision", "batch_size", "vqgan_model_path", "vqgan_config_path", "bpe_path")
    return load(settings.dalle_path, **{name: getattr(settings, name) for name in names}, **more)


def parameters(model):
    """Their number, without the VQGAN's."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vae."))


def fitting_batch(model, backend):
    """Pictures at once: as many as the machine does well, in half of the memory that is free."""
    if backend.memory is None:
        return AT_ONCE[backend.kind]
    attention = model.transformer.layers[0][0].fn.fn
    keys = 2 * len(model.transformer.layers) * attention.heads * attention.dim_head  # and values, of a position
    positions = model.text_seq_len + model.image_seq_len
    noise = model.image_seq_len * model.num_image_tokens
    picture = 4 * (2 * keys * positions + 2 * noise + 64 * 3 * model.vae.image_size**2)  # bytes, guided
    return int(max(1, min(AT_ONCE[backend.kind], backend.memory.free() // 2 // picture)))


def read_model(path, vqgan_model_path=None, vqgan_config_path=None, bpe_path=None, saved=None):
    """→ (DALLE in eval mode, tokenizer, recommended sampling settings). saved: the file's dict, if it was read."""
    saved = checkpoint.read(path) if saved is None else saved
    weights = checkpoint.model_weights(saved["weights"])
    weights.update(checkpoint.model_weights(saved.get("ema_weights", {})))  # the average draws better
    ours = saved.get("vae_params", {})
    if vqgan_model_path:
        vae = load_vqgan(vqgan_model_path, vqgan_config_path)
        check_same(vqgan_model_path, vae.fingerprint(), path, saved.get("vqgan"), "--vqgan_model_path")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("vae.")}
        weights.update({f"vae.{name}": tensor for name, tensor in vae.state_dict().items()})
    elif ours.get("target") and ours.get("params"):
        check_vqgan_counts(path, ours["params"], weights)
        vae = functools.partial(VQGanVAE, ours["params"], gumbel=ours["target"] == "GumbelVQ")
    elif any(name.startswith("vae.") for name in weights):
        vae = functools.partial(VQGanVAE, OFFICIAL_PARAMS)
    else:
        vae = load_vqgan()
        weights.update({f"vae.{name}": tensor for name, tensor in vae.state_dict().items()})
    tokenizer = read_tokenizer(path, bpe_path, saved.get("tokenizer", {}))
    hparams = saved["hparams"]
    names = ("num_text_tokens", "text_seq_len", "dim", "depth", "heads", "dim_head", "loss_img_weight", "attn_types")
    names += ("sandwich_norm",)
    missing = [name for name in names if name not in hparams]
    if missing:
        raise ValueError(f"{path}: its hparams lack {', '.join(missing)}")
    if tokenizer.vocab_size != hparams["num_text_tokens"]:
        raise ValueError(
            f"{path}: was trained with {hparams['num_text_tokens']} text tokens, the vocabulary "
            f"{bpe_path or 'of CLIP'} has {tokenizer.vocab_size}; give the right one with --bpe_path"
        )
    if not isinstance(hparams["depth"], int) or not 0 < hparams["depth"] <= len(weights):
        raise ValueError(f"{path}: its hparams describe no model (depth is {hparams['depth']!r})")

    def build():
        image_tokenizer = vae() if isinstance(vae, functools.partial) else vae
        return DALLE(vae=image_tokenizer, **{name: hparams[name] for name in names})

    check_sizes(path, build, weights)
    model = build()
    model.load_state_dict(weights)
    return model.eval(), tokenizer, Sampling().override(saved.get("sampling", {}))


def check_vqgan_counts(path, params, weights):
    """Raise ValueError if a file's VQGAN has more blocks than the file has tensors."""
    sizes = params.get("ddconfig") if isinstance(params, dict) else None
    levels, blocks = (sizes.get("ch_mult"), sizes.get("num_res_blocks")) if isinstance(sizes, dict) else ((), 0)
    if isinstance(levels, (list, tuple)) and isinstance(blocks, int) and len(levels) * max(blocks, 1) > len(weights):
        raise ValueError(f"{path}: its VQGAN has {blocks} blocks on {len(levels)} levels, more than the file holds")


def check_sizes(path, build, weights):
    """Raise ValueError if the model that `build` makes does not fit a file's weights, before memory is allocated.

    It is built without storage first: a few bytes of hparams may claim terabytes. What is not among the weights, such
    as attention masks, may take as much as they do, and at most 1 GiB more.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: its hparams describe no model ({str(error).splitlines()[0][:120]})") from None
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{path}: does not fit its hparams and VQGAN: {misfit} (see --vqgan_model_path)")
    masks = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    held = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if masks > held + 2**30:
        raise ValueError(f"{path}: its hparams ask for {masks / 2**30:.0f} GiB of attention masks")


def read_tokenizer(path, bpe_path, known):
    """That of a file's `tokenizer` entry, or another one by its path, which must be the same."""
    vocabulary = known.get("vocabulary")
    if bpe_path is None and vocabulary is not None:
        return load_tokenizer(vocabulary=bytes(vocabulary.tolist()))
    tokenizer = load_tokenizer(bpe_path)
    check_same(bpe_path or "CLIP's vocabulary", tokenizer.fingerprint, path, known.get("sha256"), "--bpe_path")
    return tokenizer


def check_same(name, found, dalle_path, trained_with, flag):
    """ValueError where a file is not the one that a checkpoint names (None: it names none), with both fingerprints."""
    if trained_with not in (None, found):
        raise ValueError(
            f"{name}: fingerprint {checkpoint.short(found)}, but {dalle_path} was trained with "
            f"{checkpoint.short(trained_with)}; leave {flag} out"
        )


def fingerprint(model):
    """SHA-256 (hex) over all weights as they draw, the VQGAN's included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
