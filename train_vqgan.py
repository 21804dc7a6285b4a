"""Trains a VQGAN, the image tokenizer of train.py, on a folder of pictures.

    python train_vqgan.py --config vqgan_demo
    python train_vqgan.py --config vqgan_photos --input-folder my_photos --output-dir output/my_vqgan

Pictures need no captions. --output-dir gets vqgan.ckpt and vqgan.yaml in taming-transformers' format, for train.py's
--vae-path, and reconstructions.png: held-out pictures above what comes back of them.
"""

import logging
import math
import os
from pathlib import Path

from args import vqgan_arguments
from log import exit_on_bad_input, set_up

logger = logging.getLogger("minidalle")

MEMORY_BYTES = 2 << 30  # a set that takes no more is decoded once and kept
HELD_OUT_PIXELS = 1 << 21  # of so many the figures are taken: 512 pictures of 64 × 64, 32 of 256 × 256
GRID_PICTURES = 8
SHOWN_EVERY = 10  # steps between looks at the loss, each of which waits for the device
LOGGED_EVERY = 50  # steps between log lines where there is no bar
EXIT_INTERRUPTED = 130


def main(argv=None):
    settings = vqgan_arguments(argv)
    set_up()
    with exit_on_bad_input():
        train(settings)


def train(settings):
    """The run: settings → files in settings.output_dir. ValueError and OSError for bad input, in one line."""
    import torch
    from tqdm import tqdm

    from backends.native.backend import pick_device
    from data.images import endless_batches
    from models.vae import VQGan
    from models.vqgan_training import SEED_CELLS, VQGanTrainer
    from utils.files import check_writable
    from utils.optimization import cosine

    torch.manual_seed(settings.random_seed)
    settings.dataloader_workers = min(settings.dataloader_workers, os.cpu_count() or 1)
    device = pick_device(settings.device)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and _fast_in_bf16(device))
    params = vqgan_params(settings)
    model = VQGan(params).to(device)
    output_dir = Path(settings.output_dir)
    check_writable(output_dir, "--output-dir")
    pictures, held_out, held_out_name = read_folders(settings)
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
    batches = endless_batches(
        pictures,
        settings.batch_size,
        size=settings.image_size,
        seed=settings.random_seed,
        workers=settings.dataloader_workers,
    )

    def report():
        figures = measure(model, held_out, settings.batch_size, output_dir)
        logger.info(
            "step %d: PSNR %.2f dB on %d %s, %d of %d codes used (perplexity %.0f)",
            trainer.steps,
            figures.psnr,
            len(held_out),
            held_out_name,
            figures.codes_used,
            settings.n_embed,
            figures.perplexity,
        )
        save(model, params, trainer.steps, output_dir)

    try:
        with tqdm(total=settings.max_steps, desc="training", unit="step", disable=None, dynamic_ncols=True) as bar:
            for step in range(settings.max_steps):
                if step == settings.continuous_steps:
                    enough = math.ceil(SEED_CELLS / codes_per_side(settings) ** 2 / settings.batch_size)
                    begun = trainer.start_codebook(torch.cat([next(batches) for _ in range(enough)]))
                    logger.info("step %d: the codebook begins with %d of %d entries", step, begun, settings.n_embed)
                figures = trainer.step(next(batches), cosine(step, settings.max_steps, settings.warmup_steps))
                bar.update()
                if (step + 1) % SHOWN_EVERY == 0 or step + 1 == settings.max_steps:
                    show(bar, figures, trainer, step)
                if settings.eval_interval and (step + 1) % settings.eval_interval == 0 and trainer.has_codebook:
                    report()
        report()
    except KeyboardInterrupt:
        if not trainer.has_codebook:
            logger.info("interrupted at step %d, before there was a codebook: nothing saved", trainer.steps)
        else:
            save(model, params, trainer.steps, output_dir)
            logger.info("interrupted at step %d of %d; saved what there is", trainer.steps, settings.max_steps)
        raise SystemExit(EXIT_INTERRUPTED) from None
    logger.info("wrote vqgan.ckpt, vqgan.yaml and reconstructions.png into %s", output_dir)


def _fast_in_bf16(device):
    # Convolutions in bf16 took 1.3 to 1.6 times as long as in fp32 on a CPU with AVX512-BF16 but without AMX.
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def build_optimizers(model, settings):
    """Muon over the kernels and Adam over the rest, or AdamW over all, at their peak learning rate."""
    import torch

    from utils.muon import Muon

    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "AdamW":
        return [torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=decay)]
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 4]
    return [Muon(kernels, rate, decay), torch.optim.Adam(others, rate, (0.9, 0.99))]


def codes_per_side(settings):
    return settings.image_size // settings.patch_size // 2 ** (len(settings.ch_mult) - 1)


def vqgan_params(settings):
    """The flags as model.params of a taming yaml, checked."""
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


def read_folders(settings):
    """(training pictures, held-out pictures uint8 (N, 3, S, S), what to call the latter).

    The training pictures are paths where they would not fit into memory. No more of them are read than the run can
    see.
    """
    from data.images import find_images, load_images
    from data.order import epoch_order

    size, seed = settings.image_size, settings.random_seed

    def shuffled(paths):
        return [paths[index] for index in epoch_order(len(paths), seed, epoch=0)]

    paths = shuffled(find_images(settings.input_folder))
    name = "held-out pictures"
    most = max(GRID_PICTURES, HELD_OUT_PIXELS // size**2)
    if settings.validation_folder is not None:
        held_out = shuffled(find_images(settings.validation_folder))[:most]
    elif settings.validation_split and len(paths) > 1:
        count = min(most, math.ceil(len(paths) * settings.validation_split))
        held_out, paths = paths[:count], paths[count:]
    else:
        held_out, name = paths[:most], "training pictures"
    paths = paths[: settings.max_steps * settings.batch_size]
    held_out = load_images(held_out, size, settings.dataloader_workers)
    if len(paths) * 3 * size**2 <= MEMORY_BYTES:
        paths = load_images(paths, size, settings.dataloader_workers)
    logger.info("%d training pictures, %d %s", len(paths), len(held_out), name)
    return paths, held_out, name


def show(bar, figures, trainer, step):
    """Loss, PSNR of the batch and codes in use behind the bar, or in the log where no bar is drawn.

    ValueError when training has run away.
    """
    loss = figures["loss"].item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is no longer finite at step {step}; use a lower --learning-rate than now")
    codes = f", {int((trainer.usage > 0.1).sum())} codes" if trainer.has_codebook else ""
    line = f"loss {loss:.4f}, {-10 * math.log10(figures['mse'].item()):.1f} dB{codes}"
    bar.set_postfix_str(line)
    if bar.disable and (step + 1) % LOGGED_EVERY == 0:
        logger.info("step %d of %d: %s", step + 1, trainer.settings.max_steps, line)


def measure(model, held_out, batch_size, output_dir):
    """The figures on held-out pictures; writes reconstructions.png."""
    import torch
    from PIL import Image

    from models.vqgan_training import evaluate

    figures = evaluate(model, held_out, batch_size, keep=GRID_PICTURES)
    rows = torch.stack([held_out[: len(figures.pictures)], figures.pictures])  # (2, N, 3, S, S)
    rows = torch.nn.functional.pad(rows, (2, 2, 2, 2), value=255)  # a white frame around each
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (2 * S', N * S', 3)
    _write(output_dir / "reconstructions.png", lambda path: Image.fromarray(grid.numpy()).save(path, format="PNG"))
    return figures


def save(model, params, steps, output_dir):
    """vqgan.yaml and vqgan.ckpt, as taming-transformers lays them out; each complete or not at all."""
    import yaml

    from utils.checkpoint import write

    params = dict(params, lossconfig={"target": "taming.modules.losses.DummyLoss"})
    if params["patch_size"] == 1:
        del params["patch_size"]  # taming's own VQModel knows no such setting
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    _write(output_dir / "vqgan.yaml", lambda path: path.write_text(yaml.safe_dump(config, sort_keys=False)))
    state_dict = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write(output_dir / "vqgan.ckpt", {"state_dict": state_dict, "global_step": steps})


def _write(path, write_to):
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_to(beside)
        os.replace(beside, path)
    finally:
        if beside.exists():
            beside.unlink()


if __name__ == "__main__":
    main()
