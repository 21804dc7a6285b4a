"""L16 (or, with --quick, a small network) from codes: ours, dalle-pytorch's, a batch, training and drawing them.

Rows give seconds a sample, one number a repetition, and the work that a sample is; limits.py says how long that must
take. In one process there is either our network or the peer's.
"""

import argparse

import torch

import args
from backends.native.backend import NativeTrainingBackend
from benchmarks import peer
from benchmarks.limits import DTYPES, image_head, layer_weights, repeated, seconds_of, training_operations
from models.dalle import DALLE

TEXT_TOKENS = 8192  # of bpe/bpe_yttm_vocab.txt
QUICK = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "dim_head": 32}


class Codes:
    """All that a DALLE trained from codes wants of the official VQGAN."""

    image_size, num_layers, num_tokens = 256, 4, 1024


def settings_of(quick, **changes):
    given = args.train_arguments(["--config", "L16", "--device", "auto", "--generated-data"])
    one = {"gradient_accumulation": 1, "replication_factor": 1, "loss_scaling": 1, "learning_rate": 1e-5}
    return argparse.Namespace(**{**vars(given), **one, **(QUICK if quick else {}), **changes})


def sizes_of(settings):
    return {
        "dim": settings.hidden_size,
        "num_text_tokens": TEXT_TOKENS,
        "text_seq_len": settings.text_seq_len,
        "depth": settings.num_hidden_layers,
        "heads": settings.num_attention_heads,
        "dim_head": settings.dim_head,
        "attn_types": settings.attn_types,
    }


def our_model(settings):
    torch.manual_seed(0)
    return DALLE(vae=Codes(), **sizes_of(settings))


def their_model(settings, device):
    torch.manual_seed(0)
    return peer.model_like(peer.load(), Codes(), **sizes_of(settings)).to(device)


def batch_for(model, rows, device="cpu"):
    """text (rows, T), no two alike, and codes (rows, L)."""
    text = torch.randint(1, TEXT_TOKENS, (rows, model.text_seq_len))
    return text.to(device), torch.randint(0, model.num_image_tokens, (rows, model.image_seq_len)).to(device)


def training(rows, quick):
    settings = settings_of(quick, batch_size=rows)
    backend = NativeTrainingBackend(settings)
    model = our_model(settings)
    trainer = backend.trainer(model)
    batch = batch_for(model, rows)
    seconds = repeated(lambda: trainer.step([batch]), backend.device, quick)
    work = {"operations": training_operations(model), "precision": backend.precision}
    return [taken / rows for taken in seconds], work


def their_training(rows, quick):
    settings = settings_of(quick, batch_size=rows)
    device = NativeTrainingBackend(settings).device
    model = their_model(settings, device).train()
    batch = batch_for(model, rows, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step():
        model(*batch, return_loss=True).backward()
        optimizer.step()
        optimizer.zero_grad()

    return [taken / rows for taken in repeated(step, device, quick, at_least=2, enough_seconds=0)]


def drawing(pictures, quick):
    """Codes of one caption, top-k 0.99: the caption is read once, the weights once a code."""
    settings = settings_of(quick, batch_size=pictures)
    backend = NativeTrainingBackend(settings)
    model = our_model(settings)
    sampler = backend.sampler(model, settings.batch_size)
    text = batch_for(model, 1)[0].repeat(pictures, 1)
    seconds = repeated(lambda: sampler(text, generator=torch.Generator().manual_seed(0)), backend.device, quick)
    products = model.image_seq_len * (layer_weights(model) + image_head(model))
    work = {"operations": 2 * products, "precision": backend.precision}
    work["bytes"] = torch.finfo(DTYPES[backend.precision]).bits // 8 * products / pictures
    return [taken / pictures for taken in seconds], work


def their_drawing(pictures, quick):
    """dalle-pytorch's generate_images with its cache, once and cold: a picture takes it minutes."""
    settings = settings_of(quick, batch_size=pictures)
    device = NativeTrainingBackend(settings).device
    model = their_model(settings, device).eval()
    text = batch_for(model, 1, device)[0].repeat(pictures, 1)
    return [
        seconds_of(lambda: model.generate_images(text, filter_thres=0.99, use_cache=True), device) / pictures,
    ]


def prefill(rows, quick):
    """One pass over different captions and all codes but the last, which is then drawn."""
    settings = settings_of(quick, batch_size=rows)
    backend = NativeTrainingBackend(settings)
    model = our_model(settings)
    sampler = backend.sampler(model, settings.batch_size)
    text, codes = batch_for(model, rows)
    seconds = repeated(lambda: sampler(text, image_codes=codes[:, :-1]), backend.device, quick)
    positions = model.text_seq_len + model.image_seq_len - 1
    operations = 2 * (positions * layer_weights(model) + image_head(model))
    return [taken / rows for taken in seconds], {"operations": operations, "precision": backend.precision}


def their_prefill(rows, quick):
    settings = settings_of(quick, batch_size=rows)
    device = NativeTrainingBackend(settings).device
    model = their_model(settings, device).eval()
    text, codes = batch_for(model, rows, device)
    with torch.no_grad():
        return [taken / rows for taken in repeated(lambda: model(text, codes[:, :-1]), device, quick)]
