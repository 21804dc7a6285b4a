"""Rows about networks: L16 on codes and the official VQGAN, untrained, their peers of the same sizes, and the demo.

A function of a row returns the seconds per sample of each repetition and the work of one sample (limits.Work). With
`quick`, the networks are small. A process builds either our network or the peer's.
"""

import argparse
import contextlib
import copy
import itertools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

import args
from backends.ipu.estimates import count_operations, trace
from backends.native.backend import NativeBackend, NativeTrainingBackend
from benchmarks import peer
from benchmarks.limits import (
    DTYPES,
    Measurement,
    count_head_weights,
    count_layer_weights,
    count_training_operations,
    time_call,
    time_calls,
)
from generation.images import encode_prompt, plan_image
from generation.loading import load
from models.dalle import DALLE
from models.sampling import Sampling
from models.vae import VQGanVAE
from models.vqgan_files import OFFICIAL_PARAMS
from service.queue import Busy, GenerationQueue

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "demo" / "shapes.safetensors"
TEXT_TOKENS = 8192  # of bpe/bpe_yttm_vocab.txt
L16 = "--config L16 --device auto --generated-data --learning-rate 1e-5 "
L16 += "--gradient-accumulation 1 --replication-factor 1 --loss-scaling 1"
QUICK = "--hidden-size 64 --num-hidden-layers 2 --layers-per-ipu 0,1,1,0 --num-attention-heads 2 --dim-head 32"
IMAGES = 4  # that the VQGAN gets at once
CLIENTS = 20  # of the web service


class OfficialCodes:
    """What a DALLE that trains on codes needs to know of the official VQGAN."""

    image_size, num_layers, num_tokens = 256, 4, 1024


def parse_settings(quick: bool, *flags: Any) -> argparse.Namespace:
    """Return train.py's settings for L16, or for a small network, with more flags."""
    return args.train_arguments([*L16.split(), *(QUICK.split() if quick else []), *map(str, flags)])


def sizes_of(settings: argparse.Namespace) -> Dict[str, Any]:
    """Return a DALLE's keyword arguments, which both sides understand."""
    return {
        "dim": settings.hidden_size,
        "num_text_tokens": TEXT_TOKENS,
        "text_seq_len": settings.text_seq_len,
        "depth": settings.num_hidden_layers,
        "heads": settings.num_attention_heads,
        "dim_head": settings.dim_head,
        "attn_types": settings.attn_types,
    }


def build_ours(quick: bool, rows: int = 1) -> Tuple[NativeTrainingBackend, DALLE]:
    """Return a backend for batches of `rows` and our network, still on the CPU."""
    settings = parse_settings(quick, "--batch-size", rows)
    torch.manual_seed(0)
    return NativeTrainingBackend(settings), DALLE(vae=OfficialCodes(), **sizes_of(settings))


def build_theirs(quick: bool) -> Tuple[torch.device, Any]:
    """Return the device and dalle-pytorch's network on it."""
    settings = parse_settings(quick)
    device = NativeTrainingBackend(settings).device
    torch.manual_seed(0)
    return device, peer.build_dalle(peer.load(), OfficialCodes(), **sizes_of(settings)).to(device)


def random_batch(model: Any, rows: int, device: Any = "cpu") -> Tuple[Tensor, Tensor]:
    """Return text int64 (rows, text_seq_len) and codes int64 (rows, image_seq_len)."""
    text = torch.randint(1, TEXT_TOKENS, (rows, model.text_seq_len))
    return text.to(device), torch.randint(0, model.num_image_tokens, (rows, model.image_seq_len)).to(device)


def train(rows: int, quick: bool) -> Measurement:
    """Measure updates with batches of `rows`."""
    backend, model = build_ours(quick, rows)
    trainer, batch = backend.trainer(model), random_batch(model, rows)
    seconds = time_calls(lambda: trainer.step([batch]), backend.device, rows, quick)
    return seconds, {"operations": count_training_operations(model), "precision": backend.precision}


def train_peer(rows: int, quick: bool) -> List[float]:
    """Measure dalle-pytorch's updates in fp32, as its training script does them."""
    device, model = build_theirs(quick)
    batch = random_batch(model.train(), rows, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        model(*batch, return_loss=True).backward()
        optimizer.step()
        optimizer.zero_grad()

    return time_calls(step, device, rows, quick, at_least=2, enough_seconds=0)


def generate(images: int, quick: bool) -> Measurement:
    """Measure sampling the codes of `images` images of one caption, top-k 0.99, with random weights.

    The caption is read once for all images, and the weights once per pass. Guesses of random codes are wrong, so each
    code takes a pass.
    """
    backend, model = build_ours(quick, images)
    return time_sampling(backend, model, random_batch(model, 1)[0], Sampling(), images, quick)


def generate_with_demo(images: int, quick: bool) -> Measurement:
    """Measure sampling the codes of `images` images of one caption with the demo model and its settings."""
    loaded = load(str(SHAPES), batch_size=images)
    text = encode_prompt(loaded, loaded.examples[0])[None]
    return time_sampling(loaded.backend, loaded.model, text, loaded.recommended, images, quick)


def time_sampling(
    backend: Any, model: DALLE, text: Tensor, sampling: Sampling, images: int, quick: bool
) -> Measurement:
    """Measure a sampler with one caption int64 (1, T)."""
    sampler, text = backend.sampler(model, images), text.repeat(images, 1)
    stepper: Any = sampler.stepper
    passes: List[int] = []

    def sample() -> None:
        generators = [torch.Generator().manual_seed(len(passes) * images + image) for image in range(images)]
        before = stepper.passes
        sampler(text, sampling, generator=generators)
        passes.append(stepper.passes - before)

    seconds = time_calls(sample, backend.device, images, quick)
    per_image = statistics.mean(passes[1:]) + 1  # and the pass over the caption, which gives the first code
    weights = count_layer_weights(model) + count_head_weights(model)
    rows = (2 if sampling.is_guided else 1) * model.image_seq_len
    return seconds, {
        "operations": 2 * rows * weights,
        "precision": backend.precision,
        "bytes": torch.finfo(DTYPES[backend.precision]).bits // 8 * weights * per_image / images,
        "passes": per_image,
    }


def first_image(quick: bool) -> Measurement:
    """Measure `generate.py` from its start to the end, for one image of the bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--text", "a small cat left of a large pizza", "--num_images", "1", "--outputs_dir", folder]
        command = [sys.executable, "generate.py", *flags]
        run = partial(subprocess.run, command, cwd=ROOT, check=True, capture_output=True)
        return time_calls(run, torch.device("cpu"), quick=quick, enough_seconds=0), None


def serve(quick: bool) -> Measurement:
    """Measure the web service's queue with the demo: clients that ask for one to four images again and again.

    Every other one follows previews, and a fifth of them have other sampling settings.
    """
    loaded = load()
    queue = GenerationQueue(loaded)
    queue.start()

    def ask(client: int) -> None:
        settings = {"temperature": 1.0, "cond_scale": 1.0} if client % 5 == 0 else {}
        with contextlib.suppress(Busy):  # the queue has stopped
            for turn in itertools.count():
                prompt = loaded.examples[(client + turn) % len(loaded.examples)]
                specs = [plan_image(loaded, prompt, seed, settings) for seed in range(1 + (client + turn) % 4)]
                queue.submit(client, specs, every=1 if client % 2 else None).ended.wait()

    def measure() -> float:
        started, before = time.perf_counter(), queue.images_generated
        while queue.images_generated < before + (8 if quick else 256):
            time.sleep(0.001)
        return (time.perf_counter() - started) / (queue.images_generated - before)

    for client in range(CLIENTS):
        threading.Thread(target=ask, args=(client,), daemon=True).start()
    seconds = [measure() for _ in range(2 if quick else 6)][1:]
    queue.stop(60)
    return seconds, None


def generate_peer(images: int, quick: bool) -> List[float]:
    """Measure dalle-pytorch's generate_images with its cache, once and without warm-up: an image takes minutes."""
    device, model = build_theirs(quick)
    text = random_batch(model.eval(), 1, device)[0].repeat(images, 1)
    return [time_call(lambda: model.generate_images(text, filter_thres=0.99, use_cache=True), device) / images]


def vqgan_params(quick: bool) -> Dict[str, Any]:
    """Return taming's parameters of the official VQGAN, or of a smaller one."""
    params: Dict[str, Any] = copy.deepcopy(OFFICIAL_PARAMS)
    if quick:
        params["ddconfig"].update(ch=32, resolution=64, attn_resolutions=[4])
    return params


def build_vqgan(quick: bool) -> Tuple[VQGanVAE, Tensor, Tensor]:
    """Return our VQGAN, pixels float (IMAGES, 3, S, S) in [0, 1] and codes int64 (IMAGES, L)."""
    torch.manual_seed(0)
    vae = VQGanVAE(vqgan_params(quick))
    pixels = torch.rand(IMAGES, 3, vae.image_size, vae.image_size)
    return vae, pixels, torch.randint(0, vae.num_tokens, (IMAGES, vae.image_seq_len))


def encode(quick: bool) -> Measurement:
    """Measure images to codes, in fp32 at any precision: backends/native/inference.py says why."""
    (vae, pixels, _), backend = build_vqgan(quick), NativeBackend()
    encoder = backend.encode(vae)
    seconds = time_calls(lambda: encoder(pixels), backend.device, IMAGES, quick)
    return seconds, {"operations": count_operations(trace(vae.model.encoder, pixels[:1])), "precision": "fp32"}


def decode(quick: bool) -> Measurement:
    """Measure codes to images."""
    (vae, _, codes), backend = build_vqgan(quick), NativeBackend()
    decoder = backend.decode(vae)
    seconds = time_calls(lambda: decoder(codes), backend.device, IMAGES, quick)
    latents = torch.zeros(1, vqgan_params(quick)["ddconfig"]["z_channels"], vae.fmap_size, vae.fmap_size)
    precision = "bf16" if backend.precision == "bf16" else "fp32"
    return seconds, {"operations": count_operations(trace(vae.model.decoder, latents)), "precision": precision}


def encode_peer(quick: bool) -> List[float]:
    """Measure images to codes with taming's network."""
    (_, pixels, _), device = build_vqgan(quick), NativeBackend().device
    network, pixels = peer.TamingVQGAN(vqgan_params(quick)).to(device), pixels.to(device)
    with torch.no_grad():
        return time_calls(lambda: network.encode(2 * pixels - 1), device, IMAGES, quick)


def decode_peer(quick: bool) -> List[float]:
    """Measure codes to images with taming's network."""
    (_, _, codes), device = build_vqgan(quick), NativeBackend().device
    network, codes = peer.TamingVQGAN(vqgan_params(quick)).to(device), codes.to(device)
    with torch.no_grad():
        return time_calls(lambda: network.decode(codes), device, IMAGES, quick)
