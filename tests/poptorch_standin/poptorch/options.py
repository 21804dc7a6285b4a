"""Options and its parts: what API.md lists and nothing else, type-strict, frozen once a loader or a model has them.

Most options have no effect on a CPU; they are checked and kept, and make part of the executable's hash.
"""

import copy

from . import checks
from .enums import AutoStage, ConnectionType, MeanReductionStrategy, OutputMode, ReductionType

# PopART's session options that an application may want to set, and the one type that each takes.
POPART_TYPES = {
    "outlineThreshold": float,
    "outlineSequenceBreakCost": float,
    "enableOutlining": bool,
    "disableGradAccumulationTensorStreams": bool,
    "accumulateOuterFragmentSettings.schedule": int,
    "accumulateOuterFragmentSettings.excludedVirtualGraphs": list,
    "scheduleNonWeightUpdateGradientConsumersEarly": bool,
    "decomposeGradSum": bool,
    "saveInitializersToFile": str,
    "defaultPrefetchBufferingDepth": int,
    "rearrangeAnchorsOnHost": bool,
    "enableStableNorm": bool,
    "ensureFp32LossScaleTensor": bool,
    "instrumentWithHardwareCycleCounter": bool,
}


class Settings:
    """Named values that their own setters alone change, until they are frozen."""

    def __init__(self, **values):
        self.__dict__.update(_values=values, _frozen=False)

    def __setattr__(self, name, value):
        raise AttributeError(
            f"{type(self).__name__}.{name} cannot be assigned; options are set by calling their setters"
        )

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle ask for such
            raise AttributeError(name)
        raise AttributeError(f"{type(self).__name__} has no {name}: API.md does not list it")

    def _set(self, **values):
        if self._frozen:
            raise AttributeError(
                f"cannot set {', '.join(values)}: these options are frozen, a DataLoader or a model has them already"
            )
        self._values.update(values)
        return self

    def _freeze(self):
        self.__dict__["_frozen"] = True

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={self._values[name]!r}' for name in sorted(self._values))})"


class TrainingOptions(Settings):
    def __init__(self):
        super().__init__(accumulation=1, reduction=ReductionType.Mean, strategy=None, automatic_loss_scaling=False)

    @property
    def gradient_accumulation(self):
        return self._values["accumulation"]

    def gradientAccumulation(self, gradient_accumulation):
        return self._set(accumulation=checks.whole("gradientAccumulation", gradient_accumulation))

    def accumulationAndReplicationReductionType(self, reduction_type):
        name = "accumulationAndReplicationReductionType"
        return self._set(reduction=checks.member(name, reduction_type, ReductionType))

    def setMeanAccumulationAndReplicationReductionStrategy(self, mean_reduction_strategy):
        name = "setMeanAccumulationAndReplicationReductionStrategy"
        return self._set(strategy=checks.member(name, mean_reduction_strategy, MeanReductionStrategy))

    def setAutomaticLossScaling(self, enabled):
        return self._set(automatic_loss_scaling=checks.of_type("setAutomaticLossScaling", enabled, bool))


class PrecisionOptions(Settings):
    def enableStochasticRounding(self, enabled):
        return self._set(stochastic_rounding=checks.of_type("enableStochasticRounding", enabled, bool))

    def setPartialsType(self, dtype):
        return self._set(partials=checks.precision("setPartialsType", dtype))

    def enableFloatingPointExceptions(self, enabled):
        return self._set(exceptions=checks.of_type("enableFloatingPointExceptions", enabled, bool))

    def runningStatisticsAlwaysFloat(self, enabled):
        return self._set(statistics_float=checks.of_type("runningStatisticsAlwaysFloat", enabled, bool))


class TensorLocationSettings(Settings):
    def useOnChipStorage(self, use):
        return self._set(on_chip=checks.of_type("useOnChipStorage", use, bool))

    def useReplicatedTensorSharding(self, use):
        return self._set(sharded=checks.of_type("useReplicatedTensorSharding", use, bool))


class TensorLocationOptions(Settings):
    def _place(self, what, location):
        return self._set(**{what: checks.member(f"set{what}Location", location, TensorLocationSettings)})

    def setOptimizerLocation(self, location):
        return self._place("Optimizer", location)

    def setActivationLocation(self, location):
        return self._place("Activation", location)

    def setWeightLocation(self, location):
        return self._place("Weight", location)

    def setAccumulatorLocation(self, location):
        return self._place("Accumulator", location)


class PopartOptions(Settings):
    def set(self, key, value):
        if key not in POPART_TYPES:
            raise KeyError(f"_Popart.set: the stand-in does not know {key!r}; it knows {', '.join(POPART_TYPES)}")
        checks.of_type(f"_Popart.set({key!r})", value, POPART_TYPES[key])
        return self._set(**{key: value})


class DistributedOptions(Settings):
    def __init__(self):
        super().__init__(process=0, processes=1)

    @property
    def processId(self):
        return self._values["process"]

    @property
    def numProcesses(self):
        return self._values["processes"]

    def configureProcessId(self, process_id, num_processes):
        checks.whole("configureProcessId's number of processes", num_processes)
        if checks.whole("configureProcessId's id", process_id, least=0) >= num_processes:
            raise ValueError(f"process {process_id} of {num_processes}: ids count from 0")
        return self._set(process=process_id, processes=num_processes)


class Strategy:
    """How blocks become stages."""

    def __init__(self, auto_stage=AutoStage.SameAsIpu):
        self.auto_stage = checks.member(type(self).__name__, auto_stage, AutoStage)

    def __repr__(self):
        return f"{type(self).__name__}({self.auto_stage})"


class PipelinedExecution(Strategy):
    """All stages work at once, each on a micro-batch of its own."""


class ShardedExecution(Strategy):
    """One IPU after the other works on one micro-batch."""


class Options(Settings):
    def __init__(self):
        super().__init__(
            device_iterations=1,
            replication_factor=1,
            output_mode=OutputMode.Default,
            output_return_period=1,
            strategy=PipelinedExecution(AutoStage.SameAsIpu),
            random_seed=None,
            offline=False,
            synthetic=False,
            relaxed=False,
            cache=None,
            profile=None,
            connection=ConnectionType.Always,
            updatable_buffers=(),
        )
        self.__dict__.update(
            Training=TrainingOptions(),
            Precision=PrecisionOptions(),
            TensorLocations=TensorLocationOptions(),
            Distributed=DistributedOptions(),
            _Popart=PopartOptions(),
        )

    device_iterations = property(lambda self: self._values["device_iterations"])
    replication_factor = property(lambda self: self._values["replication_factor"])
    output_mode = property(lambda self: self._values["output_mode"])

    def deviceIterations(self, device_iterations):
        return self._set(device_iterations=checks.whole("deviceIterations", device_iterations))

    def replicationFactor(self, replication_factor):
        return self._set(replication_factor=checks.whole("replicationFactor", replication_factor))

    def autoRoundNumIPUs(self, auto_round_num_ipus):
        return self._set(auto_round=checks.of_type("autoRoundNumIPUs", auto_round_num_ipus, bool))

    def randomSeed(self, random_seed):
        return self._set(random_seed=checks.whole("randomSeed", random_seed, least=0))

    def outputMode(self, output_mode, output_return_period=None):
        """output_return_period: EveryN's n, and for it alone."""
        every_n = checks.member("outputMode", output_mode, OutputMode) is OutputMode.EveryN
        if every_n != (output_return_period is not None):
            raise ValueError("outputMode: EveryN wants output_return_period, and nothing else takes it")
        period = checks.whole("output_return_period", output_return_period) if every_n else 1
        return self._set(output_mode=output_mode, output_return_period=period)

    def setExecutionStrategy(self, strategy):
        return self._set(strategy=checks.member("setExecutionStrategy", strategy, Strategy))

    def setAvailableMemoryProportion(self, available_memory_proportion):
        name = "setAvailableMemoryProportion"
        for ipu, proportion in checks.of_type(name, available_memory_proportion, dict).items():
            if not isinstance(ipu, str) or ipu[:3] != "IPU" or not ipu[3:].isdigit():
                raise ValueError(f'{name} wants keys such as "IPU0", not {ipu!r}')
            if not 0 <= checks.of_type(f"{name}[{ipu!r}]", proportion, float) <= 1:
                raise ValueError(f"{name} wants proportions from 0.0 to 1.0, not {proportion}")
        return self._set(memory_proportion=dict(available_memory_proportion))

    def enableExecutableCaching(self, path):
        return self._set(cache=checks.of_type("enableExecutableCaching", path, str))

    def useOfflineIpuTarget(self, ipu_version=2):
        checks.whole("useOfflineIpuTarget's ipu_version", ipu_version)
        return self._set(offline=True, ipu_version=ipu_version)

    def useIpuModel(self, use_model):
        return self._set(ipu_model=checks.of_type("useIpuModel", use_model, bool))

    def enableProfiling(self, profile_dir):
        return self._set(profile=checks.of_type("enableProfiling", profile_dir, str))

    def enableSyntheticData(self, enabled):
        return self._set(synthetic=checks.of_type("enableSyntheticData", enabled, bool))

    def relaxOptimizerAttributesChecks(self, relax):
        return self._set(relaxed=checks.of_type("relaxOptimizerAttributesChecks", relax, bool))

    def showCompilationProgressBar(self, show):
        return self._set(progress_bar=checks.of_type("showCompilationProgressBar", show, bool))

    def connectionType(self, connection_type):
        return self._set(connection=checks.member("connectionType", connection_type, ConnectionType))

    def updatableNamedBuffers(self, buffers):
        checks.of_type("updatableNamedBuffers", buffers, list)
        return self._set(
            updatable_buffers=tuple(checks.of_type("updatableNamedBuffers", name, str) for name in buffers)
        )

    def broadcastBuffers(self, broadcast):
        if not checks.of_type("broadcastBuffers", broadcast, bool):
            raise NotImplementedError("broadcastBuffers(False): buffers of one replica each are not in the stand-in")
        return self._set(broadcast_buffers=True)

    def logDir(self, log_dir):
        return self._set(log_dir=checks.of_type("logDir", log_dir, str))

    def modelName(self, name):
        return self._set(model_name=checks.of_type("modelName", name, str))

    def clone(self):
        """A copy that may be changed, whether or not this may."""
        twin = copy.deepcopy(self)
        for part in (twin, *twin._parts()):
            part.__dict__["_frozen"] = False
        return twin

    def _parts(self):
        return self.Training, self.Precision, self.TensorLocations, self.Distributed, self._Popart

    def _freeze(self):
        for part in self._parts():
            part._freeze()
        super()._freeze()

    def __repr__(self):
        return super().__repr__() + "".join(f", {part!r}" for part in self._parts())

    # What popdist.poptorch.Options changes: who takes part in one gradient.
    _instances = 1

    def _sum_over_instances(self, tensors):
        """In place, over all processes that train one model."""

    @property
    def _micro_batches(self):
        """How many micro-batches a call takes."""
        return self.device_iterations * self.Training.gradient_accumulation * self.replication_factor
