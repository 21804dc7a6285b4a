"""Options and their enumerations: type-strict, and frozen as soon as a loader or a model has them.

Most options have no effect on a CPU. They are checked and kept.
"""

import enum

import torch

# Which micro-batches' outputs a call returns. Default means Final for training and All for inference.
OutputMode = enum.Enum("OutputMode", "Final All Sum Default")
# How blocks become pipeline stages: one for each IPU, or one for each user_id in the order of first entry.
AutoStage = enum.Enum("AutoStage", "SameAsIpu AutoIncrement")
ReductionType = enum.Enum("ReductionType", "Sum Mean")
# Which dimension of (…, A, B) @ (B, C) is cut into pieces; the stand-in has C only.
MatMulSerializationMode = enum.Enum("MatMulSerializationMode", "OutputChannels")
DataLoaderMode = enum.Enum("DataLoaderMode", "Sync Async AsyncRebatched")


# ---- checks: each returns the value that it accepts


def check_int(name, value, least=1):
    if check_type(name, value, int) < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def check_type(name, value, kind):
    """Accept what is of this type, but no bool as an int."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be a {kind.__name__}, not {value!r}")
    return value


def check_number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, not {value!r}")
    return value


class Setter:
    """A method that checks one value, keeps it under the method's name and returns the options, so that calls chain."""

    def __init__(self, check, *more):
        self.check, self.more = check, more

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, settings, owner):
        def set_value(value, /):
            return settings._set(**{self.name: self.check(self.name, value, *self.more)})

        return set_value


class Settings:
    """Named values that only their setters change, until they are frozen."""

    def __init__(self, **values):
        self.__dict__.update(_values=values, _frozen=False)

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__}.{name} cannot be assigned; options are set by calling setters")

    def _set(self, **values):
        if self._frozen:
            raise AttributeError(f"cannot set {', '.join(values)}: a DataLoader or a model has the options already")
        self._values.update(values)
        return self

    def _freeze(self):
        self.__dict__["_frozen"] = True


class TrainingOptions(Settings):
    gradientAccumulation = Setter(check_int)
    setAutomaticLossScaling = Setter(check_type, bool)
    accumulationAndReplicationReductionType = Setter(check_type, ReductionType)
    gradient_accumulation = property(lambda self: self._values["gradientAccumulation"])

    def __init__(self):
        super().__init__(gradientAccumulation=1)


class PrecisionOptions(Settings):
    enableStochasticRounding = Setter(check_type, bool)
    setPartialsType = Setter(check_type, torch.dtype)


class TensorLocationSettings(Settings):
    useOnChipStorage = Setter(check_type, bool)
    useReplicatedTensorSharding = Setter(check_type, bool)


class TensorLocationOptions(Settings):
    setOptimizerLocation = Setter(check_type, TensorLocationSettings)


class PopartOptions(Settings):
    """Session options of PopART, each with the one type that it takes."""

    TYPES = {"outlineThreshold": float, "disableGradAccumulationTensorStreams": bool, "aliasZeroCopy": bool}

    def set(self, key, value):
        return self._set(**{key: check_type(f"_Popart.set({key!r})", value, self.TYPES[key])})


class DistributedOptions(Settings):
    processId = property(lambda self: self._values["id"])
    numProcesses = property(lambda self: self._values["count"])

    def __init__(self):
        super().__init__(id=0, count=1)

    def configureProcessId(self, process_id, num_processes):
        return self._set(id=process_id, count=num_processes)


class PipelinedExecution:
    """All stages work at once, each on its own micro-batch."""

    def __init__(self, auto_stage=AutoStage.SameAsIpu):
        self.auto_stage = check_type("PipelinedExecution", auto_stage, AutoStage)


class Options(Settings):
    deviceIterations = Setter(check_int)
    replicationFactor = Setter(check_int)
    autoRoundNumIPUs = Setter(check_type, bool)
    randomSeed = Setter(check_int, 0)
    outputMode = Setter(check_type, OutputMode)
    setExecutionStrategy = Setter(check_type, PipelinedExecution)
    setAvailableMemoryProportion = Setter(check_type, dict)
    enableExecutableCaching = Setter(check_type, str)
    enableProfiling = Setter(check_type, str)
    enableSyntheticData = Setter(check_type, bool)
    device_iterations = property(lambda self: self._values["deviceIterations"])
    replication_factor = property(lambda self: self._values["replicationFactor"])
    output_mode = property(lambda self: self._values["outputMode"])

    def __init__(self):
        super().__init__(deviceIterations=1, replicationFactor=1, outputMode=OutputMode.Default)
        self._set(setExecutionStrategy=PipelinedExecution())
        self.__dict__.update(
            Training=TrainingOptions(),
            Precision=PrecisionOptions(),
            TensorLocations=TensorLocationOptions(),
            Distributed=DistributedOptions(),
            _Popart=PopartOptions(),
        )

    def useOfflineIpuTarget(self, ipu_version=2):
        return self._set(offline=check_int("useOfflineIpuTarget's ipu_version", ipu_version))

    def _freeze(self):
        for part in (self.Training, self.Precision, self.TensorLocations, self.Distributed, self._Popart):
            part._freeze()
        super()._freeze()

    # What popdist.poptorch.Options changes: which processes share one gradient, and which IPUs a replica has.
    _instances = 1
    _partition = None

    def _sum_over_instances(self, tensors):
        """Sum tensors in place over all processes that train one model."""

    @property
    def _micro_batches(self):
        """The number of micro-batches that one call takes."""
        return self.device_iterations * self.Training.gradient_accumulation * self.replication_factor
