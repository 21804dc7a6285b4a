"""Small runs on the IPU backend, shared by its tests."""

import torch

import args
import backends
from models.dalle import DALLE

TINY = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --dim-head 16 --text-seq-len 6 --batch-size 1"
TINY += " --gradient-accumulation 3 --ipus-per-replica 2 --layers-per-ipu 1,1 --dataloader-workers 0"
TINY += " --no-async-dataloader --generated-data --precision fp32 --learning-rate 1e-2"
SIZES = {"dim": 32, "num_text_tokens": 58, "text_seq_len": 6, "depth": 2, "heads": 2, "dim_head": 16}


def settings(*flags, device="ipu"):
    return args.train_arguments([*TINY.split(), "--device", device, *" ".join(flags).split()])


def small_dalle(vae, **changes):
    torch.manual_seed(0)
    return DALLE(vae=vae, **{**SIZES, **changes})


def samples(count, seed=0):
    """text int64 (count, 6) and codes int64 (count, 16)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 58, (count, 6), generator=random), torch.randint(0, 32, (count, 16), generator=random)


def trainer_of(vae, *flags):
    """A compiled trainer and a batch of what one step takes."""
    backend = backends.select(settings(*flags))
    trainer, batch = backend.trainer(small_dalle(vae)), samples(backend.samples_per_step)
    trainer.compile(batch)
    return trainer, batch
