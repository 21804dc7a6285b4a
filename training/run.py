"""settings → Run: the machine, tokenizers, model, datasets and schedule of a run, checked before anything is spent.

Where a run goes on from is checkpoints.py's.
"""

import logging
import math
import os
from pathlib import Path

import torch

import backends
import log
from data.codes import load_codes, open_code_cache
from data.loader import GeneratedDataset, TextImageDataset
from data.order import EpochOrder
from data.tokenizer import load_tokenizer
from models.dalle import DALLE
from models.official_vqgan import OFFICIAL_PARAMS
from models.vae import VQGanVAE, load_vqgan
from training import checkpoints, dry_run, trackers
from training.metrics import MetricsFile
from training.plot import Plot
from training.trackers import Trackers
from utils import optimization

logger = logging.getLogger("minidalle")


class Run:
    """What a run holds. `step` is the number of updates so far, as are the figures beside it; files keep them."""

    def __init__(self, **parts):
        self.step = 0
        self.skipped = 0  # updates left out, since the gradient was not finite
        self.epoch_loss = (0.0, 0)  # sum and number of this epoch's losses
        self.validation_loss = self.best_loss = None
        self.post_update_done = True  # whether what follows the last update, validation and an epoch's end, is done
        self.pairs = None  # of sample pictures, once they are read
        self.captions = None  # their words and examples, once they are collected
        self.metrics = self.plot = None
        self.trackers = Trackers([])  # rank 0 alone has some
        vars(self).update(parts)

    def epoch(self):
        """The epoch of the coming update, from 0."""
        return self.step // self.batches.batches_per_epoch

    def epoch_begins(self):
        """Whether the coming update is an epoch's first."""
        return self.step % self.batches.batches_per_epoch == 0


def build(settings):
    """Everything a run needs, or ValueError / OSError in one line."""
    backend = backends.for_training(settings)
    if backend.rank:
        log.set_up(logging.WARNING)
    tokenizer = load_tokenizer(settings.bpe_path)
    # A compiler wants no more than the shape of samples.
    made_up = settings.generated_data or settings.synthetic_data or backend.compile_only
    for flag in ("input_folder", "validation_folder"):  # before a VQGAN is fetched
        folder = getattr(settings, flag)
        if folder and not made_up and not Path(folder).exists():
            raise FileNotFoundError(f"--{flag.replace('_', '-')} {folder}: no such folder")
    # Before pictures are encoded, which may take hours.
    folder = checkpoints.Folder(settings, writes=not backend.rank and not settings.dry_run)
    origin = folder.origin()
    folder.prepare()
    torch.manual_seed(settings.random_seed)
    vae = image_tokenizer(settings, made_up)
    hparams = {
        "num_text_tokens": tokenizer.vocab_size,
        "text_seq_len": settings.text_seq_len,
        "dim": settings.hidden_size,
        "depth": settings.num_hidden_layers,
        "heads": settings.num_attention_heads,
        "dim_head": settings.dim_head,
        "loss_img_weight": settings.loss_img_weight,
        "attn_types": tuple(settings.attn_types),
        "ff_dropout": settings.ff_dropout,
        "attn_dropout": settings.attn_dropout,
        "sandwich_norm": settings.sandwich_norm,
    }
    torch.manual_seed(settings.random_seed)  # again: an untrained VQGAN drew numbers
    model = DALLE(vae=vae, **hparams)
    trainer = backend.trainer(model)
    with backend.making_codes():
        dataset, validation_set = datasets(settings, backend, tokenizer, vae, made_up)
    batches = EpochOrder(
        len(dataset),
        backend.samples_per_step,
        seed=settings.random_seed,
        rank=backend.rank,
        world_size=backend.world_size,
    )
    steps = batches.batches_per_epoch * settings.epochs
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    schedule = optimization.LearningRate(
        settings.lr_scheduler,
        settings.learning_rate,
        epochs=math.ceil(steps / batches.batches_per_epoch),
        steps=steps,
        warmup_steps=settings.warmup_steps,
    )
    run = Run(
        settings=settings,
        backend=backend,
        folder=folder,
        tokenizer=tokenizer,
        vae=vae,
        dataset=dataset,
        validation_set=validation_set,
        batches=batches,
        hparams=hparams,
        trainer=trainer,
        schedule=schedule,
        steps=steps,
        vqgan=vae.fingerprint(),  # once: both are hashes of all there is
        data=dataset.fingerprint(),
    )
    if origin is not None:
        checkpoints.resume(run, *origin, model)
    if not backend.rank and not settings.dry_run:
        open_trackers(run)  # last, when nothing else can be refused
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    together = backend.samples_per_step * backend.world_size
    logger.info("%d pictures, %d steps of %d samples", len(dataset), steps, together)
    if validation_set is not None:
        logger.info("%d in the validation set", len(validation_set))
    logger.info("%s trainable parameters, %d text tokens", f"{trained:,}", tokenizer.vocab_size)
    return run


def open_trackers(run):
    """metrics.jsonl and loss.png of the output folder, and the trackers that flags ask for."""
    asked = list(trackers.chosen(run.settings, run.folder.path, run.step))
    if run.folder.path:
        run.metrics = MetricsFile(run.folder.path / "metrics.jsonl", run.step)
        run.plot = Plot(run.metrics.path)
        asked.insert(0, run.metrics)
    run.trackers = Trackers(asked)


def image_tokenizer(settings, made_up):
    """The VQGAN of --vae-path or --vqgan-model-path; the official one otherwise (untrained for made-up samples)."""
    path = settings.vae_path or settings.vqgan_model_path
    if path is None and made_up:
        return VQGanVAE(OFFICIAL_PARAMS)
    return load_vqgan(path, settings.vqgan_config_path)


def datasets(settings, backend, tokenizer, vae, made_up):
    """(what is learnt, what is held out or None): folders' pairs with pixels or cached codes, or made-up samples."""
    use_codes = not settings.no_codes_cache
    if made_up:
        codes = {"num_image_codes": vae.num_tokens, "image_seq_len": vae.image_seq_len} if use_codes else {}
        dataset = GeneratedDataset(
            16 * backend.samples_per_step * backend.world_size,
            text_seq_len=settings.text_seq_len,
            num_text_tokens=tokenizer.vocab_size,
            image_size=vae.image_size,
            byteio=settings.byteio,
            seed=settings.random_seed,
            **codes,
        )
    else:
        dataset = folder_dataset(settings.input_folder, settings, backend, tokenizer, vae)
    if settings.validation_split:
        return dataset, dataset.split_off(settings.validation_split)
    if settings.validation_folder and not made_up:
        return dataset, folder_dataset(settings.validation_folder, settings, backend, tokenizer, vae, training=False)
    return dataset, None


def folder_dataset(folder, settings, backend, tokenizer, vae, training=True):
    """A folder's pairs, with cached codes or with pixels."""
    cache_dir = None if settings.no_codes_cache else settings.codes_cache or folder
    cache = None
    if cache_dir:
        cache = open_code_cache(
            folder,
            cache_dir,
            image_size=vae.image_size,
            image_seq_len=vae.image_seq_len,
            num_codes=vae.num_tokens,
            fingerprint=vae.fingerprint(),
        )
    dataset = TextImageDataset(
        folder,
        tokenizer,
        text_seq_len=settings.text_seq_len,
        image_size=vae.image_size,
        truncate_captions=settings.truncate_captions,
        byteio=settings.byteio,
        caption_dropout=settings.caption_dropout if training else 0.0,
        seed=settings.random_seed,
        cache_dir=None if settings.dry_run else cache_dir,
        encoded=cache or (),
    )
    if cache is None:
        dataset[0]  # at least one picture can be read, or ValueError now
    elif settings.dry_run:  # encoding may take hours
        dry_run.empty_codes(dataset, vae, cache)
    else:
        codes, rows = load_codes(
            dataset.images,
            backend.encode(vae),
            cache,
            batch_size=max(1, 16 * 256**2 // vae.image_size**2),  # as many pixels whatever their size
            workers=min(settings.dataloader_workers, os.cpu_count() or 1),  # a GPU encodes faster than one reads
        )
        dataset.attach_codes(codes, rows)
    return dataset
