"""A strict stand-in for PopTorch 3.4, written for this project; see README.md in the folder above."""

from . import optim
from .dataloader import DataLoader
from .executor import inferenceModel, trainingModel
from .machine import MACHINE, Error, RecoverableError, UnrecoverableError
from .ops import BeginBlock, dynamic_update, for_loop, identity_loss, recomputationCheckpoint, serializedMatMul
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

__all__ = ["MACHINE", "AutoStage", "BeginBlock", "DataLoader", "DataLoaderMode", "Error", "MatMulSerializationMode"]
__all__ += [
    "Options",
    "OutputMode",
    "PipelinedExecution",
    "RecoverableError",
    "ReductionType",
    "TensorLocationSettings",
]
__all__ += ["UnrecoverableError", "dynamic_update", "for_loop", "identity_loss", "inferenceModel", "optim"]
__all__ += ["ipuHardwareIsAvailable", "recomputationCheckpoint", "serializedMatMul", "trainingModel"]


def ipuHardwareIsAvailable():
    return False
