"""A strict stand-in for PopTorch 3.4, ours, so that the code for IPUs runs in tests on a CPU.

It knows the calls, arguments and types of the project's notes on PopTorch and refuses all others; it follows
PopTorch's semantics where application code can go wrong: weights on the device and on the host, what is fixed at
compile time, what a traced forward may do, blocks and stages, losses, optimizer attributes, output modes, the loaders'
buffers.

It is no simulator: nothing of an IPU's memory, speed or arithmetic is modelled, and which operators can be lowered is
checked for a few only. int64 is narrowed where it enters and leaves, not between operators; gelu is torch's; replicas
share buffers; torch.no_grad() within forward is obeyed; automatic loss scaling, stochastic rounding, recomputation,
partials and memory options have no effect. Executor attributes beginning with an underscore are its own business.
"""

from . import optim
from .dataloader import DataLoader
from .enums import (
    AutoStage,
    ConnectionType,
    DataLoaderMode,
    MatMulSerializationMode,
    MeanReductionStrategy,
    OutputMode,
    ReductionType,
    SharingStrategy,
)
from .executor import inferenceModel, trainingModel
from .ops import (
    BeginBlock,
    Block,
    cond,
    custom_op,
    dynamic_slice,
    dynamic_update,
    for_loop,
    identity_loss,
    ipu_print_tensor,
    recomputationCheckpoint,
    serializedMatMul,
    set_available_memory,
)
from .options import Options, PipelinedExecution, ShardedExecution, TensorLocationSettings

__version__ = "3.4.0-standin"
IS_STANDIN = True

__all__ = [
    "AutoStage",
    "BeginBlock",
    "Block",
    "ConnectionType",
    "DataLoader",
    "DataLoaderMode",
    "MatMulSerializationMode",
    "MeanReductionStrategy",
    "Options",
    "OutputMode",
    "PipelinedExecution",
    "ReductionType",
    "ShardedExecution",
    "SharingStrategy",
    "TensorLocationSettings",
    "cond",
    "custom_op",
    "dynamic_slice",
    "dynamic_update",
    "for_loop",
    "identity_loss",
    "inferenceModel",
    "ipuHardwareIsAvailable",
    "ipu_print_tensor",
    "optim",
    "recomputationCheckpoint",
    "serializedMatMul",
    "set_available_memory",
    "trainingModel",
]


def ipuHardwareIsAvailable():
    return False
