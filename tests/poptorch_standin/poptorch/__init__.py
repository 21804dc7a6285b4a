"""A strict stand-in for PopTorch 3.4, written for this project; see README.md in the folder above."""

# ruff: noqa: F401  # what PopTorch's package offers

from . import optim, options
from .dataloader import DataLoader
from .executor import inferenceModel, trainingModel
from .machine import MACHINE, Error, RecoverableError
from .ops import BeginBlock, dynamic_update, for_loop, identity_loss, recomputationCheckpoint, serializedMatMul
from .options import AutoStage, DataLoaderMode, MatMulSerializationMode, Options, OutputMode, PipelinedExecution

ReductionType, TensorLocationSettings = options.ReductionType, options.TensorLocationSettings
__version__ = "3.4.0-standin"
IS_STANDIN = True
