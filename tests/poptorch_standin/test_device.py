"""Devices that are offline or detached, cached executables and files of them."""

import pytest
import torch

from tests.poptorch_standin.helpers import Net, batch_of, options_of, trainer_of


def test_offline_targets_compile_only(poptorch_standin):
    for options in (
        poptorch_standin.Options().useOfflineIpuTarget(ipu_version=2),
        poptorch_standin.Options().connectionType(poptorch_standin.ConnectionType.Never),
    ):
        trainer, _, _ = trainer_of(poptorch_standin, options=options)
        trainer.compile(*batch_of(2))
        assert not trainer.isAttachedToDevice()
        with pytest.raises(RuntimeError, match="offline device"):
            trainer(*batch_of(2))


def test_detaching(poptorch_standin):
    trainer, model, _ = trainer_of(poptorch_standin)
    before, batch = model.first.weight.clone(), batch_of(2)
    with pytest.raises(RuntimeError, match="not compiled"):
        trainer.copyWeightsToHost()
    with pytest.raises(RuntimeError, match="has not run"):
        trainer.getLatency()
    trainer(*batch)
    assert trainer.cycleCount() > 0 and len(trainer.getLatency()) == 3
    trainer.detachFromDevice()
    assert not torch.equal(model.first.weight, before) and not trainer.isAttachedToDevice()
    with torch.no_grad():
        model.second.bias.add_(100)
    trainer(*batch)  # attaches by itself, with the host's weights of now
    assert trainer.isAttachedToDevice() and trainer.state_dict()["second.bias"].min() > 90
    trainer.detachFromDevice()
    trainer.attachToDevice()
    trainer(*batch)
    trainer.destroy()
    trainer_of(poptorch_standin, model)[0](*batch)


def test_files(poptorch_standin, tmp_path):
    cache, profile = tmp_path / "cache", tmp_path / "profile"

    def compiled(rows=4, seed=3):
        options = options_of(poptorch_standin).randomSeed(seed).enableProfiling(str(profile))
        trainer, _, _ = trainer_of(poptorch_standin, options=options.enableExecutableCaching(str(cache)))
        trainer.compile(*batch_of(rows))
        return trainer

    assert not compiled().trace.cache_hit and compiled().trace.cache_hit
    assert not compiled(rows=2).trace.cache_hit and not compiled(seed=4).trace.cache_hit
    assert len(list(cache.iterdir())) == 3 and (profile / "profile.pop").stat().st_size

    file = str(tmp_path / "model.poptorch")
    trainer_of(poptorch_standin)[0].compileAndExport(file, *batch_of(4))
    trainer, _, _ = trainer_of(poptorch_standin)
    trainer.loadExecutable(file)
    trainer(*batch_of(4))
    with pytest.raises(RuntimeError, match="another model"):
        trainer_of(poptorch_standin, Net(dropout=0.5))[0].loadExecutable(file)
