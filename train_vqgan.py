"""Train a VQGAN, the image tokenizer of train.py, on a folder of images.

    python train_vqgan.py --config vqgan_demo
    python train_vqgan.py --config vqgan_photos --input-folder my_photos --output-dir output/my_vqgan

Images need no captions. --output-dir receives vqgan.ckpt and vqgan.yaml in taming-transformers' format, for train.py's
--vae-path, and reconstructions.png: validation images above their reconstructions. With --resume a stopped run
continues. --decoder-of FOLDER makes a VQGAN's images sharper without changing its codes: a DALL-E trained on them
stays valid.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

from args import vqgan_arguments
from log import set_up
from utils.command_line import EXIT_INTERRUPTED, exit_on_error
from utils.files import atomic_write, check_writable, remove_leftovers

if TYPE_CHECKING:  # torch takes seconds to import, so flags are checked first
    import torch

    from models.vae import VQGan
    from models.vqgan_training import Evaluation, VQGanTrainer

logger = logging.getLogger("minidalle")

MEMORY_BYTES = 2 << 30  # a smaller training set is decoded once and kept in memory
VALIDATION_PIXELS = 1 << 21  # 512 images of 64 × 64, 32 of 256 × 256
GRID_IMAGES = 8
SHOW_EVERY = 10  # steps; reading the loss waits for the device
LOG_EVERY = 50  # steps, if there is no progress bar


def main(argv: Optional[Sequence[str]] = None) -> None:
    settings = vqgan_arguments(argv)
    set_up()
    with exit_on_error():
        train(settings)


def train(settings: Namespace) -> None:
    """Train to the end and write the files; ValueError or OSError in one line for bad input."""
    import torch
    from tqdm import tqdm

    from backends import OutOfMemory, memory_explained
    from backends.native.backend import pick_device
    from models.vae import VQGan
    from models.vqgan_training import SEED_CELLS, VQGanTrainer
    from training import vqgan_checkpoints as checkpoints
    from utils.optimization import cosine

    torch.manual_seed(settings.random_seed)
    settings.dataloader_workers = min(settings.dataloader_workers, os.cpu_count() or 1)
    device = pick_device(settings.device)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and _fast_in_bf16(device))
    output_dir = Path(settings.output_dir)
    check_writable(output_dir, "--output-dir")
    remove_leftovers(output_dir, *checkpoints.FILES)
    finished = checkpoints.check_earlier_run(settings, output_dir)
    if finished is not None and finished >= settings.max_steps:
        logger.info("%s has a VQGAN of %d steps already, this run ends at %d", output_dir, finished, settings.max_steps)
        return
    initial = checkpoints.load_initial(settings) if settings.init_from else None
    params = initial.hparams["params"] if initial is not None else vqgan_params(settings)
    model = VQGan(params).to(device)
    images, validation_images, validation_name = read_folders(settings)
    logger.info(
        "VQGAN of %.1f million parameters: %d × %d pixels to %d × %d codes of %d; on %s in %s",
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        *[settings.image_size] * 2,
        *[codes_per_side(settings)] * 2,
        settings.n_embed,
        device,
        "bf16" if bf16 else "fp32",
    )
    autocast = torch.bfloat16 if bf16 else None
    trainer = VQGanTrainer(model, build_optimizers(model, settings), settings, device, autocast)
    if settings.decoder_of:
        checkpoints.load_codes(trainer, settings.decoder_of)
    if initial is not None:
        model.load_state_dict(initial.model.state_dict())
        trainer.has_codebook = True
    if settings.resume and (output_dir / checkpoints.STATE_FILE).exists():
        checkpoints.resume(trainer, output_dir)
    seed_batches = math.ceil(SEED_CELLS / codes_per_side(settings) ** 2 / settings.batch_size)
    seeded = trainer.has_codebook and not settings.decoder_of
    batches = endless_batches(images, settings, first=trainer.steps + seed_batches * seeded)

    if finished is not None:
        checkpoints.move_earlier(output_dir, finished)

    def report() -> None:
        figures = measure(model, validation_images, settings.batch_size, output_dir)
        logger.info(
            "step %d: PSNR %.2f dB on %d %s, %d of %d codes used (perplexity %.0f)",
            trainer.steps,
            figures.psnr,
            len(validation_images),
            validation_name,
            figures.codes_used,
            settings.n_embed,
            figures.perplexity,
        )
        checkpoints.save(trainer, params, output_dir)

    try:
        with memory_explained(f"a --batch-size below {settings.batch_size} needs less"), tqdm(
            total=settings.max_steps,
            initial=trainer.steps,
            desc="training",
            unit="step",
            disable=None,
            dynamic_ncols=True,
        ) as bar:
            for step in range(trainer.steps, settings.max_steps):
                if step == settings.continuous_steps and not trainer.has_codebook:
                    entries = trainer.start_codebook(torch.cat([next(batches) for _ in range(seed_batches)]))
                    logger.info("step %d: the codebook starts with %d of %d entries", step, entries, settings.n_embed)
                losses = trainer.step(next(batches), cosine(step, settings.max_steps, settings.warmup_steps))
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
            checkpoints.save(trainer, params, output_dir)
            so_far = f"interrupted at step {trainer.steps} of {settings.max_steps}"
            logger.info("%s; saved the VQGAN so far, --resume continues", so_far)
        if isinstance(reason, OutOfMemory):
            raise
        raise SystemExit(EXIT_INTERRUPTED) from None
    logger.info("wrote vqgan.ckpt, vqgan.yaml and reconstructions.png to %s", output_dir)


def _fast_in_bf16(device: torch.device) -> bool:
    # Convolutions in bf16 took a third of fp32's time on a CPU with AMX, and 1.3 to 1.6 times as long as in fp32 on one
    # with AVX512-BF16 alone.
    import torch

    from utils.muon import has_amx

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return has_amx()


def build_optimizers(model: VQGan, settings: Namespace) -> List[torch.optim.Optimizer]:
    """Return Muon for the kernels and Adam for the rest, or AdamW for all.

    With --decoder-of, they are over the decoder's parameters alone.
    """
    import torch

    from utils.muon import Muon

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
    from models.vae import check_params

    channels = 3 * settings.patch_size**2
    return check_params(
        {
            "embed_dim": settings.embed_dim,
            "n_embed": settings.n_embed,
            "patch_size": settings.patch_size,
            "ddconfig": {
                "double_z": False,
                "z_channels": settings.z_channels,
                "resolution": settings.image_size // settings.patch_size,
                "in_channels": channels,
                "out_ch": channels,
                "ch": settings.ch,
                "ch_mult": settings.ch_mult,
                "num_res_blocks": settings.num_res_blocks,
                "attn_resolutions": settings.attn_resolutions,
                "dropout": 0.0,
            },
        }
    )


def read_folders(settings: Namespace) -> Tuple[Any, torch.Tensor, str]:
    """Return training images, validation images uint8 (N, 3, S, S), and a name for the latter.

    The training images are paths if they would not fit into memory. Only as many are read as the run can use.
    """
    from data.images import load_images
    from data.loader import epoch_order
    from data.sources import find_images

    size, seed = settings.image_size, settings.random_seed

    def shuffle(paths: List[Any]) -> List[Any]:
        return [paths[index] for index in epoch_order(len(paths), seed, epoch=0)]

    paths = shuffle(find_images(settings.input_folder))
    name = "validation images"
    most = max(GRID_IMAGES, VALIDATION_PIXELS // size**2)
    if settings.validation_folder is not None:
        validation_paths = shuffle(find_images(settings.validation_folder))[:most]
    elif settings.validation_split and len(paths) > 1:
        count = min(most, math.ceil(len(paths) * settings.validation_split))
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
    import torch

    from data.images import common_folder, printable, read_images
    from data.loader import epoch_order

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
    import torch
    from PIL import Image

    from models.vqgan_training import evaluate

    figures = evaluate(model, validation, batch_size, keep=GRID_IMAGES)
    rows = torch.stack([validation[: len(figures.pictures)], figures.pictures])  # (2, N, 3, S, S)
    rows = torch.nn.functional.pad(rows, (2, 2, 2, 2), value=255)  # a white frame around each
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (2 * S', N * S', 3)
    with atomic_write(output_dir / "reconstructions.png") as file:
        Image.fromarray(grid.numpy()).save(file, format="PNG")
    return figures


if __name__ == "__main__":
    main()
