"""The sections of gpu.sh: python -m benchmarks.gpu FOLDER SECTION [--rehearse]. Results go to FOLDER/results.jsonl."""

import contextlib
import copy
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import torch

from backends.native import compilation
from backends.native.backend import NativeBackend, NativeTrainingBackend
from backends.native.gpu_sampler import find_uniform_numbers
from benchmarks import limits, networks
from models.dalle import DALLE
from models.packed_sampler import CachedStepper
from models.sampling import Sampling, sample_codes
from utils.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
FOLDER, SECTION = Path(sys.argv[1]), sys.argv[2]
REHEARSAL = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSAL else "cuda"
PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
MARKS = "<!-- gpu.sh: begin -->", "<!-- gpu.sh: end -->"


class SmallCodes:
    """What a DALLE needs to know of an image tokenizer of 8 × 8 codes."""

    image_size, num_layers, num_tokens = 64, 3, 64


def note(name: str, **figures: Any) -> None:
    """Add a line to the results; figures with `ok` are checks."""
    figures = {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in figures.items()}
    with open(FOLDER / "results.jsonl", "a") as file:
        file.write(json.dumps({"section": SECTION, "name": name, **figures}, default=str) + "\n")
    print(" ", name, *(f"{key}={value}" for key, value in figures.items()), flush=True)


@contextlib.contextmanager
def attempt(name: str) -> Iterator[None]:
    """Note an error of the block as a failed check and continue."""
    try:
        yield
    except Exception as error:
        note(name, ok=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def seconds_of(function: Callable[[], Any]) -> float:
    """Return the median seconds of a call."""
    return statistics.median(limits.time_calls(function, torch.device(DEVICE), quick=REHEARSAL, enough_seconds=4.0))


def peak_gb() -> float:
    """Return the GPU's peak memory since the last call, in GB."""
    if REHEARSAL:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def trainer_of(model: DALLE, rows: int, *flags: Any, device: str = DEVICE, precision: str = "fp32") -> Any:
    """Return a trainer for micro-batches of `rows`."""
    words = ("--device", device, "--precision", precision, "--batch-size", rows, "--max-grad-norm", 1)
    return NativeTrainingBackend(networks.parse_settings(REHEARSAL, *words, *flags)).trainer(model)


def small(pattern: str) -> DALLE:
    """Return a small DALLE whose layers have a visible effect."""
    torch.manual_seed(0)
    sizes = dict(dim=64, num_text_tokens=60, text_seq_len=10, depth=4, heads=2, dim_head=32)
    model = DALLE(vae=SmallCodes(), attn_types=tuple(pattern.split(",")), **sizes)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.add_(0.5)
    return model


def samples_of(model: DALLE, rows: int) -> Any:
    """Return text and codes, some captions padded."""
    random = torch.Generator().manual_seed(rows)
    text = torch.randint(1, 60, (rows, model.text_seq_len), generator=random)
    text[::2, model.text_seq_len // 2 :] = 0
    return text, torch.randint(0, model.num_image_tokens, (rows, model.image_seq_len), generator=random)


def machine() -> None:
    """Note versions and rates."""
    device = torch.device(DEVICE)
    name = "CPU" if REHEARSAL else torch.cuda.get_device_name()
    note("machine", gpu=name, torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0])
    for precision in ("bf16", "fp16", "fp32")[:: 2 if REHEARSAL else 1]:
        with attempt(precision):
            rate = limits.measure_matrix_rate(precision, device, REHEARSAL)
            note(f"matrix products in {precision}", tflops=rate / 1e12)
    note("memory", tb_per_s=limits.measure_read_rate(device) / 1e12)
    tensor = torch.zeros(64, device=device)
    note("an eager operation", microseconds=seconds_of(lambda: [tensor.add_(1) for _ in range(1000)]) * 1e3)


def equality() -> None:
    """Compare with the CPU: losses and updates, sampled codes, encoded images."""
    for pattern in (*PATTERNS, ",".join(PATTERNS)):
        text, codes = samples_of(small(pattern), 6)
        for precision, optimizer, most in (("fp32", "AdamW", 1e-4), ("fp32", "Muon", 1e-4), ("bf16", "AdamW", 2e-2)):
            with attempt(f"training {pattern} {precision} {optimizer}"):
                found = []
                for device, used in (("cpu", "fp32"), (DEVICE, precision)):
                    trainer = trainer_of(small(pattern), 6, "--optimizer", optimizer, device=device, precision=used)
                    trainer.set_lr(1e-3)
                    found.append([trainer.step([(text, codes)])["total"] for _ in range(3)])
                off = max(abs(ours / expected - 1) for expected, ours in zip(*found))
                note(f"training {pattern} {precision} {optimizer}", ok=off < most, off=off)
        for name, sampling in (("plain", Sampling()), ("guided", Sampling(None, 0.9, 0.9, 1.5))):
            with attempt(f"sampling {pattern} {name}"):
                model = small(pattern).eval()
                expected = sample_codes(model, text, CachedStepper(model), sampling, seeded(6))
                ours = NativeBackend(DEVICE, "fp32").sampler(copy.deepcopy(model), 6)(
                    text, sampling, generator=seeded(6)
                )
                same = float((ours == expected).float().mean())
                note(f"sampling {pattern} {name}", ok=same > 0.97, same=same)
    with attempt("encoding"):
        vae, smooth = networks.build_vqgan(REHEARSAL)[0], smooth_images()
        changed = NativeBackend(DEVICE).encode(vae)(smooth) != NativeBackend("cpu").encode(vae)(smooth)
        note("encoding in fp32", ok=float(changed.float().mean()) < 2e-3, changed=float(changed.float().mean()))
    if not REHEARSAL:
        with attempt("random numbers"):
            note("the CPU's random numbers", ok=find_uniform_numbers(torch.device(DEVICE)) is not None)


def smooth_images() -> torch.Tensor:
    """Return a few images for the VQGAN, which differ from each other."""
    vae, pixels, _ = networks.build_vqgan(REHEARSAL)
    return torch.nn.functional.interpolate(pixels[:, :, ::16, ::16], size=vae.image_size, mode="bicubic")


def training() -> None:
    """Measure L16's updates."""
    precision = NativeBackend(DEVICE).precision
    for rows, flags in ((2, ("--gradient-accumulation", 16)), (32, ()), (128, ()), (32, ("--optimizer", "Muon"))):
        rows = min(rows, 4) if REHEARSAL else rows
        name = " ".join(["training, batch", str(rows), *map(str, flags)])
        with attempt(name):
            peak_gb()
            _, model = networks.build_ours(REHEARSAL)
            trainer = trainer_of(model, rows, *flags, precision=precision)
            count = trainer.backend.samples_per_step
            batch = list(zip(*(part.split(rows) for part in networks.random_batch(model, count))))
            began = time.perf_counter()
            trainer.compile(iter(batch))
            trainer.step(batch)
            began = time.perf_counter() - began
            work = {"operations": limits.count_training_operations(model), "precision": precision}
            seconds = seconds_of(lambda trainer=trainer, batch=batch: trainer.step(batch)) / count  # type: ignore[misc]
            limit, _ = limits.find_limit(work, torch.device(DEVICE), REHEARSAL)
            rows_at_once = trainer.samples_at_once()
        note(name, samples_per_s=1 / seconds, of_limit=limit / seconds, first_s=began, rows=rows_at_once, gb=peak_gb())


def generation() -> None:
    """Measure sampling L16's codes, and the noise for it alone."""
    backend = NativeBackend(DEVICE)
    for images in (1, 8, 64, 256):
        images = min(images, 2) if REHEARSAL else images
        name = f"codes of {images} images at once"
        with attempt(name):
            peak_gb()
            _, model = networks.build_ours(REHEARSAL)
            text = networks.random_batch(model, 1)[0]
            seconds, work = networks.time_sampling(backend, model, text, Sampling(), images, REHEARSAL)
            limit, _ = limits.find_limit(work or {}, torch.device(DEVICE), REHEARSAL)
            figures = {"images_per_s": 1 / min(seconds), "of_limit": limit / min(seconds), "gb": peak_gb()}
            stepper = backend.sampler(model, images).stepper  # type: ignore[attr-defined]
            noise: Any = lambda count=images, s=stepper: s.noise(count, seeded(count))  # noqa: E731
            note(name, **figures, noise_s=seconds_of(noise))


def seeded(count: int) -> List[torch.Generator]:
    """Return a generator for each image."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def vqgan() -> None:
    """Measure the official VQGAN's encoder and decoder, as they are and compiled; compare their codes."""
    networks.IMAGES = 2 if REHEARSAL else 64
    codes = []
    for how, compilation.COMPILED_FROM in (("", 10**9), (", compiled", 0)):
        for name, function in (("encoding 256 × 256 in fp32", networks.encode), ("decoding", networks.decode)):
            with attempt(name + how):
                peak_gb()
                seconds, work = function(REHEARSAL)
                limit, _ = limits.find_limit(work or {}, torch.device(DEVICE), REHEARSAL)
                note(name + how, images_per_s=1 / min(seconds), of_limit=limit / min(seconds), gb=peak_gb())
        with attempt(f"codes{how}"):
            codes.append(NativeBackend(DEVICE).encode(networks.build_vqgan(REHEARSAL)[0])(smooth_images()))
    changed = float((codes[0] != codes[-1]).float().mean())
    note("codes of a compiled encoder", ok=len(codes) == 2 and changed < 1e-3, changed=changed)


def demo() -> None:
    """Run the demo's commands from images to an evaluated checkpoint, and the bundled model."""
    few = REHEARSAL
    with tempfile.TemporaryDirectory() as place:
        data, vae, out = f"{place}/shapes", f"{place}/vqgan", f"{place}/ckpt"
        steps = 12 if few else 800
        train = ["train.py", "--config", "demo", "--input-folder", f"{data}/train", "--vae-path", vae]
        newest = f"{out}/newest"
        prompt = ["--text", "a small red circle above a large blue square", "--num_images", 4 if few else 64]
        commands: List[List[Any]] = [
            ["-m", "data.shapes", "--out", data, "--pictures", 200 if few else 6000, "--val", 40],
            ["train_vqgan.py", "--config", "vqgan_demo", "--input-folder", f"{data}/train"]
            + ["--validation-folder", f"{data}/val", "--output-dir", vae]
            + (["--max-steps", 12, "--continuous-steps", 4] if few else []),
            [*train, "--checkpoint-output-dir", out, "--max-steps", steps],
            ["evaluate.py", "--dalle_path", newest, "--prompts", 8 if few else 400, "--outputs-dir", place],
            ["generate.py", *prompt, "--dalle_path", newest, "--rank", 2, "--outputs_dir", place],
            ["generate.py", "--text", "a small cat left of a large pizza", "--outputs_dir", place],
        ]
        for words in commands:
            machine_flags = [] if "-m" in words else ["--device", DEVICE]
            saved = sorted(Path(out).glob("*.pt"), key=lambda path: path.stat().st_mtime)
            words = [saved[-1] if word == newest and saved else word for word in words]
            began = time.perf_counter()
            ended = subprocess.run(
                [sys.executable, *map(str, [*words, *machine_flags])], cwd=ROOT, capture_output=True, text=True
            )
            said = re.findall(r"[^\n]*(?:accuracy|follow|PSNR|throughput)[^\n]*", ended.stdout)[-1:]
            error = ended.stderr.splitlines()[-1:] if ended.returncode else []
            taken = time.perf_counter() - began
            note(str(words[0 if words[0] != "-m" else 1]), ok=not ended.returncode, seconds=taken, said=said + error)
            if ended.returncode:
                break


def table() -> None:
    """Write table.md, and docs/performance.md if this was a GPU; print what failed or was skipped."""
    with open(FOLDER / "results.jsonl") as file:
        results: List[Dict[str, Any]] = [json.loads(line) for line in file]
    found = {line["name"]: line for line in results}
    about = found.get("machine", {})
    rows = [f"Measured by `bash benchmarks/gpu.sh` on {about.get('gpu')} with torch {about.get('torch')}.", ""]
    rows += ["| | rate | share of the limit | memory |", "|---|---|---|---|"]
    for line in results:
        rate = line.get("samples_per_s") or line.get("images_per_s")
        if rate:
            unit = "samples/s" if "samples_per_s" in line else "images/s"
            share = f"{line['of_limit']:.0%}" if "of_limit" in line else ""
            rows.append(f"| {line['name']} | {rate:g} {unit} | {share} | {line.get('gb', 0):.1f} GB |")
    checks = [line for line in results if "ok" in line]
    failed = [line for line in checks if not line["ok"]]
    rows += ["", f"{len(checks) - len(failed)} of {len(checks)} checks passed."]
    (FOLDER / "table.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))
    for line in [*failed, *(line for line in results if "skipped" in line)]:
        print("failed:" if "ok" in line else "skipped:", line)
    path = ROOT / "docs" / "performance.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    if not REHEARSAL and begin:
        with atomic_write(path, text=True) as file:
            file.write("\n".join([before + begin, "", *rows, "", MARKS[1] + rest.partition(MARKS[1])[2]]))


if SECTION == "skipped":
    note("section", skipped=" ".join(sys.argv[3:]))
elif SECTION == "table":
    table()
elif not REHEARSAL and not torch.cuda.is_available():
    note("section", skipped=f"{SECTION}: PyTorch sees no CUDA GPU; --rehearse tries the script on a CPU")
else:
    {part.__name__: part for part in (machine, equality, training, generation, vqgan, demo)}[SECTION]()
