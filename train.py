"""Trains a DALL-E: build → loop → save, the story of a run.

    python train.py --config NAME [flags]

What a step does on which machine is the backends' business; flags and configurations are args.py's.
"""

import contextlib
import logging
import math
import os
import time
from pathlib import Path

import args
import log


def main(argv=None):
    settings = args.train_arguments(argv)
    log.set_up()
    with log.termination_interrupts():  # around the last words, too
        try:
            with log.bad_input_exits():
                run = build(settings)
        except KeyboardInterrupt:
            print("stopped before the first step")
            raise SystemExit(130) from None
        try:
            with log.bad_input_exits(), worker_faults_in_one_line():
                train(run)
        except KeyboardInterrupt:
            path = save(run, f"dalle_step_{run.step}.pt")
            print(f"stopped after step {run.step}; go on with --pretrained-checkpoint {path}" if path else "stopped")
            raise SystemExit(130) from None


class Run:
    """What a run holds between build and save; step and epoch are those to come next."""

    def __init__(self, **parts):
        vars(self).update(parts)


def build(settings):
    """Everything a run needs, or ValueError / OSError in one line."""
    import torch

    import backends
    from data.order import EpochBatches
    from data.tokenizer import load_tokenizer
    from models.dalle import DALLE
    from utils import checkpoint, optimization

    backend = backends.select(settings)
    if backend.rank:
        log.set_up(logging.WARNING)
    tokenizer = load_tokenizer(settings.bpe_path)
    # Before pictures are encoded, which may take hours.
    saved = checkpoint.read(settings.pretrained_checkpoint) if settings.pretrained_checkpoint else None
    if settings.checkpoint_output_dir and not backend.rank:
        checkpoint.check_writable(settings.checkpoint_output_dir, "--checkpoint-output-dir")
    # A compiler wants no more than the shape of samples.
    made_up = settings.generated_data or settings.synthetic_data or backend.compile_only
    if not made_up and not Path(settings.input_folder).exists():
        raise FileNotFoundError(f"--input-folder {settings.input_folder}: no such folder")  # before a VQGAN is fetched
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
        dataset = build_dataset(settings, backend, tokenizer, vae, made_up)
    batches = EpochBatches(
        len(dataset),
        backend.samples_per_step,
        seed=settings.random_seed,
        rank=backend.rank,
        world_size=backend.world_size,
    )
    # Again: encoding draws numbers, and a cache of codes spares it. Processes drop out differently.
    torch.manual_seed(settings.random_seed + backend.rank)
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
        tokenizer=tokenizer,
        vae=vae,
        dataset=dataset,
        batches=batches,
        hparams=hparams,
        trainer=trainer,
        schedule=schedule,
        steps=steps,
        step=0,
        tracker=None,
        written=[],
    )
    if saved is not None:
        resume(run, saved, model)
    if not backend.rank:
        run.tracker = log.weights_and_biases(settings)  # last, when nothing else can be refused
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    together = backend.samples_per_step * backend.world_size
    log.LOG.info("%d pictures, %d steps of %d samples", len(dataset), steps, together)
    log.LOG.info("%s trainable parameters, %d text tokens", f"{trained:,}", tokenizer.vocab_size)
    return run


def image_tokenizer(settings, made_up):
    """The VQGAN of --vae-path or --vqgan-model-path; the official one otherwise (untrained for made-up samples)."""
    from models.official_vqgan import OFFICIAL_PARAMS
    from models.vae import VQGanVAE, load_vqgan

    path = settings.vae_path or settings.vqgan_model_path
    if path is None and made_up:
        return VQGanVAE(OFFICIAL_PARAMS)
    return load_vqgan(path, settings.vqgan_config_path)


def build_dataset(settings, backend, tokenizer, vae, made_up):
    """A folder's pairs with pixels or cached codes, or made-up samples."""
    from data.codes import cached_codes, open_codes
    from data.loader import GeneratedDataset, TextImageDataset

    use_codes = not settings.no_codes_cache
    if made_up:
        codes = {"num_image_codes": vae.num_tokens, "image_seq_len": vae.image_seq_len} if use_codes else {}
        return GeneratedDataset(
            16 * backend.samples_per_step * backend.world_size,
            text_seq_len=settings.text_seq_len,
            num_text_tokens=tokenizer.vocab_size,
            image_size=vae.image_size,
            byteio=settings.byteio,
            seed=settings.random_seed,
            **codes,
        )
    cache_dir, cache = settings.codes_cache or settings.input_folder, ()
    if use_codes:
        options = {"image_size": vae.image_size, "num_codes": vae.num_tokens, "fingerprint": vae.fingerprint()}
        cache = open_codes(settings.input_folder, cache_dir, **options)
    dataset = TextImageDataset(
        settings.input_folder,
        tokenizer,
        text_seq_len=settings.text_seq_len,
        image_size=vae.image_size,
        truncate_captions=settings.truncate_captions,
        byteio=settings.byteio,
        caption_dropout=settings.caption_dropout,
        seed=settings.random_seed,
        cache_dir=cache_dir if use_codes else None,
        encoded=cache,
    )
    if use_codes:
        codes, bad = cached_codes(
            dataset.pictures,
            backend.encode(vae),
            cache,
            batch_size=max(1, 16 * 256**2 // vae.image_size**2),  # as many pixels whatever their size
            workers=min(settings.dataloader_workers, os.cpu_count() or 1),  # a GPU encodes faster than one reads
        )
        dataset.attach_codes(codes, bad)
    else:
        dataset[0]  # at least one picture can be read, or ValueError now
    return dataset


def resume(run, saved, model):
    """Weights, optimizer, schedule and position of a checkpoint; ValueError where it does not fit this model."""
    from utils import checkpoint

    weights = checkpoint.model_weights(saved["weights"])
    for name, tensor in model.state_dict().items():
        if name.startswith("vae."):
            weights[name] = tensor  # the VQGAN of this run's flags
    misfit = checkpoint.first_misfit(model, weights)
    if misfit:
        raise ValueError(f"{run.settings.pretrained_checkpoint}: does not fit this configuration: {misfit}")
    vocabulary = saved["tokenizer"].get("sha256") if isinstance(saved.get("tokenizer"), dict) else None
    for flag, made_with, ours in (
        ("--bpe-path", vocabulary, run.tokenizer.fingerprint),
        ("--vae-path", saved.get("vqgan"), run.vae.fingerprint()),
    ):
        if made_with not in (None, ours):
            raise ValueError(f"{run.settings.pretrained_checkpoint}: was trained with another {flag} than this run's")
    opt_state = saved.get("opt_state") if isinstance(saved.get("opt_state"), list) else None
    run.trainer.load_state_dict({"weights": weights, "opt_state": opt_state})
    if isinstance(saved.get("scheduler_state"), dict):
        run.schedule.load_state_dict(saved["scheduler_state"])
    run.step = saved.get("step", (saved.get("epoch", -1) + 1) * run.batches.batches_per_epoch)
    if run.step >= run.steps:
        raise ValueError(
            f"{run.settings.pretrained_checkpoint}: has {run.step} steps already, this run ends at {run.steps}; "
            "give more --epochs or --max-steps"
        )
    log.LOG.info("going on from %s at step %d", run.settings.pretrained_checkpoint, run.step)


def train(run):
    """Steps to the end, with checkpoints on the way. The prefix before the first step is compilation."""
    from data.order import RunBatches

    settings, per_epoch = run.settings, run.batches.batches_per_epoch
    progress = log.Progress(run.steps, run.step, run.backend.samples_per_step * run.backend.world_size, run.tracker)
    epoch_loss, compiled = [], False
    for batch in run.backend.loader(run.dataset, RunBatches(run.batches, run.step, run.steps)):
        if not compiled:
            started = time.monotonic()
            run.trainer.compile(batch)
            log.LOG.info("Compiled model in %.3f secs", time.monotonic() - started)
            compiled = True
        if run.backend.compile_only:
            log.LOG.info("compiled only, as --compile-only says")
            break
        epoch = run.step // per_epoch
        lr = run.schedule.at(run.step, epoch)
        run.trainer.set_lr(lr)
        try:
            losses = run.trainer.step(batch)
        except ConnectionError as error:
            path = save(run, f"dalle_step_{run.step}.pt")
            raise ConnectionError(f"{error}; go on with --pretrained-checkpoint {path}" if path else error) from None
        if not math.isfinite(losses["total"]):
            raise ValueError(
                f"the loss is no longer finite at step {run.step}; use a lower --learning-rate, or --max-grad-norm 1"
            )
        run.step += 1
        progress.step(run.step, epoch, losses, lr)
        epoch_loss.append(losses["total"])
        if run.step % per_epoch == 0:
            run.schedule.epoch_ended(sum(epoch_loss) / len(epoch_loss))
            epoch_loss = []
        if run.step % per_epoch == 0 and ((epoch + 1) % settings.checkpoint_save_epochs == 0 or run.step == run.steps):
            save(run, f"dalle_{epoch}.pt")
        elif run.step % settings.checkpoint_save_steps == 0 or run.step == run.steps:
            save(run, f"dalle_step_{run.step}.pt")
    progress.close()


@contextlib.contextmanager
def worker_faults_in_one_line():
    """Within: what goes wrong in a process that reads pictures is raised without that process's traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise OSError(f"{reason}; if memory ran out, fewer --dataloader-workers need less") from None


def save(run, name):
    """Write a checkpoint under the output folder, keep the newest; → its path, or None without a folder."""
    from torch import frombuffer, uint8

    from utils import checkpoint

    settings = run.settings
    if not settings.checkpoint_output_dir or settings.synthetic_data:  # which trains on nothing
        return None
    state = run.trainer.state_dict()  # by every process, since what it holds may lie with all of them
    if run.backend.rank:
        return None
    vocabulary = run.tokenizer.vocabulary
    placement = ("embedding_ipu_id", "embedding_serialization_factor", "layers_per_ipu", "cls_ipu_id", "fp16", "byteio")
    path = Path(settings.checkpoint_output_dir) / name
    checkpoint.write(
        path,
        {
            "hparams": {**run.hparams, **{name: getattr(settings, name) for name in placement}},
            "vae_params": run.vae.hparams,
            "epoch": (run.step - 1) // run.batches.batches_per_epoch,
            "step": run.step,
            "weights": checkpoint.canonical_weights(state["weights"]),
            "opt_state": state["opt_state"],
            "scheduler_state": run.schedule.state_dict(),
            "tokenizer": {
                "kind": run.tokenizer.kind,
                "sha256": run.tokenizer.fingerprint,
                "vocabulary": None if vocabulary is None else frombuffer(bytearray(vocabulary), dtype=uint8),
            },
            "vqgan": run.vae.fingerprint(),
            "sampling": {key: getattr(settings, key) for key in ("top_k", "top_p", "temperature", "cond_scale")},
            "settings": dict(vars(settings)),
        },
    )
    log.LOG.info("wrote %s", path)
    if path not in run.written:
        run.written.append(path)
    while len(run.written) > settings.keep_checkpoints:
        oldest = run.written.pop(0)
        if oldest.exists():
            oldest.unlink()
    return path


if __name__ == "__main__":
    main()
