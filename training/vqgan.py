"""What train_vqgan.py does once its flags are read: the run, its files, and how it continues an earlier one."""

from __future__ import annotations

import itertools
import logging
import math
import os
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
import yaml
from PIL import Image
from tqdm import tqdm

from args import VQGAN_SIZES
from backends import OutOfMemory, explain_out_of_memory
from backends.native.backend import fast_in_bf16, pick_device
from data.images import common_folder, load_images, printable, read_images
from data.loader import epoch_order
from data.sources import find_images
from generation.images import make_grid
from models.vae import VQGan, VQGanVAE, check_params
from models.vqgan_files import load_vqgan
from models.vqgan_training import SEED_CELLS, Evaluation, VQGanTrainer, evaluate
from training.checkpoints import write
from utils.command_line import EXIT_INTERRUPTED
from utils.errors import first_line
from utils.files import atomic_write, defer_signals, remove_leftovers
from utils.muon import Muon, has_amx
from utils.optimization import cosine

logger = logging.getLogger("minidalle")

STATE_FILE = "vqgan_training.pt"  # with which --resume continues exactly
FILES = (STATE_FILE, "vqgan.*", "reconstructions.png", ".writable")
MEMORY_BYTES = 2 << 30  # a smaller training set is decoded once and kept in memory
VALIDATION_PIXELS = 1 << 21  # 512 images of 64 × 64, 32 of 256 × 256
GRID_IMAGES = 8
SHOW_EVERY = 10  # steps; reading the loss waits for the device
LOG_EVERY = 50  # steps, if there is no progress bar


def train(settings: Namespace) -> None:
    """Train to the end and write the files into --output-dir, which this process has claimed.

    Raises:
        ValueError, OSError: flags, images or files cannot be used; one line.
    """
    torch.manual_seed(settings.random_seed)
    settings.dataloader_workers = min(settings.dataloader_workers, os.cpu_count() or 1)
    device = pick_device(settings.device)
    # Convolutions in bf16 took a third of fp32's time on a CPU with AMX, and 1.3 to 1.6 times as long as in fp32 on one
    # with AVX512-BF16 alone.
    is_fast = fast_in_bf16(device) if device.type == "cuda" else has_amx()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and is_fast)
    output_dir = Path(settings.output_dir)
    remove_leftovers(output_dir, *FILES)
    finished = check_earlier_run(settings, output_dir)
    if finished is not None and finished >= settings.max_steps:
        logger.info("%s has a VQGAN of %d steps already, this run ends at %d", output_dir, finished, settings.max_steps)
        return
    initial = load_initial(settings) if settings.init_from or settings.decoder_of else None
    params = initial.hparams["params"] if initial is not None else vqgan_params(settings)
    model = VQGan(params).to(device)
    images, validation_images, validation_name = read_folders(settings)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    pixels, codes = settings.image_size, codes_per_side(settings)
    logger.info(
        "VQGAN of %.1f million parameters: %d × %d pixels to %d × %d codes of %d; on %s in %s",
        *(millions, pixels, pixels, codes, codes, settings.n_embed, device, "bf16" if bf16 else "fp32"),
    )
    autocast = torch.bfloat16 if bf16 else None
    trainer = VQGanTrainer(model, build_optimizers(model, settings), settings, device, autocast)
    if initial is not None:
        model.load_state_dict(initial.model.state_dict())
        trainer.has_codebook = True
    if settings.resume and (output_dir / STATE_FILE).exists():
        resume(trainer, output_dir)
    seed_batches = math.ceil(SEED_CELLS / codes_per_side(settings) ** 2 / settings.batch_size)
    seeded = trainer.has_codebook and not settings.decoder_of
    batches = endless_batches(images, settings, first=trainer.steps + seed_batches * seeded)
    if finished is not None:
        set_aside(output_dir, finished)

    def report() -> None:
        figures = measure(model, validation_images, settings.batch_size, output_dir)
        logger.info(
            "step %d: PSNR %.2f dB on %d %s, %d of %d codes used (perplexity %.0f)",
            *(trainer.steps, figures.psnr, len(validation_images), validation_name),
            *(figures.codes_used, settings.n_embed, figures.perplexity),
        )
        save(trainer, params, output_dir)

    bar = tqdm(
        total=settings.max_steps, initial=trainer.steps, desc="training", unit="step", disable=None, dynamic_ncols=True
    )
    try:
        with bar, explain_out_of_memory(f"a --batch-size below {settings.batch_size} needs less"):
            for step in range(trainer.steps, settings.max_steps):
                if step == settings.continuous_steps and not trainer.has_codebook:
                    entries = trainer.start_codebook(torch.cat([next(batches) for _ in range(seed_batches)]))
                    logger.info("step %d: the codebook starts with %d of %d entries", step, entries, settings.n_embed)
                batch = next(batches)
                with defer_signals():  # a step is made as a whole
                    losses = trainer.step(batch, cosine(step, settings.max_steps, settings.warmup_steps))
                bar.update()
                if (step + 1) % SHOW_EVERY == 0 or step + 1 == settings.max_steps:
                    show(bar, losses, trainer, step)
                if settings.eval_interval and (step + 1) % settings.eval_interval == 0 and trainer.has_codebook:
                    report()
        report()
    except (KeyboardInterrupt, OutOfMemory) as reason:
        if not trainer.has_codebook:
            logger.info("interrupted at step %d, before the codebook was started: nothing saved", trainer.steps)
        else:
            save(trainer, params, output_dir)
            so_far = f"interrupted at step {trainer.steps} of {settings.max_steps}"
            logger.info("%s; saved the VQGAN so far, --resume continues", so_far)
        if isinstance(reason, OutOfMemory):
            raise
        raise SystemExit(EXIT_INTERRUPTED) from None
    logger.info("wrote vqgan.ckpt, vqgan.yaml and reconstructions.png to %s", output_dir)


def set_aside(output_dir: Path, steps: int) -> None:
    """Move a finished VQGAN, which a longer run is about to replace, into a folder of its own."""
    folder = output_dir / f"step_{steps}"
    folder.mkdir(exist_ok=True)
    for name in ("vqgan.ckpt", "vqgan.yaml", "reconstructions.png"):
        if (output_dir / name).exists():
            (output_dir / name).replace(folder / name)


def build_optimizers(model: VQGan, settings: Namespace) -> List[torch.optim.Optimizer]:
    """Return Muon for the kernels and Adam for the rest, or AdamW for all.

    With --decoder-of, they are over the decoder's parameters alone.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    parameters = list(model.decoding_parameters() if settings.decoder_of else model.parameters())
    if settings.optimizer == "AdamW":
        return [torch.optim.AdamW(parameters, rate, (0.9, 0.99), weight_decay=decay)]
    kernels = [parameter for parameter in parameters if parameter.dim() == 4]
    others = [parameter for parameter in parameters if parameter.dim() != 4]
    return [Muon(kernels, rate, decay), torch.optim.Adam(others, rate, (0.9, 0.99))]


def codes_per_side(settings: Namespace) -> int:
    return settings.image_size // settings.patch_size // 2 ** (len(settings.ch_mult) - 1)


def vqgan_params(settings: Namespace) -> Dict[str, Any]:
    """Return the flags as the checked model.params of a taming yaml."""
    channels = 3 * settings.patch_size**2
    ddconfig = {"double_z": False, "in_channels": channels, "out_ch": channels, "dropout": 0.0}
    ddconfig["resolution"] = settings.image_size // settings.patch_size
    for name in ("z_channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions"):
        ddconfig[name] = getattr(settings, name)
    sizes = {name: getattr(settings, name) for name in ("embed_dim", "n_embed", "patch_size")}
    return check_params({**sizes, "ddconfig": ddconfig})


def read_folders(settings: Namespace) -> Tuple[Any, torch.Tensor, str]:
    """Return training images, validation images uint8 (N, 3, S, S), and a name for the latter.

    The training images are paths if they would not fit into memory. Only as many are read as the run can use.
    """
    size, seed = settings.image_size, settings.random_seed

    def shuffle(paths: List[Any]) -> List[Any]:
        return [paths[index] for index in epoch_order(len(paths), seed, epoch=0)]

    paths = shuffle(find_images(settings.input_folder))
    name = "validation images"
    most = max(GRID_IMAGES, VALIDATION_PIXELS // size**2)
    if settings.validation_folder is not None:
        validation_paths = shuffle(find_images(settings.validation_folder))[:most]
    elif settings.validation_split and len(paths) > 1:
        count = min(most, len(paths) - 1, math.ceil(len(paths) * settings.validation_split))
        validation_paths, paths = paths[:count], paths[count:]
    else:
        validation_paths, name = paths[:most], "training images"
    paths = paths[: settings.max_steps * settings.batch_size]
    validation = load_images(validation_paths, size, settings.dataloader_workers)
    fit = len(paths) * 3 * size**2 <= MEMORY_BYTES
    images = load_images(paths, size, settings.dataloader_workers) if fit else paths
    logger.info("%d training images, %d %s", len(images), len(validation), name)
    return images, validation, name


def endless_batches(
    images: Union[torch.Tensor, Sequence[Any]], settings: Namespace, first: int
) -> Iterator[torch.Tensor]:
    """Yield uint8 (B, 3, S, S), epoch after epoch, in an order that depends on the seed alone.

    Args:
        images: in memory, as load_images returns them, or paths, which workers decode in every epoch.
        first: number of batches to skip, for a resumed run.
    """
    size = min(settings.batch_size, len(images))  # a batch of paths lacks the images that cannot be read
    per_epoch = len(images) // size

    def choose() -> Iterator[List[int]]:
        for epoch in itertools.count(first // per_epoch):
            order = epoch_order(len(images), settings.random_seed, epoch)
            for place in range(max(0, first - epoch * per_epoch), per_epoch):
                yield order[place * size : (place + 1) * size].tolist()

    if isinstance(images, torch.Tensor):
        yield from (images[indices] for indices in choose())
        return
    reported: Set[int] = set()
    unread_in_a_row = 0
    for batch in read_images(images, settings.image_size, choose(), settings.dataloader_workers):
        for index in batch.unreadable.keys() - reported:
            logger.warning("%s: cannot be read and is skipped", printable(images[index]))
        reported.update(batch.unreadable)
        unread_in_a_row = 0 if batch.indices else unread_in_a_row + 1
        if batch.pixels is not None:
            yield batch.pixels
        elif unread_in_a_row >= per_epoch:
            raise ValueError(f"{common_folder(images)}: none of {len(images)} images can be read")


def show(bar: Any, losses: Dict[str, torch.Tensor], trainer: VQGanTrainer, step: int) -> None:
    """Show loss, PSNR of the batch and codes in use, in the bar or the log; ValueError if the loss is not finite."""
    loss = losses["loss"].item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is no longer finite at step {step}; use a lower --learning-rate")
    codes = f", {int((trainer.usage > 0.1).sum())} codes" if trainer.has_codebook else ""
    line = f"loss {loss:.4f}, {-10 * math.log10(losses['mse'].item()):.1f} dB{codes}"
    bar.set_postfix_str(line)
    if bar.disable and (step + 1) % LOG_EVERY == 0:
        logger.info("step %d of %d: %s", step + 1, trainer.settings.max_steps, line)


def measure(model: VQGan, validation: torch.Tensor, batch_size: int, output_dir: Path) -> Evaluation:
    """Return the measurements on validation images and write reconstructions.png."""
    figures = evaluate(model, validation, batch_size, keep=GRID_IMAGES)
    pairs = [*validation[: len(figures.reconstructions)], *figures.reconstructions]  # originals above reconstructions
    images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pairs]
    with atomic_write(output_dir / "reconstructions.png") as file:
        make_grid(images, len(figures.reconstructions)).save(file, "PNG")
    return figures


def save(trainer: VQGanTrainer, params: Dict[str, Any], output_dir: Path) -> None:
    """Write vqgan.yaml and vqgan.ckpt in taming-transformers' format and STATE_FILE, each complete or not at all.

    The weights of vqgan.ckpt are rounded to values of fp16, so that a checkpoint in half precision has the same codes.
    """
    params = dict(params, lossconfig={"target": "taming.modules.losses.DummyLoss"})
    if params["patch_size"] == 1:
        del params["patch_size"]  # taming's own VQModel knows no such setting
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    with atomic_write(output_dir / "vqgan.yaml", text=True) as file:
        yaml.safe_dump(config, file, sort_keys=False)
    state_dict = {name: tensor.detach().cpu() for name, tensor in trainer.model.state_dict().items()}
    rounded = {name: tensor.half().float() for name, tensor in state_dict.items()}
    finished = trainer.steps >= trainer.settings.max_steps
    write(output_dir / "vqgan.ckpt", {"state_dict": rounded, "global_step": trainer.steps, "finished": finished})
    write(output_dir / STATE_FILE, {"state_dict": state_dict, **trainer.state_dict()})


def check_earlier_run(settings: Namespace, output_dir: Path) -> Optional[int]:
    """Return the steps of the finished VQGAN that --resume continues, or None; ValueError if one would be replaced."""
    path = output_dir / "vqgan.ckpt"
    if not path.exists():
        return None
    if not settings.resume:
        raise ValueError(
            f"--output-dir {output_dir}: has the VQGAN of an earlier run; continue it with --resume, "
            "or give another folder"
        )
    if not (output_dir / STATE_FILE).exists():
        raise ValueError(
            f"--output-dir {output_dir}: has a VQGAN without {STATE_FILE}, so it cannot be resumed; give another "
            f"folder, and --init-from {output_dir} to fine-tune it"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return int(saved["global_step"]) if saved.get("finished", True) else None
    except (RuntimeError, ValueError, LookupError, UnpicklingError) as error:
        raise ValueError(f"{path}: damaged ({first_line(error)}); remove it to resume from {STATE_FILE}") from error


def load_initial(settings: Namespace) -> VQGanVAE:
    """Return the VQGAN of --init-from, and give its sizes to `settings`, or that of --decoder-of.

    Raises:
        ValueError: it is not a VQModel; or that of --decoder-of has other sizes than `settings`.
    """
    flag, path = ("--init-from", settings.init_from) if settings.init_from else ("--decoder-of", settings.decoder_of)
    vae = load_vqgan(path)
    kind = vae.hparams["target"]
    if not isinstance(vae, VQGanVAE) or kind != "VQModel":
        raise ValueError(f"{flag} {path}: is a {kind}; only a VQModel can be trained")
    params = vae.hparams["params"]
    sizes = {**params["ddconfig"], **params, "image_size": vae.image_size}
    for name in sorted(VQGAN_SIZES):
        if settings.decoder_of and getattr(settings, name) != sizes[name]:
            raise ValueError(f"{flag} {path}: its {name} is {sizes[name]}, not {getattr(settings, name)}")
        setattr(settings, name, sizes[name])
    logger.info("%s: the run starts with its weights and sizes", path)
    return vae


def resume(trainer: VQGanTrainer, output_dir: Path) -> None:
    """Load weights and state of a stopped run; ValueError if the file is damaged, or of a VQGAN of another shape."""
    path = output_dir / STATE_FILE
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
        trainer.model.load_state_dict(state["state_dict"])
        trainer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        reason = first_line(error)
        raise ValueError(f"--resume: {path} is not of this VQGAN; use the flags it began with ({reason})") from error
    logger.info("resumed at step %d of %d", trainer.steps, trainer.settings.max_steps)
