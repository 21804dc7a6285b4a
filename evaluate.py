"""A checkpoint → how good it is, in figures: printed, and in results.json.

    python evaluate.py --dalle_path output/ckpt/dalle_best.pt --input-folder FOLDER
    python evaluate.py --dalle_path output/demo/ckpt/dalle_step_800.pt

Of a folder's pairs: total, text and image loss and perplexity of a code, as train.py's validation has them, what the
VQGAN gives back of the pictures (PSNR), and a grid of them. Without a folder, or with --prompts: held-out prompts of
the demo set are drawn and read back by data/shapes_reader.py: two objects, both colours, shapes and sizes, and the
relation. Averaged weights are taken where the checkpoint keeps them. --clip-weights and --fid-weights score what is
drawn, for those prompts or for the folder's captions (models/image_scores.py).
"""

import json
import logging
import tempfile
from collections import Counter
from pathlib import Path

import log
from args_evaluate import evaluate_arguments
from utils.files import atomic_write, check_writable

logger = logging.getLogger("minidalle")

GRID_PICTURES = 36
GRID_PAIRS = 8
SMALLEST_ERROR = 1e-10  # of pixels in [0, 1], squared: 100 dB


def main(argv=None):
    settings = evaluate_arguments(argv)
    log.set_up()
    with log.exit_on_interrupt(), log.exit_on_bad_input():
        from generation.loading import load_from_flags
        from utils import checkpoint

        saved = checkpoint.read(settings.dalle_path)
        loaded = load_from_flags(settings, saved=saved)
        exported = saved["exported"] if isinstance(saved.get("exported"), dict) else {}
        averaged = "ema_weights" in saved or exported.get("averaged", False)
        results = {"checkpoint": settings.dalle_path, "step": saved.get("step"), "averaged_weights": averaged}
        dataset = pairs(settings, saved, loaded) if settings.input_folder else None
        check_writable(settings.outputs_dir, "--outputs-dir")
        folder = Path(settings.outputs_dir)
        if loaded.backend.world_size > 1:
            raise ValueError("evaluate.py runs in one process; start it without torchrun")
        clip, distance = scorers(settings, loaded.backend.device)
        sampling = loaded.recommended.override(vars(settings))
        if dataset is not None:
            results.update(of_pairs(loaded, dataset, settings, folder))
            if clip or distance:
                results.update(of_drawings(loaded, dataset, settings, sampling, clip, distance))
        if settings.prompts:
            results.update(of_prompts(loaded, settings, sampling, folder, clip))
        with atomic_write(folder / "results.json", text=True) as file:
            file.write(json.dumps(results, indent=2) + "\n")
    print(f"all figures: {folder / 'results.json'}")


def scorers(settings, device):
    """(CLIP score, FID), None where it is not asked for. On IPUs they run on the CPU."""
    if not (settings.clip_weights or settings.fid_weights):
        return None, None
    from models import image_scores

    clip = distance = None
    if settings.clip_weights:
        clip = image_scores.clip_score(settings.clip_weights, settings.clip_model, device)
    if settings.fid_weights:
        distance = image_scores.InceptionDistance(settings.fid_weights, device)
    return clip, distance


def pairs(settings, saved, loaded):
    """The folder's pairs as train.py validates on them: the run's choice of captions, cut where the run cut them."""
    from data.loader import TextImageDataset

    trained = saved.get("settings", {})
    truncate = settings.truncate_captions
    dataset = TextImageDataset(
        settings.input_folder,
        loaded.tokenizer,
        text_seq_len=loaded.model.text_seq_len,
        image_size=loaded.model.vae.image_size,
        truncate_captions=trained.get("truncate_captions", True) if truncate is None else truncate,
        seed=trained.get("random_seed", 42),
    )
    if settings.max_pairs and settings.max_pairs < len(dataset):
        dataset = dataset.split_off(settings.max_pairs / len(dataset))
    if settings.fid_weights and len(dataset) < 2:
        raise ValueError(
            f"--fid-weights: {len(dataset)} pair in {settings.input_folder}; FID needs two, better thousands"
        )
    return dataset


def of_pairs(loaded, dataset, settings, folder):
    """Losses and reconstructions of a dataset of pixels, which has codes afterwards."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from generation.output import make_grid, to_image
    from training.validation import with_perplexity

    psnr, shown = reconstruct(loaded, dataset, settings.batch_size)
    make_grid([to_image(pixels) for pixels in shown], columns=len(shown) // 2).save(folder / "reconstructions.png")
    batches = DataLoader(dataset, settings.batch_size)
    losses = loaded.backend.evaluator(loaded.model)(tqdm(batches, desc="losses", unit="batch", disable=None))
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


def reconstruct(loaded, dataset, batch_size):
    """Attach codes to a dataset of pixels → (mean PSNR of its pictures as they come back, in dB; the first originals,
    then what comes back of them, float (2 N, 3, S, S) in [0, 1]).
    """
    import torch

    from data.codes import load_codes, open_code_cache

    vae = loaded.model.vae
    psnr, originals, returned = [], [], []

    def encode_and_compare(pixels):
        codes = loaded.encode(pixels)
        decoded = loaded.decode(codes)
        errors = (decoded - pixels).square().mean(dim=(1, 2, 3))
        psnr.append(-10 * errors.clamp(min=SMALLEST_ERROR).log10())
        if sum(map(len, originals)) < GRID_PAIRS:
            originals.append(pixels)
            returned.append(decoded)
        return codes

    with tempfile.TemporaryDirectory() as place:  # pictures are read again in any case, and a user's folder left alone
        options = {"image_seq_len": vae.image_seq_len, "num_codes": vae.num_tokens, "fingerprint": vae.fingerprint()}
        cache = open_code_cache(dataset.folder, place, image_size=vae.image_size, **options)
        at_once = min(batch_size, max(1, 16 * 256**2 // vae.image_size**2))
        codes, rows = load_codes(dataset.images, encode_and_compare, cache, batch_size=at_once)
        dataset.attach_codes(codes[:].copy(), rows)
    shown = torch.cat([torch.cat(part)[:GRID_PAIRS] for part in (originals, returned)])
    return torch.cat(psnr).mean().item(), shown


def of_drawings(loaded, dataset, settings, sampling, clip, distance):
    """One picture drawn for each pair's caption → its scores."""
    from data.images import load_images

    text = [dataset[index][0] for index in range(len(dataset))]
    captions = [loaded.tokenizer.decode(tokens) for tokens in text]
    pictures, sampling = draw_prompts(loaded, captions, text, settings, sampling)
    found = {"seed": settings.seed, "sampling": sampling}
    if clip:
        found["clip_score"] = mean_clip_score(clip, pictures, captions, settings)
    if distance:
        for first in batches_in(len(pictures), settings, "FID"):
            part = slice(first, first + settings.batch_size)
            distance.add("drawn", (pictures[part] * 255).round().byte())
            real = [dataset.folder / name for name, _, _ in dataset.images[part]]
            distance.add("real", load_images(real, loaded.model.vae.image_size))
        found["fid"] = distance.distance()
        print(f"FID: {found['fid']:.2f} ({len(pictures)} pictures; with fewer than some thousands it is too high)")
    return found


def mean_clip_score(clip, pictures, texts, settings):
    import torch

    from generation.output import to_image

    scores = []
    for first in batches_in(len(pictures), settings, "CLIP"):
        part = slice(first, first + settings.batch_size)
        scores.append(clip([to_image(pixels) for pixels in pictures[part]], texts[part]))
    score = torch.cat(scores).mean().item()
    print(f"CLIP score: {score:.2f} ({settings.clip_model}, {len(pictures)} pictures)")
    return score


def batches_in(count, settings, title):
    from tqdm import tqdm

    return tqdm(range(0, count, settings.batch_size), desc=title, unit="batch", disable=None)


def of_prompts(loaded, settings, sampling, folder, clip=None):
    """How many held-out prompts of the demo set the pictures follow; writes a grid of them and its prompts."""
    from data.shapes import validation_prompts
    from generation.output import make_grid, to_image

    prompts = validation_prompts(settings.prompt_set, settings.prompts, settings.seed)
    text = loaded.tokenizer.tokenize(prompts, loaded.model.text_seq_len)
    pictures, sampling = draw_prompts(loaded, prompts, text, settings, sampling)
    accuracy, wrong = judge(prompts, pictures)
    make_grid([to_image(pixels) for pixels in pictures[:GRID_PICTURES]]).save(folder / "grid.png")
    (folder / "prompts.txt").write_text("\n".join(prompts[:GRID_PICTURES]) + "\n", encoding="utf-8")
    if wrong:
        logger.info("not followed in: %s", ", ".join(f"{fault} {count}" for fault, count in wrong.most_common()))
    print(f"picture grid: {folder / 'grid.png'} (its prompts, row by row: {folder / 'prompts.txt'})")
    print(f"prompt accuracy: {100 * accuracy:.1f} % ({len(prompts)} prompts)")
    scores = {"prompts_clip_score": mean_clip_score(clip, pictures, prompts, settings)} if clip else {}
    return {
        **scores,
        "prompts": len(prompts),
        "prompt_set": settings.prompt_set,
        "prompt_accuracy": accuracy,
        "faults": dict(wrong),
        "seed": settings.seed,
        "sampling": sampling,
    }


def draw_prompts(loaded, prompts, text, settings, sampling):
    """One picture a prompt: float (K, 3, S, S) in [0, 1], and the sampling settings that they were drawn with."""
    from tqdm import tqdm

    from generation import batching

    shaping = batching.plan_image(loaded, prompts[0], 0, sampling).sampling
    none = text[0].new_zeros(0)
    wanted = [
        batching.ImageSpec(prompt, tokens, settings.seed + place, shaping, none)
        for place, (prompt, tokens) in enumerate(zip(prompts, text))
    ]
    with tqdm(total=len(wanted), desc="drawing", unit="picture", disable=None) as bar:
        (codes,) = batching.generate_lists(loaded, [wanted], on_batch=bar.update)
    return loaded.decode(codes), shaping._asdict()


def judge(prompts, pictures):
    """Share of pictures without a fault, and how often each kind of fault was seen."""
    from data.shapes_reader import find_faults

    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = [find_faults(prompt, picture) for prompt, picture in zip(prompts, pixels)]
    return sum(not found for found in seen) / len(seen), Counter(fault for found in seen for fault in found)


if __name__ == "__main__":
    main()
