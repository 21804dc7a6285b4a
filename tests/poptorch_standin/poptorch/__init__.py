"""A strict stand-in for PopTorch 3.4, written for this project; see README.md in the folder above."""

from . import optim
from .dataloader import DataLoader
from .executor import inferenceModel, trainingModel
from .ops import (
    BeginBlock,
    dynamic_update,
    for_loop,
    identity_loss,
    recomputationCheckpoint,
    serializedMatMul,
)
from .options import (
    AutoStage,
    DataLoaderMode,
    MatMulSerializationMode,
    Options,
    OutputMode,
    PipelinedExecution,
    ReductionType,
    TensorLocationSettings,
)

__version__ = "3.4.0-standin"
IS_STANDIN = True

__all__ = [
    "AutoStage",
    "BeginBlock",
    "DataLoader",
    "DataLoaderMode",
    "MatMulSerializationMode",
    "Options",
    "OutputMode",
    "PipelinedExecution",
    "ReductionType",
    "TensorLocationSettings",
    "dynamic_update",
    "for_loop",
    "identity_loss",
    "inferenceModel",
    "ipuHardwareIsAvailable",
    "optim",
    "recomputationCheckpoint",
    "serializedMatMul",
    "trainingModel",
]


def ipuHardwareIsAvailable():
    return False
