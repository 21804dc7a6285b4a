"""What evaluate.py does once its flags are read: losses, reconstructions, and figures of generated images."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from data.dataset import TextImageDataset
from data.files import UNREADABLE, report_skipped
from data.images import load_images, read_images
from data.shapes import validation_prompts
from data.shapes_reader import find_faults
from generation.images import ImageSpec, encode_prompt, generate_lists, make_grid, plan_image, to_image
from generation.loading import LoadedModel, load_from_flags
from generation.ranking import best_of
from models.sampling import Sampling
from training import nearest
from training.validation import add_perplexity
from utils import checkpoint
from utils.files import atomic_write, check_writable

logger = logging.getLogger("minidalle")

FindFaults = Callable[[torch.Tensor], List[Sequence[str]]]  # of the prompts' images, uint8 (N, 3, S, S)

GRID_IMAGES = 36
GRID_PAIRS = 8
NEAREST_IMAGES = 32
MIN_SQUARED_ERROR = 1e-10  # of pixels in [0, 1]; 100 dB


def run(settings: Namespace) -> None:
    """Measure the checkpoint that the flags name."""
    saved = checkpoint.read(settings.dalle_path)
    loaded = load_from_flags(settings, saved=saved)
    exported = saved["exported"] if isinstance(saved.get("exported"), dict) else {}
    averaged = "ema_weights" in saved or exported.get("averaged", False)
    results = {"checkpoint": settings.dalle_path, "step": saved.get("step"), "averaged_weights": averaged}
    dataset = open_pairs(settings, saved, loaded) if settings.input_folder else None
    training_set = open_pairs(settings, saved, loaded, settings.nearest) if settings.nearest else None
    check_writable(settings.outputs_dir, "--outputs-dir")
    folder = Path(settings.outputs_dir)
    if loaded.backend.world_size > 1:
        raise ValueError("evaluate.py runs in one process; start it without torchrun")
    clip, distance = load_scorers(settings, loaded.backend.device)
    sampling = loaded.recommended.override(vars(settings))
    if dataset is not None:
        results.update(evaluate_pairs(loaded, dataset, settings, folder))
        if clip or distance:
            results.update(score_captions(loaded, dataset, settings, sampling, clip, distance))
    if training_set is not None:
        results["nearest"] = evaluate_nearest(loaded, training_set, saved, settings, sampling)
    if settings.prompts:
        results.update(evaluate_prompts(loaded, settings, sampling, folder, clip))
    with atomic_write(folder / "results.json", text=True) as file:
        file.write(json.dumps(results, indent=2) + "\n")
    print(f"all figures: {folder / 'results.json'}")


def load_scorers(settings: Namespace, device: torch.device) -> Tuple[Any, Any]:
    """Return CLIP score and FID, each None unless its weights are given."""
    clip = distance = None
    if not (settings.clip_weights or settings.fid_weights):
        return clip, distance
    from models import image_scores

    if settings.clip_weights:
        clip = image_scores.clip_score(settings.clip_weights, settings.clip_model, device)
    if settings.fid_weights:
        distance = image_scores.InceptionDistance(settings.fid_weights, device)
    return clip, distance


def open_pairs(
    settings: Namespace, saved: Dict[str, Any], loaded: LoadedModel, folder: Optional[str] = None
) -> TextImageDataset:
    """Return the pairs of --input-folder, or of another, with the captions that train.py would use."""
    trained = saved.get("settings", {})
    truncate = settings.truncate_captions
    dataset = TextImageDataset(
        folder or settings.input_folder,
        loaded.tokenizer,
        text_seq_len=loaded.model.text_seq_len,
        image_size=loaded.model.vae.image_size,
        truncate_captions=trained.get("truncate_captions", True) if truncate is None else truncate,
        seed=trained.get("random_seed", 42),
    )
    if folder is not None:
        return dataset
    if settings.max_pairs and settings.max_pairs < len(dataset):
        dataset = dataset.split_off(settings.max_pairs / len(dataset))
    if settings.fid_weights and len(dataset) < 2:
        raise ValueError(
            f"--fid-weights: {len(dataset)} pair in {settings.input_folder}; FID needs two, better thousands"
        )
    return dataset


def evaluate_pairs(loaded: LoadedModel, dataset: TextImageDataset, settings: Namespace, folder: Path) -> Dict[str, Any]:
    """Return losses and mean reconstruction PSNR in dB, and write a grid of originals above reconstructions."""

    size, paths = loaded.model.vae.image_size, dataset.image_paths()
    at_once = min(settings.batch_size, max(1, 16 * 256**2 // size**2))
    starts = tqdm(range(0, len(paths), at_once), desc="encoding", unit="batch", disable=None)
    pairs, unreadable = [], []
    psnr: List[float] = []
    originals: List[torch.Tensor] = []
    decodings: List[torch.Tensor] = []
    for batch in read_images(paths, size, (range(len(paths))[start : start + at_once] for start in starts)):
        unreadable += [Path(str(paths[index])) for index in batch.unreadable]
        if batch.pixels is None:
            continue
        pixels = batch.pixels.float() / 255
        codes = loaded.encode(pixels)
        decoded = loaded.decode(codes)
        psnr += (-10 * (decoded - pixels).square().mean(dim=(1, 2, 3)).clamp(min=MIN_SQUARED_ERROR).log10()).tolist()
        pairs.append((torch.stack([dataset.text(0, index) for index in batch.indices]), codes))
        originals += pixels[: GRID_PAIRS - len(originals)]
        decodings += decoded[: GRID_PAIRS - len(decodings)]
    report_skipped({UNREADABLE: unreadable})
    if not pairs:
        raise ValueError(f"{settings.input_folder}: none of {len(paths)} images can be read")
    make_grid(list(map(to_image, originals + decodings)), len(originals)).save(folder / "reconstructions.png")
    texts, codes = (torch.cat(part).split(settings.batch_size) for part in zip(*pairs))
    batches = tqdm(list(zip(texts, codes)), desc="losses", unit="batch", disable=None)
    losses = add_perplexity(loaded.backend.evaluator(loaded.model)(batches))
    line = " ".join(f"{name} {losses[name]:.4f}" for name in ("total", "text", "image"))
    mean = sum(psnr) / len(psnr)
    print(f"losses of {len(psnr)} pairs: {line} perplexity {losses['perplexity']:.2f}")
    print(f"reconstruction: {mean:.2f} dB PSNR; {folder / 'reconstructions.png'} has originals above reconstructions")
    return {"input_folder": settings.input_folder, "pairs": len(psnr), "losses": losses, "reconstruction_psnr": mean}


def score_captions(
    loaded: LoadedModel, dataset: TextImageDataset, settings: Namespace, sampling: Sampling, clip: Any, distance: Any
) -> Dict[str, Any]:
    """Generate one image for each pair's caption and return the scores."""
    text = [dataset.text(0, index) for index in range(len(dataset))]
    captions = [loaded.tokenizer.decode(tokens) for tokens in text]
    codes, used = generate_codes(loaded, captions, text, settings, sampling)
    found, scores = {"seed": settings.seed, "sampling": used}, []
    for part in batches(len(codes), settings, "scores"):
        images = loaded.decode(codes[part])  # all of them at once would take gigabytes
        if clip:
            scores.append(clip([to_image(pixels) for pixels in images], captions[part]))
        if distance:
            distance.add("generated", (images * 255).round().byte())
            distance.add("real", load_images(dataset.image_paths()[part], loaded.model.vae.image_size))
    if clip:
        found["clip_score"] = mean_clip_score(scores, settings)
    if distance:
        found["fid"] = distance.distance()
        print(f"FID: {found['fid']:.2f} ({len(codes)} images; too high with fewer than some thousands)")
    return found


def mean_clip_score(scores: Sequence[torch.Tensor], settings: Namespace) -> float:
    """Return and print the mean of the CLIP scores of several batches."""
    score = torch.cat(list(scores)).mean().item()
    print(f"CLIP score: {score:.2f} ({settings.clip_model}, {sum(map(len, scores))} images)")
    return score


def batches(count: int, settings: Namespace, title: str) -> Iterable[slice]:
    """Return the batches of `count` images as slices, with a progress bar."""
    starts = tqdm(range(0, count, settings.batch_size), desc=title, unit="batch", disable=None)
    return (slice(first, first + settings.batch_size) for first in starts)


def evaluate_prompts(
    loaded: LoadedModel, settings: Namespace, sampling: Sampling, folder: Path, clip: Any = None
) -> Dict[str, Any]:
    """Return the share of validation prompts that the images follow; write a grid and its prompts."""
    kind = settings.prompts_of or ("scenes" if knows_scenes(loaded.words) else "shapes")
    prompts, find_faults = load_prompts(kind, settings)
    text = [encode_prompt(loaded, prompt) for prompt in prompts]
    codes, used = generate_codes(loaded, prompts, text, settings, sampling)
    images = loaded.decode(codes)
    accuracy, wrong = judge(images, find_faults)
    make_grid([to_image(pixels) for pixels in images[:GRID_IMAGES]]).save(folder / "grid.png")
    (folder / "prompts.txt").write_text("\n".join(prompts[:GRID_IMAGES]) + "\n", encoding="utf-8")
    if wrong:
        logger.info("not followed in: %s", ", ".join(f"{fault} {count}" for fault, count in wrong.most_common()))
    print(f"image grid: {folder / 'grid.png'} (its prompts, row by row: {folder / 'prompts.txt'})")
    if kind == "scenes":
        from training.scenes_reader import FAULTS

        shares = [f"{name} {100 * (1 - wrong[name] / len(prompts)):.1f} %" for name in FAULTS]
        print(f"right: {', '.join(shares)}")
    print(f"prompt accuracy: {100 * accuracy:.1f} % ({len(prompts)} prompts)")
    found = {}
    if clip:
        parts = batches(len(images), settings, "CLIP")
        scores = [clip([to_image(pixels) for pixels in images[part]], prompts[part]) for part in parts]
        found["prompts_clip_score"] = mean_clip_score(scores, settings)
    return {
        **found,
        "prompts": len(prompts),
        "prompt_set": settings.prompt_set,
        "prompts_of": kind,
        "prompt_accuracy": accuracy,
        "faults": dict(wrong),
        "seed": settings.seed,
        "rank": settings.rank,
        "sampling": used,
    }


def evaluate_nearest(
    loaded: LoadedModel, training_set: TextImageDataset, saved: Dict[str, Any], settings: Namespace, sampling: Sampling
) -> Dict[str, Any]:
    """Generate images for captions and compare them with the training images.

    The captions are those of the images that the run kept for validation if it split some off, else of training images.
    """

    share = saved.get("settings", {}).get("validation_split")
    source = training_set.split_off(share) if share else training_set
    count = min(NEAREST_IMAGES, len(source))
    text = [source.first_caption(number * len(source) // count) for number in range(count)]
    captions = [" ".join(loaded.tokenizer.decode(tokens).split()) for tokens in text]
    codes, used = generate_codes(loaded, captions, text, settings, sampling)
    folder = Path(settings.outputs_dir)
    with torch.no_grad():
        found = nearest.compare(loaded, training_set, captions, codes, folder, settings.batch_size)
    return {**found, "captions": captions, "sampling": used}


def generate_codes(
    loaded: LoadedModel, prompts: Sequence[str], text: Sequence[torch.Tensor], settings: Namespace, sampling: Sampling
) -> Tuple[torch.Tensor, Dict[str, Any]]:
    """Return the codes of each prompt's image, the likeliest of --rank: int64 (N, L), and the sampling settings."""

    sampling = plan_image(loaded, prompts[0], 0, sampling).sampling
    no_codes = text[0].new_zeros(0)
    plans = []
    for index, (prompt, tokens) in enumerate(zip(prompts, text)):
        first = ImageSpec(prompt, tokens, settings.seed + index * settings.rank, sampling, no_codes)
        plans.append(first.with_seeds(settings.rank))
    chosen = []
    with tqdm(total=settings.rank * len(plans), desc="generating", unit="image", disable=None) as bar:
        for specs, codes in zip(plans, generate_lists(loaded, plans, on_batch=bar.update)):
            chosen.append(codes[best_of(loaded, specs, codes, 1)[0][0] if settings.rank > 1 else 0])
    return torch.stack(chosen), sampling._asdict()


def knows_scenes(words: Dict[str, int]) -> bool:
    """Return whether the words of training captions include the names of all objects of scenes."""
    from data.scene_captions import objects

    return all(word in words for name in objects() for word in name.split())


def load_prompts(kind: str, settings: Namespace) -> Tuple[List[str], FindFaults]:
    """Return validation prompts and the function that finds what is wrong in their images."""
    if kind == "shapes":
        prompts = validation_prompts(settings.prompt_set, settings.prompts, settings.seed)
        return prompts, shape_faults(prompts)
    from data.scene_captions import validation_scenes
    from training.scenes_reader import find_faults, load_reader

    reader = load_reader()
    described = validation_scenes(settings.prompt_set, settings.prompts, settings.seed)
    prompts, scenes = [caption for caption, _ in described], [scene for _, scene in described]
    return prompts, lambda pixels: list(map(find_faults, scenes, reader.read(pixels / 255)))


def shape_faults(prompts: Sequence[str]) -> FindFaults:
    """Return the function that finds what is wrong in the images of prompts about shapes."""
    return lambda pixels: list(map(find_faults, prompts, pixels.permute(0, 2, 3, 1).numpy()))


def judge(images: torch.Tensor, find_faults: FindFaults) -> Tuple[float, Counter]:
    """Return the share of images that follow their prompts, and how often each kind of fault was found."""
    seen = find_faults((images * 255).round().byte())
    return sum(not found for found in seen) / len(seen), Counter(fault for found in seen for fault in found)
