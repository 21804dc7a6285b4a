"""Draws pictures for prompts with a checkpoint of train.py, or of the reference application.

python generate.py --dalle_path output/demo/ckpt/dalle_step_800.pt --text "a small red circle above a large blue square"
"""

import logging
import random
import re
import time
from pathlib import Path

import args
import log

DEFAULTS = {"top_k": 0.99, "top_p": None, "temperature": 1.0, "cond_scale": 1.0}
NAME_BYTES = 200  # of a folder's name; file systems allow 255


def main(argv=None):
    settings = args.generate_arguments(argv)
    log.set_up()
    with log.interrupt_exits(), log.bad_input_exits():
        import torch

        from backends import select
        from utils.checkpoint import check_writable

        model, tokenizer, recommended = load(
            settings.dalle_path, settings.vqgan_model_path, settings.vqgan_config_path, settings.bpe_path
        )
        for prompt in settings.prompts:  # all of them, before hours go into the first
            tokenize_prompt(model, tokenizer, prompt)
        check_writable(settings.outputs_dir, "--outputs_dir")
        backend = select(settings)
        sampler, decode = backend.sampler(model), backend.decode(model.vae)
        sampling = chosen_sampling(settings, recommended)
        seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
        # Several processes share out prompts or, where there are too few of them, the pictures of each.
        share_pictures = len(settings.prompts) < backend.world_size <= settings.num_images and backend.gather
        if share_pictures:
            seed = int(backend.gather(torch.tensor([seed]))[0])
            log.set_up(logging.WARNING if backend.rank else logging.INFO)
        log.LOG.info("seed %d, %s", seed, told(sampling, recommended))
        for prompt in settings.prompts:
            if not share_pictures and settings.prompts.index(prompt) % backend.world_size != backend.rank:
                continue
            text = tokenize_prompt(model, tokenizer, prompt)
            if settings.gentxt:
                text, prompt = complete_prompt(model, tokenizer, text, seed)
                log.LOG.info("completed prompt: %s", prompt)
            started = time.monotonic()
            first, last = 0, settings.num_images
            if share_pictures:
                first, last = (last * rank // backend.world_size for rank in (backend.rank, backend.rank + 1))
            pictures = draw(sampler, decode, text, last - first, settings.batch_size, seed + first, sampling, prompt)
            if share_pictures:
                pictures = backend.gather(pictures)
                if backend.rank:
                    continue
            log.LOG.info("throughput: %.3f images/sec", len(pictures) / max(time.monotonic() - started, 1e-9))
            folder = save_pictures(pictures, prompt, settings.outputs_dir)
            print(f"{len(pictures)} pictures of '{prompt}' in {folder}")


def load(dalle_path, vqgan_model_path=None, vqgan_config_path=None, bpe_path=None, saved=None):
    """A checkpoint → (DALLE in eval mode, tokenizer, recommended sampling settings). saved: its dict, where it was read
    already.

    A checkpoint of ours brings its VQGAN and vocabulary along. One of the reference brings the VQGAN's weights: its
    configuration is the official f=16 model's unless vqgan_model_path says otherwise. ValueError or OSError.
    """
    from data.tokenizer import load_tokenizer
    from models.dalle import DALLE
    from models.official_vqgan import OFFICIAL_PARAMS
    from models.vae import VQGanVAE, load_vqgan
    from utils import checkpoint

    saved = checkpoint.read(dalle_path) if saved is None else saved
    weights = checkpoint.model_weights(saved["weights"])
    weights.update(checkpoint.model_weights(saved.get("ema_weights", {})))  # the average draws better
    ours = saved.get("vae_params", {})
    if vqgan_model_path:
        vae = load_vqgan(vqgan_model_path, vqgan_config_path)
        check_same(vqgan_model_path, vae.fingerprint(), dalle_path, saved.get("vqgan"), "--vqgan_model_path")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("vae.")}
        weights.update({f"vae.{name}": tensor for name, tensor in vae.state_dict().items()})
    elif ours.get("target") and ours.get("params"):
        vae = VQGanVAE(ours["params"], gumbel=ours["target"] == "GumbelVQ")
    elif any(name.startswith("vae.") for name in weights):
        vae = VQGanVAE(OFFICIAL_PARAMS)
    else:
        vae = load_vqgan()
        weights.update({f"vae.{name}": tensor for name, tensor in vae.state_dict().items()})

    known = saved.get("tokenizer", {})
    if bpe_path is None and torch_bytes(known.get("vocabulary")) is not None:
        tokenizer = load_tokenizer(vocabulary=torch_bytes(known["vocabulary"]))
    else:
        tokenizer = load_tokenizer(bpe_path)
        vocabulary = bpe_path or "CLIP's vocabulary"
        check_same(vocabulary, tokenizer.fingerprint, dalle_path, known.get("sha256"), "--bpe_path")
    hparams = saved["hparams"]
    names = ("num_text_tokens", "text_seq_len", "dim", "depth", "heads", "dim_head", "loss_img_weight", "attn_types")
    names += ("sandwich_norm",)
    missing = [name for name in names if name not in hparams]
    if missing:
        raise ValueError(f"{dalle_path}: its hparams lack {', '.join(missing)}")
    if tokenizer.vocab_size != hparams["num_text_tokens"]:
        raise ValueError(
            f"{dalle_path}: was trained with {hparams['num_text_tokens']} text tokens, the vocabulary "
            f"{bpe_path or 'of CLIP'} has {tokenizer.vocab_size}; give the right one with --bpe_path"
        )
    try:
        model = DALLE(vae=vae, **{name: hparams[name] for name in names})
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{dalle_path}: its hparams describe no model ({str(error).splitlines()[0]})") from None
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{dalle_path}: does not fit its hparams and VQGAN: {misfit} (see --vqgan_model_path)")
    model.load_state_dict(weights)
    recommended = {
        **DEFAULTS,
        **{key: value for key, value in saved.get("sampling", {}).items() if value is not None},
    }
    return model.eval(), tokenizer, recommended


def check_same(name, fingerprint, dalle_path, trained_with, flag):
    """ValueError where a file is not the one that a checkpoint names (None: it names none), with both fingerprints."""
    from utils.checkpoint import short

    if trained_with not in (None, fingerprint):
        raise ValueError(
            f"{name}: fingerprint {short(fingerprint)}, but {dalle_path} was trained with {short(trained_with)}; "
            f"leave {flag} out"
        )


def chosen_sampling(settings, recommended):
    """The sampling settings that the flags give, and the checkpoint's recommendation where they give none."""
    given = {key: getattr(settings, key) for key in DEFAULTS}
    return {key: recommended[key] if value is None else value for key, value in given.items()}


def told(sampling, recommended):
    """Sampling settings for the log; those that differ from what the checkpoint recommends with its own."""
    return ", ".join(
        f"{key} {value}" + (f" (recommended {recommended[key]})" if value != recommended[key] else "")
        for key, value in sampling.items()
    )


def torch_bytes(tensor):
    return None if tensor is None else bytes(tensor.tolist())


def tokenize_prompt(model, tokenizer, prompt):
    """Tokens int64 (1, text_seq_len); ValueError for a prompt of which nothing is left, or with too many tokens."""
    tokens = tokenizer.encode(prompt)
    if not tokenizer.decode(tokens):  # nothing at all, or the token for what is unknown
        raise ValueError(f"--text: '{prompt}' has no words that the vocabulary knows")
    if len(tokens) > model.text_seq_len:
        raise ValueError(f"--text: '{prompt[:60]}' is {len(tokens)} tokens long, the model reads {model.text_seq_len}")
    return tokenizer.tokenize([prompt], model.text_seq_len)


def complete_prompt(model, tokenizer, text, seed):
    """--gentxt: (the tokens with those that the model adds to them, what they say)."""
    import torch

    from models.sampling import complete_text

    text = complete_text(model, text[:, text[0] != 0], generator=torch.Generator().manual_seed(seed))
    return text, " ".join(tokenizer.decode(text[0]).split())


def draw(sampler, decode, text, count, batch_size, seed, sampling, title=""):
    """`count` pictures of text tokens (1, text_seq_len), float (count, 3, S, S) in [0, 1]; by a backend's sampler and
    decode.

    Picture i depends on seed + i alone.
    """
    import torch
    from tqdm import tqdm

    pictures = []
    with tqdm(total=count, unit="picture", desc=title[:40], disable=None) as bar:
        for first in range(0, count, batch_size):
            generators = [torch.Generator().manual_seed(seed + i) for i in range(first, min(first + batch_size, count))]
            codes = sampler(text.repeat(len(generators), 1), generator=generators, **sampling)
            pictures.append(decode(codes))
            bar.update(len(generators))
    return torch.cat(pictures)


def as_picture(pixels):
    """Float (3, H, W) in [0, 1] → PIL, each value rounded, contrast untouched."""
    from PIL import Image

    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def grid_of(pictures, columns=None, gap=2):
    """Float (N, 3, H, W) → one PIL picture, row by row on white."""
    from PIL import Image

    columns = columns or max(1, round(len(pictures) ** 0.5))
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[2] + gap, pictures.shape[3] + gap
    grid = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for place, pixels in enumerate(pictures):
        row, column = divmod(place, columns)
        grid.paste(as_picture(pixels), (gap + column * width, gap + row * height))
    return grid


def folder_name(prompt):
    """A prompt as one plain file name: _ for spaces and for what means something to a file system, 100 characters."""
    name = re.sub(r"[^\w.,'()+-]", "_", prompt)[:100].lstrip(".") or "prompt"
    return name.encode()[:NAME_BYTES].decode(errors="ignore")


def save_pictures(pictures, prompt, outputs_dir):
    """0.jpg … , grid.png and caption.txt in the prompt's folder, numbered on after what is there; → the folder."""
    base, caption = Path(outputs_dir) / folder_name(prompt), f"{prompt}\n".encode()
    folder, number = base, 1
    while folder.is_file() or ((folder / "caption.txt").exists() and (folder / "caption.txt").read_bytes() != caption):
        number += 1  # another prompt has this name
        folder = base.with_name(f"{base.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "caption.txt").write_bytes(caption)
    taken = [int(path.stem) for path in folder.glob("*.jpg") if path.stem.isdigit()]
    first = max(taken, default=-1) + 1
    for place, pixels in enumerate(pictures):
        as_picture(pixels).save(folder / f"{first + place}.jpg", quality=95, subsampling=0)
    grid = "grid.png" if first == 0 else f"grid-{first}.png"
    grid_of(pictures).save(folder / grid)
    return folder


if __name__ == "__main__":
    main()
