"""Small models and settings that several tests build."""

import argparse
from typing import Any, Optional

import torch
from torch import Tensor

import args
from models.dalle import DALLE
from models.sampling import Stepper

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


class WholePassStepper(Stepper):
    """A Stepper that computes the whole sequence for every code, without a cache: slow, and the reference."""

    def begin(self, text: Tensor, codes: Tensor) -> Tensor:
        """See models.sampling.Stepper."""
        self.text, self.codes = text, codes
        return self.dalle(text, codes if codes.shape[1] else None)[:, -1, self.dalle.num_text_tokens :]

    def next(self, codes: Tensor, places: Tensor) -> Tensor:
        """See models.sampling.Stepper."""
        return self.begin(self.text, torch.cat((self.codes, codes), dim=1))[:, None]
