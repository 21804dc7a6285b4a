"""Small models and settings that several tests build."""

import argparse
from typing import Any, ClassVar, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import args
from models.dalle import DALLE

SIZES = {"dim": 32, "num_text_tokens": 58, "text_seq_len": 6, "depth": 2, "heads": 2, "dim_head": 16}
FLAGS = "--generated-data --precision fp32 --dataloader-workers 0"


def small_dalle(vae: Any, weight_std: Optional[float] = None, **changes: Any) -> DALLE:
    """Build a DALLE of two narrow layers; its weights are the same each time.

    Args:
        weight_std: if given, every parameter is drawn with this deviation, because LayerScale's 0.1 and zero biases
            would hide mistakes.
        changes: arguments of DALLE other than SIZES, or in their place.
    """
    torch.manual_seed(0)
    model = DALLE(vae=vae, **{**SIZES, **changes})
    if weight_std is not None:
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * weight_std
    return model


def train_settings(flags: str = "", device: str = "cpu", **changes: Any) -> argparse.Namespace:
    """Parse train.py's flags for generated data in fp32; `changes` overwrite parsed values."""
    settings = args.train_arguments([*FLAGS.split(), "--device", device, *flags.split()])
    vars(settings).update(changes)
    return settings


class WholePassStepper:
    """A Stepper that computes the whole sequence for every window, without a cache: slow, and the reference."""

    seconds: ClassVar = {}

    def __init__(self, dalle: DALLE, windows: Sequence[int] = (1,)):
        self.dalle, self.windows = dalle, windows

    def begin(self, text: Tensor, codes: Tensor) -> Tensor:
        """See models.sampling.Stepper."""
        self.text, self.codes = text, F.pad(codes, (0, self.dalle.image_seq_len - codes.shape[1] + max(self.windows)))
        logits = self.dalle(text, codes if codes.shape[1] else None)
        return logits[:, -1, self.dalle.num_text_tokens :]

    def next(self, codes: Tensor, places: Tensor) -> Tensor:
        """See models.sampling.Stepper."""
        places = places[:, None] + torch.arange(codes.shape[1])
        self.codes.scatter_(1, places - 1, codes)
        logits = self.dalle(self.text, self.codes[:, : self.dalle.image_seq_len])[:, self.dalle.text_seq_len :]
        found = places.clamp(max=self.dalle.image_seq_len - 1)[..., None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, found)[..., self.dalle.num_text_tokens :]
