"""Trains a VQGAN, the image tokenizer of train.py, on a folder of pictures.

    python train_vqgan.py --config vqgan_demo
    python train_vqgan.py --config vqgan_photos --input-folder my_photos --output-dir output/my_vqgan

Pictures need no captions. --output-dir gets vqgan.ckpt and vqgan.yaml, in the format of taming-transformers, for
train.py's --vae-path; and reconstructions.png, held-out pictures above what comes back of them.
"""

import logging
import math
import os
import sys
from pathlib import Path

from args import vqgan_arguments

LOG = logging.getLogger("minidalle")

MEMORY_BYTES = 2 << 30  # pictures up to this much together are decoded once and kept
HELD_OUT = 256  # at most so many pictures are measured
GRID_PICTURES = 8
LOSS_CHECK_STEPS = 20  # between looks at the loss, each of which waits for the device


def main(argv=None):
    settings = vqgan_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run = Run(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        run.train()
    except KeyboardInterrupt:
        run.save_unfinished()
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
