"""The same weights and the same batches on the native and the IPU backend: the same losses over ten steps.

With the Poplar SDK this runs on IPUs, or with POPTORCH_IPU_MODEL=1 on its IPU model; elsewhere on the stand-in of
tests/poptorch_standin. The stand-in computes as PyTorch does; an IPU has gelu's tanh approximation and its own order of
sums, hence the wider tolerance there.
"""

import copy

import pytest
import torch

import args
import backends
from data.loader import EpochOrder, GeneratedDataset, RunOrder
from models.dalle import DALLE

STEPS = 10
STANDIN_TOLERANCE = 1e-5
IPU_TOLERANCE = 2e-3
SIZES = "--hidden-size 32 --num-attention-heads 2 --dim-head 16 --text-seq-len 8 --sandwich-norm"
SIZES += " --attn-types full,axial_row,axial_col,conv_like --weight-decay 0.1 --adam-betas 0.9,0.98"
# What an IPU does differently from a CPU for the same batch: one stage, and a pipeline that comes back to IPU 0.
RUNS = {
    "one IPU": "--num-hidden-layers 2 --batch-size 2 --gradient-accumulation 2",
    "pipeline": "--num-hidden-layers 4 --batch-size 1 --gradient-accumulation 9 --ipus-per-replica 4 "
    "--layers-per-ipu 0,1,2,1 --cls-ipu-id 0 --embedding-serialization-factor 4",
    "replicas": "--num-hidden-layers 2 --batch-size 1 --gradient-accumulation 3 --ipus-per-replica 2 "
    "--layers-per-ipu 1,1 --replication-factor 2 --enable-rts",
    "AdamW, clipped": "--num-hidden-layers 1 --batch-size 2 --gradient-accumulation 2 --optimizer AdamW "
    "--max-grad-norm 0.05",
}


@pytest.fixture
def poptorch(request):
    """The SDK's, where there is one; else the stand-in."""
    try:
        import poptorch
    except ImportError:
        return request.getfixturevalue("poptorch_standin")
    return poptorch


def losses(device, flags, vae, pixels):
    """Of ten steps, with a learning rate that moves; and the weights at the end."""
    settings = args.train_arguments(
        [*SIZES.split(), *flags.split(), "--generated-data", "--precision", "fp32", "--device", device]
        + ["--dataloader-workers", "0", "--no-async-dataloader", *(["--no-codes-cache", "--byteio"] if pixels else [])]
    )
    torch.manual_seed(0)
    hparams = {"dim": 32, "heads": 2, "dim_head": 16, "text_seq_len": 8, "num_text_tokens": 56, "sandwich_norm": True}
    model = DALLE(vae=vae, depth=settings.num_hidden_layers, attn_types=settings.attn_types, **hparams)
    backend = backends.for_training(settings)
    sizes = {"text_seq_len": 8, "num_text_tokens": 56, "image_size": 32, "byteio": pixels}
    sizes.update({} if pixels else {"num_image_codes": vae.num_tokens, "image_seq_len": 16})
    dataset = GeneratedDataset(2 * backend.samples_per_step, **sizes)
    order = RunOrder(EpochOrder(len(dataset), backend.samples_per_step), 0, STEPS)
    trainer, found = backend.trainer(model), []
    for step, batch in enumerate(backend.loader(dataset, order)):
        if not step:
            batch = list(batch)
            trainer.compile(batch)
        trainer.set_lr(1e-2 / (1 + step))
        found.append(trainer.step(batch))
    return found, trainer.state_dict()["weights"]


@pytest.mark.parametrize("run, pixels", [*((run, False) for run in RUNS), ("one IPU", True)])
def test_same_losses_on_cpu_and_ipu(run, pixels, poptorch, tiny_vae):
    tolerance = STANDIN_TOLERANCE if getattr(poptorch, "IS_STANDIN", False) else IPU_TOLERANCE
    expected, native_weights = losses("cpu", RUNS[run], copy.deepcopy(tiny_vae), pixels)
    found, weights = losses("ipu", RUNS[run], copy.deepcopy(tiny_vae), pixels)
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=tolerance)
    assert expected[0]["total"] > expected[-1]["total"] + 10 * tolerance  # something was learned
    torch.testing.assert_close(dict(weights), dict(native_weights), atol=100 * tolerance, rtol=0)
