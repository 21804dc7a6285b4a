"""What the stand-in has and what it has not; options are checked, chain, can be read and freeze."""

from pathlib import Path

import pytest
import torch

from tests.poptorch_standin.helpers import Net, trainer_of


def test_only_what_is_known_is_there(poptorch_standin):
    assert poptorch_standin.IS_STANDIN and "standin" in poptorch_standin.__version__
    assert poptorch_standin.ipuHardwareIsAvailable() is False
    with pytest.raises(AttributeError):
        poptorch_standin.ipuHardwareVersion  # noqa: B018
    with pytest.raises(AttributeError, match="no batchSize"):
        poptorch_standin.Options().batchSize(4)
    with pytest.raises(AttributeError, match="calling their setters"):
        poptorch_standin.Options().replication_factor = 2
    with pytest.raises(AttributeError):
        trainer_of(poptorch_standin)[0].train()
    for absent in (poptorch_standin.cond, poptorch_standin.custom_op):
        with pytest.raises(NotImplementedError, match="not in the stand-in"):
            absent()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda p, o: o.deviceIterations(0), ValueError),
        (lambda p, o: o.deviceIterations(2.0), TypeError),
        (lambda p, o: o.replicationFactor(True), TypeError),
        (lambda p, o: o.randomSeed("7"), TypeError),
        (lambda p, o: o.outputMode("All"), TypeError),
        (lambda p, o: o.outputMode(p.OutputMode.EveryN), ValueError),
        (lambda p, o: o.outputMode(p.OutputMode.All, 2), ValueError),
        (lambda p, o: o.setExecutionStrategy(p.AutoStage.AutoIncrement), TypeError),
        (lambda p, o: p.PipelinedExecution("AutoIncrement"), TypeError),
        (lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1}), TypeError),
        (lambda p, o: o.setAvailableMemoryProportion({"IPU0": 1.5}), ValueError),
        (lambda p, o: o.setAvailableMemoryProportion({0: 0.5}), ValueError),
        (lambda p, o: o.setAvailableMemoryProportion([0.5]), TypeError),
        (lambda p, o: o.enableExecutableCaching(Path("cache")), TypeError),
        (lambda p, o: o.useOfflineIpuTarget("ipu2"), TypeError),
        (lambda p, o: o.enableSyntheticData(1), TypeError),
        (lambda p, o: o.connectionType("never"), TypeError),
        (lambda p, o: o.updatableNamedBuffers("mask"), TypeError),
        (lambda p, o: o.broadcastBuffers(False), NotImplementedError),
        (lambda p, o: o.Training.gradientAccumulation(-1), ValueError),
        (lambda p, o: o.Training.gradientAccumulation(n=1), TypeError),
        (lambda p, o: o.Training.accumulationAndReplicationReductionType("mean"), TypeError),
        (lambda p, o: o.Training.setAutomaticLossScaling(1), TypeError),
        (lambda p, o: o.Training.gradientClipping(1.0), AttributeError),
        (lambda p, o: o.Precision.enableStochasticRounding(1), TypeError),
        (lambda p, o: o.Precision.setPartialsType(torch.bfloat16), TypeError),
        (lambda p, o: o.TensorLocations.setOptimizerLocation(True), TypeError),
        (lambda p, o: p.TensorLocationSettings().useOnChipStorage(0), TypeError),
        (lambda p, o: o._Popart.set("outlineThreshold", 10), TypeError),
        (lambda p, o: o._Popart.set("outlineTreshold", 10.0), KeyError),
        (lambda p, o: o.Distributed.configureProcessId(2, 2), ValueError),
        (lambda p, o: p.Options(deviceIterations=2), TypeError),
    ],
)
def test_options_refuse(poptorch_standin, call, error):
    with pytest.raises(error):
        call(poptorch_standin, poptorch_standin.Options())


def test_options_take_chain_and_can_be_read(poptorch_standin):
    options = poptorch_standin.Options().deviceIterations(2).replicationFactor(3).autoRoundNumIPUs(True).logDir("logs")
    options.setExecutionStrategy(poptorch_standin.ShardedExecution(poptorch_standin.AutoStage.SameAsIpu))
    options.setAvailableMemoryProportion({"IPU0": 0.2, "IPU1": 0.6}).relaxOptimizerAttributesChecks(True)
    assert options.Training.gradientAccumulation(4).setAutomaticLossScaling(False) is options.Training
    off_chip = poptorch_standin.TensorLocationSettings().useOnChipStorage(False).useReplicatedTensorSharding(True)
    options.TensorLocations.setOptimizerLocation(off_chip)
    options._Popart.set("outlineThreshold", 10.0)
    numbers = options.device_iterations, options.Training.gradient_accumulation, options.replication_factor
    assert numbers == (2, 4, 3)
    assert options.output_mode is poptorch_standin.OutputMode.Default


@pytest.mark.parametrize("holder", ["loader", "inference", "training"])
def test_options_freeze(poptorch_standin, holder):
    options = poptorch_standin.Options()
    if holder == "loader":
        poptorch_standin.DataLoader(options, [torch.zeros(1)])
    elif holder == "inference":
        poptorch_standin.inferenceModel(Net(), options)
    else:
        trainer_of(poptorch_standin, options=options)
    for change in (options.deviceIterations, options.Training.gradientAccumulation, options.clone):
        if change == options.clone:
            assert options.clone().deviceIterations(2).Training.gradientAccumulation(2).gradient_accumulation == 2
        else:
            with pytest.raises(AttributeError, match="frozen"):
                change(2)
    with pytest.raises(AttributeError, match="frozen"):
        options._Popart.set("outlineThreshold", 1.0)
