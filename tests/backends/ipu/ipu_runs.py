"""Small runs on the IPU backend, shared by its tests."""

import backends
from tests.builders import samples, small_dalle, train_settings

TINY = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --dim-head 16 --text-seq-len 6 --batch-size 1"
TINY += " --gradient-accumulation 3 --ipus-per-replica 2 --layers-per-ipu 1,1 --no-async-dataloader"
TINY += " --learning-rate 1e-2"


def settings(*flags, device="ipu"):
    return train_settings(" ".join([TINY, *flags]), device)


def trainer_of(vae, *flags):
    backend = backends.for_training(settings(*flags))
    trainer, batch = backend.trainer(small_dalle(vae)), samples(backend.samples_per_step)
    trainer.compile(batch)
    return trainer, batch
