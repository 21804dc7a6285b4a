"""Measures L16: training and drawing, beside dalle-pytorch and beside the machine's limits, all in one run.

    python -m benchmarks                    about two minutes on two cores
    python -m benchmarks --peer             with dalle-pytorch, which takes minutes for a picture
    python -m benchmarks --quick --peer     a network of two layers, to see that everything runs

Prints a table and writes results.json. Figures are medians; what is compared ran in the same process.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import args
from backends.native import NativeBackend
from benchmarks import peer
from models.dalle import DALLE

PEER_BATCH = 8  # dalle-pytorch is not asked for more at once: eight pictures take it ten minutes
TEXT_TOKENS = 8192  # of bpe/bpe_yttm_vocab.txt


class Codes:
    """All that a DALLE trained from codes wants of the official VQGAN."""

    image_size, num_layers, num_tokens = 256, 4, 1024


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers instead of sixteen")
    parser.add_argument("--peer", action="store_true", help="measure dalle-pytorch 1.6.6 as well")
    parser.add_argument("--batches", type=args.COUNT, nargs="+", default=[1, 8, 32], help="pictures drawn at once")
    parser.add_argument("--output-dir", default="output/benchmarks", help="folder for results.json")
    flags = parser.parse_args(argv)
    settings = args.train_arguments(["--config", "L16", "--device", "auto", "--generated-data"])
    sizes = {
        "dim": settings.hidden_size,
        "num_text_tokens": TEXT_TOKENS,
        "text_seq_len": settings.text_seq_len,
        "depth": 2 if flags.quick else settings.num_hidden_layers,
        "heads": settings.num_attention_heads,
        "dim_head": settings.dim_head,
        "attn_types": settings.attn_types,
    }
    torch.manual_seed(0)
    ours, theirs = DALLE(vae=Codes(), **sizes), None
    if flags.peer:
        theirs = peer.load() or parser.error("--peer: dalle-pytorch is not installed; run_tests.sh installs it")
        theirs = peer.model_like(theirs, Codes(), **sizes)
    backend = backend_of(settings, batch_size=1)
    limits = machine_limits(backend)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"limits in {backend.precision}: {limits['gflops']:.0f} GFLOP/s, reading {limits['gbytes']:.1f} GB/s")
    rows = []
    measured = [lambda: training(settings, ours, theirs, limits)]
    measured += [lambda batch=batch: drawing(settings, ours, theirs, batch, limits) for batch in flags.batches]
    for measure in measured:
        found = measure()
        rows.append(found)
        beside = f"   {found['ratio']:6.1f} × dalle-pytorch ({found['peer']:.3g})" if found["peer"] else ""
        line = f"{found['what']:20} {found['ours']:8.3f} {found['unit']:10} {found['of_limit']:5.2f} × the limit's time"
        print(line + beside, flush=True)
    path = Path(flags.output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"precision": backend.precision, "torch": torch.__version__, "limits": limits, "rows": rows}
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    print(f"wrote {path}")


def backend_of(settings, **changes):
    one = {"gradient_accumulation": 1, "replication_factor": 1, "loss_scaling": 1, "dataloader_workers": 0}
    return NativeBackend(argparse.Namespace(**{**vars(settings), **one, **changes}))


def median_seconds(function, repeats=3):
    """Of `repeats` calls, after one that does not count."""
    function()
    return statistics.median(seconds(function) for _ in range(repeats))


def seconds(function):
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def machine_limits(backend, side=2048):
    """Matrix products in the precision that is used, and reading memory."""
    dtype = torch.float32 if backend.precision == "fp32" else torch.bfloat16
    one, other = (torch.randn(side, side, device=backend.device).to(dtype) for _ in range(2))
    large = torch.randn(64 * 2**20, device=backend.device)
    return {
        "gflops": 2 * side**3 / median_seconds(lambda: one @ other, 7) / 1e9,
        "gbytes": 4 * large.numel() / median_seconds(large.sum, 7) / 1e9,
        "bytes": torch.finfo(dtype).bits // 8,
    }


def weights_a_position(model):
    """What every position is multiplied with: the matrices of the layers, and the head's part for codes."""
    layers = sum(p.numel() for p in model.transformer.layers.parameters() if p.dim() == 2)
    return layers + model.num_image_tokens * model.text_emb.weight.shape[1]


def some_batch(model, rows):
    text = torch.randint(1, TEXT_TOKENS, (rows, model.text_seq_len))
    return text, torch.randint(0, model.num_image_tokens, (rows, model.image_seq_len))


def training(settings, ours, theirs, limits, rows=4):
    trainer = backend_of(settings, batch_size=rows, learning_rate=1e-5).trainer(ours)
    batch = some_batch(ours, rows)
    took = median_seconds(lambda: trainer.step([batch])) / rows
    head = (ours.num_text_tokens - ours.num_image_tokens) * ours.text_emb.weight.shape[1]  # at text positions only
    products = (ours.text_seq_len + ours.image_seq_len) * weights_a_position(ours) + ours.text_seq_len * head
    limit = 6 * products / limits["gflops"] / 1e9  # forward and twice that backward, two operations a product
    peer_rate = None
    if theirs is not None:
        optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-5)

        def step():
            theirs(*batch, return_loss=True).backward()
            optimizer.step()
            optimizer.zero_grad()

        peer_rate = rows / median_seconds(step, 2)
    return row(f"training, batch {rows}", 1 / took, "samples/s", took / limit, peer_rate, larger_is_better=True)


def drawing(settings, ours, theirs, batch, limits):
    """Codes only, the caption shared, top-k 0.99, as dalle-pytorch's generate_images with its cache."""
    sampler = backend_of(settings, batch_size=batch).sampler(ours)
    text = some_batch(ours, 1)[0].repeat(batch, 1)
    took = median_seconds(lambda: sampler(text, generator=torch.Generator().manual_seed(0)), 3) / batch
    weights = weights_a_position(ours)
    read = limits["bytes"] * weights / limits["gbytes"] / 1e9
    multiplied = 2 * batch * weights / limits["gflops"] / 1e9
    limit = ours.image_seq_len * max(read, multiplied) / batch
    peer_took = None
    if theirs is not None and batch <= PEER_BATCH:
        theirs.eval()
        peer_took = seconds(lambda: theirs.generate_images(text, filter_thres=0.99, use_cache=True)) / batch
    return row(f"drawing, {batch} at once", took, "s/picture", took / limit, peer_took, larger_is_better=False)


def row(what, ours, unit, of_limit, peer_value, larger_is_better):
    ratio = peer_value and (ours / peer_value if larger_is_better else peer_value / ours)
    return {"what": what, "ours": ours, "unit": unit, "of_limit": of_limit, "peer": peer_value, "ratio": ratio}


if __name__ == "__main__":
    main()
