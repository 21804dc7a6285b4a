"""Build a run from its settings; everything that can be checked is checked before time is spent."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import numpy as np
import torch

import backends
import log
from args import IPU_FLAGS, NETWORK
from backends.base import Trainer, TrainingBackend
from data.codes import CodeCache, load_codes
from data.dataset import TextImageDataset
from data.files import printable
from data.loader import EpochOrder, GeneratedDataset, count_validation
from data.sources import folder_of
from data.tokenizer import Tokenizer, load_tokenizer
from generation.loading import read_model
from models.dalle import DALLE
from models.vae import ImageTokenizer, VQGanVAE
from models.vqgan_files import OFFICIAL_PARAMS, load_vqgan
from training import checkpoints, resume
from utils import checkpoint
from utils.files import check_writable
from utils.optimization import cosine

logger = logging.getLogger("minidalle")


def multi_step(epoch: int, epochs: int, late: float = 0.1) -> float:
    """Return the share of the peak rate.

    It rises linearly over the first fifth of the epochs, then is 1, and `late` in the second half of the others.
    """
    warmup = int(0.2 * epochs)
    if epoch < warmup:
        return (1 + epoch) / (1 + warmup)
    return 1.0 if epoch < warmup + (epochs - warmup) / 2 else late


def trapezoid(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak rate.

    It rises linearly over `warmup` steps, then is 1, and falls linearly towards 0 over the second half of the run.
    """
    return min((1 + step) / (1 + warmup), 1.0, 2 * (steps - step) / steps)


class LearningRate:
    """The learning rate of each update of a run of `steps` updates in `epochs` epochs.

    ReduceLROnPlateau (factor 0.5, patience 10, cooldown 10, minimum 1e-6) depends on the losses given to epoch_ended,
    the others only on step and epoch.
    """

    steps = epochs = 1

    def __init__(self, name: str, peak: float, warmup_steps: int = 0):
        self.name, self.peak, self.warmup_steps = name, peak, warmup_steps
        # torch's scheduler does the bookkeeping, on a parameter that is not trained.
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=peak)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        self._plateau = plateau(self._holder, factor=0.5, patience=10, cooldown=10, min_lr=1e-6)

    def at(self, step: int, epoch: int) -> float:
        """Return the learning rate of update `step` in `epoch`, both from 0."""
        if self.name in ("multi_step", "constant"):
            return self.peak * multi_step(epoch, self.epochs, late=0.1 if self.name == "multi_step" else 1.0)
        if self.name in ("cosine", "trapezoid"):
            factor = cosine if self.name == "cosine" else trapezoid
            return self.peak * factor(step, self.steps, self.warmup_steps)
        return self._holder.param_groups[0]["lr"]

    def epoch_ended(self, loss: float) -> None:
        """Take the validation loss, or the mean training loss, of the epoch that ended."""
        if self.name == "ReduceLROnPlateau":
            self._plateau.step(loss)

    def state_dict(self) -> Dict[str, Any]:
        plain = (int, float, list)
        state = {key: value for key, value in self._plateau.state_dict().items() if isinstance(value, plain)}
        return {"name": self.name, "lr": self._holder.param_groups[0]["lr"], "plateau": state}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load the state of a scheduler of the same name; ignore that of another.

        Of the reference application's plateau only the rate counts: it compared losses of single micro-batches.
        """
        if state.get("name") == self.name:
            self._holder.param_groups[0]["lr"] = state["lr"]
            self._plateau.load_state_dict(state["plateau"])
        elif self.name == "ReduceLROnPlateau" and isinstance(state.get("_last_lr"), list):
            self._holder.param_groups[0]["lr"] = float(state["_last_lr"][0])


@dataclasses.dataclass
class Run:
    """The parts of a run and its progress; checkpoints store the progress."""

    settings: Namespace
    backend: TrainingBackend
    folder: checkpoints.CheckpointFolder
    tokenizer: Tokenizer
    vae: ImageTokenizer
    dataset: Any
    validation_set: Any  # None: no validation
    generated: bool  # whether the training set is generated instead of read
    batches: EpochOrder
    hparams: Dict[str, Any]
    trainer: Trainer
    schedule: LearningRate
    vqgan_fingerprint: str
    data_fingerprint: str

    steps: int = 0  # updates in the whole run
    step: int = 0  # updates so far
    skipped: int = 0  # updates skipped because the loss or the gradient was not finite
    epoch_loss: Tuple[float, int] = (0.0, 0)  # sum and number of this epoch's losses
    validation_loss: Optional[float] = None
    best_loss: Optional[float] = None
    post_update_done: bool = True  # whether validation and the end of the epoch have followed the last update

    trackers: log.Trackers = dataclasses.field(default_factory=log.Trackers)
    samples: Any = None  # what sample images show, once read
    captions: Optional[Dict[str, Any]] = None  # words and examples of the training captions, once collected

    def epoch(self) -> int:
        return self.batches.place(self.step)[0]

    def epoch_begins(self) -> bool:
        return self.batches.place(self.step)[1] == 0

    def learning_rate(self) -> float:
        return self.schedule.at(self.batches.equivalent_step(self.step), self.epoch())

    def set_length(self) -> None:
        """Set `steps` and the length of the schedule from the flags and the update that the run starts with."""
        self.steps = self.batches.steps_of(self.settings.epochs)
        if self.settings.max_steps is not None:
            self.steps = min(self.steps, self.settings.max_steps)
        self.schedule.steps = self.batches.equivalent_step(self.steps)
        self.schedule.epochs = math.ceil(self.schedule.steps / self.batches.batches_per_epoch)

    def end_epoch(self) -> None:
        """Give the schedule the validation loss, or else the epoch's mean training loss."""
        total, count = self.epoch_loss
        loss = self.validation_loss
        if self.validation_set is None:
            loss = total / count if count else None
        if loss is not None:
            self.schedule.epoch_ended(loss)
        self.epoch_loss = (0.0, 0)


def build(settings: Namespace) -> Run:
    """Return a run that is ready to train; ValueError or OSError, in one line, if settings or files do not allow it."""
    backend = backends.for_training(settings)
    if backend.rank:
        log.set_up(logging.WARNING)
    if backend.kind != "ipu":
        log_unused(settings)
    tokenizer = None if settings.init_from else load_tokenizer(settings.bpe_path)
    # A compiler needs only the shape of the samples.
    generated = settings.generated_data or settings.synthetic_data or backend.compile_only
    for flag in ("input_folder", "validation_folder"):  # checked before a VQGAN is downloaded
        folder = getattr(settings, flag)
        if folder and not generated and not Path(folder).exists():
            raise FileNotFoundError(f"--{flag.replace('_', '-')} {folder}: no such folder")
    # The checkpoint is read before images are encoded, which may take hours.
    folder = checkpoints.CheckpointFolder(settings, writes=not backend.rank and not settings.dry_run)
    origin = resume.find_origin(settings, folder) if settings.pretrained_checkpoint or settings.resume else None
    folder.prepare()
    torch.manual_seed(settings.random_seed)
    if tokenizer is None:
        initial, tokenizer, options = read_initial_model(settings)
        vae = initial.vae
    else:
        initial, options = None, resume.network_options(origin[1]) if origin else {}
        vae = build_vqgan(settings, generated)
    patterns = resume.attention_patterns(settings, origin) if origin else tuple(settings.attn_types)
    hparams = {
        **{key: getattr(settings, name) for name, key in NETWORK.items()},
        **{name: getattr(settings, name) for name in ("loss_img_weight", "ff_dropout", "attn_dropout")},
        "num_text_tokens": tokenizer.vocab_size,
        "attn_types": patterns,
        **options,
    }
    torch.manual_seed(settings.random_seed)  # again, because an untrained VQGAN uses random numbers
    model = DALLE(vae=vae, **hparams)
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    if backend.kind == "ipu" and not model.transformer.is_plain:
        raise ValueError(f"{', '.join(options)}: options of DALLE-pytorch that do not run on IPUs; use --device cpu")
    trainer = backend.trainer(model)
    dataset, validation_set = build_datasets(settings, backend, tokenizer, vae, generated)
    batches = EpochOrder(len(dataset), backend.samples_per_step, settings.random_seed, backend.rank, backend.world_size)
    run = Run(
        settings=settings,
        backend=backend,
        folder=folder,
        tokenizer=tokenizer,
        vae=vae,
        dataset=dataset,
        validation_set=validation_set,
        generated=generated,
        batches=batches,
        hparams=hparams,
        trainer=trainer,
        schedule=LearningRate(settings.lr_scheduler, settings.learning_rate, settings.warmup_steps),
        vqgan_fingerprint=vae.fingerprint(),
        data_fingerprint=dataset.fingerprint(),
    )
    run.set_length()
    if origin is not None:
        resume.load_progress(run, *origin, model)
    if not backend.rank and not settings.dry_run:
        run.trackers = open_trackers(settings, folder.path, run.step)  # last, when nothing else can fail
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%d images, %d steps of %d samples", len(dataset), run.steps, batches.global_batch)
    if validation_set is not None:
        logger.info("%d images in the validation set", len(validation_set))
    logger.info("%s trainable parameters, %d text tokens", f"{trainable:,}", tokenizer.vocab_size)
    return run


def log_unused(settings: Namespace) -> None:
    """Log which flags were given that count on IPUs only."""
    given = [name for name, default, *_ in IPU_FLAGS if getattr(settings, name.replace("-", "_")) != default]
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        what = flags if len(given) <= 3 else f"{len(given)} settings of the configuration"
        logger.info("for IPUs only, without effect here: %s", what)


def open_trackers(settings: Namespace, folder: Optional[Path], step: int) -> log.Trackers:
    """Return the trackers of a run that has had `step` updates; ValueError if a package is missing."""
    trackers = []
    if settings.wandb or settings.tensorboard:
        from training import trackers as packages

        trackers = packages.open_trackers(settings, folder, step)
    return log.Trackers(([log.MetricsFile(folder / "metrics.jsonl", step)] if folder else []) + trackers)


def read_initial_model(settings: Namespace) -> Tuple[DALLE, Tokenizer, Dict[str, Any]]:
    """Return the model, tokenizer and further hparams of --init-from, and give its sizes to `settings`."""
    path = settings.init_from
    saved = checkpoint.read(path)
    vqgan = settings.vae_path or settings.vqgan_model_path
    model, tokenizer, _ = read_model(path, vqgan, settings.vqgan_config_path, settings.bpe_path, saved)
    for name, key in NETWORK.items():
        setattr(settings, name, saved["hparams"][key])
    logger.info("%s: a new run starts with its weights, network, vocabulary and VQGAN", path)
    return model, tokenizer, resume.network_options(saved)


def build_vqgan(settings: Namespace, generated: bool) -> ImageTokenizer:
    """Return the VQGAN of --vae-path or --vqgan-model-path, else the official one (untrained for generated data)."""
    path = settings.vae_path or settings.vqgan_model_path
    if path is None and generated:
        return VQGanVAE(OFFICIAL_PARAMS)
    return load_vqgan(path, settings.vqgan_config_path)


def build_datasets(
    settings: Namespace, backend: TrainingBackend, tokenizer: Tokenizer, vae: ImageTokenizer, generated: bool
) -> Tuple[Any, Any]:
    """Return the training set and the validation set, which is None if no flag asks for one."""
    dataset: Union[GeneratedDataset, TextImageDataset]
    if generated:
        dataset = GeneratedDataset(
            16 * backend.samples_per_step * backend.world_size,
            text_seq_len=settings.text_seq_len,
            num_text_tokens=tokenizer.vocab_size,
            image_size=vae.image_size,
            byteio=settings.byteio,
            seed=settings.random_seed,
            num_image_codes=None if settings.no_codes_cache else vae.num_tokens,
            image_seq_len=None if settings.no_codes_cache else vae.image_seq_len,
        )
    else:
        dataset = open_folder(settings.input_folder, settings, backend, tokenizer, vae)
    if settings.validation_split:
        return dataset, dataset.split_off(settings.validation_split)
    if settings.validation_folder and not generated:
        return dataset, open_folder(settings.validation_folder, settings, backend, tokenizer, vae, training=False)
    return dataset, None


def open_folder(
    folder: str,
    settings: Namespace,
    backend: TrainingBackend,
    tokenizer: Tokenizer,
    vae: ImageTokenizer,
    training: bool = True,
) -> TextImageDataset:
    """Return a folder's pairs with pixels, or with codes from the cache, into which missing ones are encoded first."""
    cache_dir = None if settings.no_codes_cache else find_cache_dir(folder, settings.codes_cache)
    cache = None if cache_dir is None else CodeCache(folder_of(folder), cache_dir, vae)
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
        validation=not training,
    )
    if training:
        refuse_small_set(len(dataset), settings, backend)
    if not settings.codes_cache and cache_dir not in (None, dataset.folder):  # read-only, but perhaps cached before
        complete = CodeCache(dataset.folder, dataset.folder, vae)
        cache = complete if all(image in complete for image in dataset.images) else cache
    if cache is None:
        dataset[0]  # fails now if no image can be read
    elif settings.dry_run:  # encoding may take hours; zeros take a step as long as any codes
        dataset.to_encode = sum(image not in cache for image in dataset.images)
        dataset.attach_codes(np.broadcast_to(np.uint16(0), (len(dataset), vae.image_seq_len)))
    else:
        codes, rows = load_codes(
            dataset.images,
            backend.encode(vae),
            cache,
            paths=dataset.image_paths(),
            batch_size=max(1, 16 * 256**2 // vae.image_size**2),  # the same number of pixels for any image size
            workers=min(settings.dataloader_workers, os.cpu_count() or 1),  # a GPU encodes faster than one can read
        )
        dataset.attach_codes(codes, rows)
    return dataset


def find_cache_dir(folder: str, given: Optional[str]) -> Path:
    """Return the folder for caches: the one given, else that of the images or, if it is read-only, one in ~/.cache."""
    if given:
        return Path(given)
    images = folder_of(folder)
    try:
        check_writable(images, "--input-folder")
        return images
    except ValueError:
        name = hashlib.sha256(os.fsencode(os.path.realpath(images))).hexdigest()[:16]
        cache_dir = Path.home() / ".cache" / "mini-dalle" / name
        logger.info("%s is read-only; codes and tokens are cached in %s", printable(images), cache_dir)
        return cache_dir


def refuse_small_set(images: int, settings: Namespace, backend: TrainingBackend) -> None:
    """Raise ValueError, with flags that would fit, if an update needs more samples than the training set will have."""
    if settings.validation_split:
        images -= count_validation(images, settings.validation_split)
    needed = backend.samples_per_step * backend.world_size
    if images >= needed:
        return
    per_micro_batch = needed // settings.gradient_accumulation
    least = backend.least_accumulation
    # Samples of an update; fewer than 8 updates an epoch learn little from a small set.
    accumulation = max(least, images // 8 // per_micro_batch)
    advice = f"--batch-size {settings.batch_size} --gradient-accumulation {accumulation}"
    if accumulation * per_micro_batch > images:
        advice = f"--batch-size 1 --gradient-accumulation {least} --replication-factor 1 --device-iterations 1"
    advice = advice if images >= least else f"{least} or more"
    raise ValueError(
        f"{settings.input_folder}: one step takes {needed:,} samples, but the set has {images:,}; {advice} would fit, "
        "or use --config photos"
    )
