"""The enumerations that options and calls take. Members have names only: what PopTorch numbers them is not modelled."""

import enum


class OutputMode(enum.Enum):
    """Which micro-batches' outputs a call brings back. Default is Final for training and All for inference."""

    Final = enum.auto()
    EveryN = enum.auto()
    All = enum.auto()
    Sum = enum.auto()
    Default = enum.auto()


class AutoStage(enum.Enum):
    """How blocks become pipeline stages: one for each IPU, or one for each user_id in the order of their entry."""

    SameAsIpu = enum.auto()
    AutoIncrement = enum.auto()


class ReductionType(enum.Enum):
    Sum = enum.auto()
    Mean = enum.auto()


class MeanReductionStrategy(enum.Enum):
    """Whether a mean is kept at every accumulation step or made of the sum after the last."""

    Running = enum.auto()
    Post = enum.auto()


class MatMulSerializationMode(enum.Enum):
    """Which dimension of (…, A, B) @ (B, C) is cut: A InputChannels, B ReducingDim, C OutputChannels."""

    InputChannels = enum.auto()
    ReducingDim = enum.auto()
    OutputChannels = enum.auto()
    Disabled = enum.auto()


class DataLoaderMode(enum.Enum):
    Sync = enum.auto()
    Async = enum.auto()
    AsyncRebatched = enum.auto()


class SharingStrategy(enum.Enum):
    SharedMemory = enum.auto()
    FileSystem = enum.auto()
    Fork = enum.auto()
    ForkServer = enum.auto()


class ConnectionType(enum.Enum):
    """When a device is taken: at compile time, at the first call, or never (which leaves compiling only)."""

    Always = enum.auto()
    OnDemand = enum.auto()
    Never = enum.auto()
