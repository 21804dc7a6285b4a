"""A checkpoint → how good it is, in figures: printed, and in results.json.

    python evaluate.py --dalle_path output/ckpt/dalle_best.pt --input-folder FOLDER
    python evaluate.py --dalle_path output/demo/ckpt/dalle_step_800.pt

Of a folder's pairs: total, text and image loss and perplexity of a code, as train.py's validation has them, what the
VQGAN gives back of the pictures (PSNR), and a grid of them. Without a folder, or with --prompts: held-out prompts of
the demo set are drawn and read back by data/shapes_reader.py: two objects, both colours, shapes and sizes, and the
relation. Averaged weights are taken where the checkpoint keeps them.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import args
import log
from generate import chosen_sampling, grid_of, load

GRID_PICTURES = 36
GRID_PAIRS = 8
SMALLEST_ERROR = 1e-10  # of pixels in [0, 1], squared: 100 dB


def main(argv=None):
    settings = args.evaluate_arguments(argv)
    log.set_up()
    with log.interrupt_exits(), log.bad_input_exits():
        from backends import select
        from utils import checkpoint

        saved = checkpoint.read(settings.dalle_path)
        model, tokenizer, recommended = load(
            *(settings.dalle_path, settings.vqgan_model_path, settings.vqgan_config_path, settings.bpe_path),
            saved=saved,
        )
        averaged = isinstance(saved.get("ema_weights"), dict) or saved.get("exported", {}).get("averaged", False)
        results = {"checkpoint": settings.dalle_path, "step": saved.get("step"), "averaged_weights": averaged}
        dataset = pairs(settings, saved, model, tokenizer) if settings.input_folder else None
        checkpoint.check_writable(settings.outputs_dir, "--outputs-dir")
        folder = Path(settings.outputs_dir)
        backend = select(settings)
        if backend.world_size > 1:
            raise ValueError("evaluate.py runs in one process; start it without torchrun")
        if dataset is not None:
            results.update(of_pairs(model, dataset, backend, settings, folder))
        if settings.prompts:
            sampling = chosen_sampling(settings, recommended)
            results.update(of_prompts(model, tokenizer, backend, settings, sampling, folder))
        with checkpoint.written_whole(folder / "results.json") as beside:
            beside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"all figures: {folder / 'results.json'}")


def pairs(settings, saved, model, tokenizer):
    """The folder's pairs as train.py validates on them: the run's choice of captions, cut where the run cut them."""
    from data.loader import TextImageDataset

    trained = saved.get("settings") if isinstance(saved.get("settings"), dict) else {}
    truncate = settings.truncate_captions
    dataset = TextImageDataset(
        settings.input_folder,
        tokenizer,
        text_seq_len=model.text_seq_len,
        image_size=model.vae.image_size,
        truncate_captions=trained.get("truncate_captions", True) if truncate is None else truncate,
        seed=trained.get("random_seed", 42),
    )
    if settings.max_pairs and settings.max_pairs < len(dataset):
        dataset = dataset.hold_out(settings.max_pairs / len(dataset))
    return dataset


def of_pairs(model, dataset, backend, settings, folder):
    """Losses and reconstructions of a dataset of pixels, which has codes afterwards."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from training.validation import with_perplexity

    psnr, shown = reconstruct(model.vae, dataset, backend, settings.batch_size)
    grid_of(shown, columns=len(shown) // 2).save(folder / "reconstructions.png")
    batches = DataLoader(dataset, settings.batch_size)
    losses = backend.evaluator(model)(tqdm(batches, desc="losses", unit="batch", disable=None))
    losses = with_perplexity(losses)
    told = " ".join(f"{name} {losses[name]:.4f}" for name in ("total", "text", "image"))
    print(f"losses of {len(dataset)} pairs: {told} perplexity {losses['perplexity']:.2f}")
    print(f"reconstruction: {psnr:.2f} dB PSNR; {folder / 'reconstructions.png'} has originals above what comes back")
    return {
        "input_folder": settings.input_folder,
        "pairs": len(dataset),
        "losses": losses,
        "reconstruction_psnr": psnr,
    }


def reconstruct(vae, dataset, backend, batch_size):
    """Attach codes to a dataset of pixels → (mean PSNR of its pictures as they come back, in dB; the first originals,
    then what comes back of them, float (2 N, 3, S, S) in [0, 1]).
    """
    import torch

    from data.codes import cached_codes

    encode, decode = backend.encode(vae), backend.decode(vae)
    psnr, originals, returned = [], [], []

    def encode_and_compare(pixels):
        codes = encode(pixels)
        decoded = decode(codes)
        errors = (decoded - pixels).square().mean(dim=(1, 2, 3))
        psnr.append(-10 * errors.clamp(min=SMALLEST_ERROR).log10())
        if sum(map(len, originals)) < GRID_PAIRS:
            originals.append(pixels)
            returned.append(decoded)
        return codes

    with tempfile.TemporaryDirectory() as place:  # pictures are read again in any case, and a user's folder left alone
        codes, bad = cached_codes(
            dataset.pictures,
            encode_and_compare,
            folder=dataset.folder,
            cache_dir=place,
            image_size=vae.image_size,
            num_codes=vae.num_tokens,
            fingerprint=vae.fingerprint(),
            batch_size=min(batch_size, max(1, 16 * 256**2 // vae.image_size**2)),
        )
        dataset.attach_codes(codes.copy(), bad)
    shown = torch.cat([torch.cat(part)[:GRID_PAIRS] for part in (originals, returned)])
    return torch.cat(psnr).mean().item(), shown


def of_prompts(model, tokenizer, backend, settings, sampling, folder):
    """How many held-out prompts of the demo set the pictures follow; writes a grid of them and its prompts."""
    from data.shapes import held_out_prompts

    prompts = held_out_prompts(settings.prompt_set, settings.prompts, settings.seed)
    text = tokenizer.tokenize(prompts, model.text_seq_len)
    pictures = draw_prompts(backend.sampler(model), backend.decode(model.vae), text, settings, sampling)
    accuracy, wrong = judge(prompts, pictures)
    grid_of(pictures[:GRID_PICTURES]).save(folder / "grid.png")
    (folder / "prompts.txt").write_text("\n".join(prompts[:GRID_PICTURES]) + "\n", encoding="utf-8")
    if wrong:
        log.LOG.info("not followed in: %s", ", ".join(f"{fault} {count}" for fault, count in wrong.most_common()))
    print(f"picture grid: {folder / 'grid.png'} (its prompts, row by row: {folder / 'prompts.txt'})")
    print(f"prompt accuracy: {100 * accuracy:.1f} % ({len(prompts)} prompts)")
    return {
        "prompts": len(prompts),
        "prompt_set": settings.prompt_set,
        "prompt_accuracy": accuracy,
        "faults": dict(wrong),
        "seed": settings.seed,
        "sampling": sampling,
    }


def draw_prompts(sampler, decode, text, settings, sampling):
    """One picture a prompt, float (K, 3, S, S) in [0, 1]."""
    import torch
    from tqdm import tqdm

    pictures = []
    for first in tqdm(range(0, len(text), settings.batch_size), desc="drawing", unit="batch", disable=None):
        part = text[first : first + settings.batch_size]
        generators = [torch.Generator().manual_seed(settings.seed + first + i) for i in range(len(part))]
        pictures.append(decode(sampler(part, generator=generators, **sampling)))
    return torch.cat(pictures)


def judge(prompts, pictures):
    """Share of pictures without a fault, and how often each kind of fault was seen."""
    from data.shapes_reader import faults

    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = [faults(prompt, picture) for prompt, picture in zip(prompts, pixels)]
    return sum(not found for found in seen) / len(seen), Counter(fault for found in seen for fault in found)


if __name__ == "__main__":
    main()
