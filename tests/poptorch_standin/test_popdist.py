"""popdist and horovod: without PopRun, with its numbers preset, and two instances that train as one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.poptorch_standin.helpers import assert_same_weights, batch_of, torch_training

STANDIN = Path(__file__).resolve().parent
POPRUN = ("POPDIST_NUM_TOTAL_REPLICAS", "POPDIST_NUM_LOCAL_REPLICAS", "POPDIST_INSTANCE_INDEX", "POPDIST_NUM_INSTANCES")


def test_poprun_presets_the_replicas(poptorch, monkeypatch):
    for name, value in zip(POPRUN, "4210"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POPDIST_NUM_INSTANCES", "2")
    popdist, model = importlib.import_module("popdist"), nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match=r"popdist\.init"):
        popdist.getNumInstances()
    popdist.init()
    options = importlib.import_module("popdist.poptorch").Options(ipus_per_replica=2)
    assert options.replication_factor == 2 and options.replicationFactor(2) is options
    assert (options.Distributed.processId, options.Distributed.numProcesses) == (1, 2)
    with pytest.raises(RuntimeError, match="PopRun gave this instance 2"):
        options.replicationFactor(1)
    with pytest.raises(TypeError):
        type(options)(ipus_per_replica="2")
    executor = poptorch.inferenceModel(model, options)
    executor.compile(torch.ones(2, 1))
    assert poptorch.MACHINE.holders[executor] == 4  # two for each replica
    executor.destroy()
    with pytest.raises(poptorch.Error, match="another instance"):
        poptorch.inferenceModel(model).compile(torch.ones(1, 1))


INSTANCE = """
import torch
import horovod.torch as hvd, popdist, popdist.poptorch, poptorch
from tests.poptorch_standin.helpers import Net, batch_of
popdist.init()
hvd.init()
model, rank = Net(), popdist.getInstanceIndex()
if rank == 1:
    torch.nn.init.zeros_(model.first.weight)
for parameter in model.parameters():
    parameter.data = hvd.broadcast(parameter.data, root_rank=0)
options = popdist.poptorch.Options(ipus_per_replica=1)
options.Training.gradientAccumulation(2)
trainer = poptorch.trainingModel(model, options, poptorch.optim.AdamW(model.parameters(), lr=1e-2))
x, y = batch_of(16)
for _ in range(3):
    loss, _ = trainer(x.chunk(2)[rank], y.chunk(2)[rank])
mean, total = hvd.allreduce(loss), hvd.allreduce(torch.tensor(rank + 1), op=hvd.Sum)
torch.save([trainer.state_dict(), mean, total, loss], f"{folder}/{{rank}}.pt")
"""


@pytest.mark.slow  # tests/test_ipu_commands.py has two instances of train.py
def test_two_instances_train_as_one(poptorch, tmp_path):
    program = INSTANCE.format(folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STANDIN_STORE": str(tmp_path / "store")}
    environment["PYTHONPATH"] = os.pathsep.join((str(STANDIN), str(STANDIN.parents[1])))
    running = []
    for rank in range(2):
        mine = {**environment, **dict(zip(POPRUN, "4202"))}
        mine["POPDIST_INSTANCE_INDEX"] = str(rank)
        running.append(subprocess.Popen([sys.executable, "-c", program], env=mine))
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    (weights, mean, total, loss), (others, *_, loss_of_other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert_same_weights(others, weights, 0)
    torch.testing.assert_close(mean, (loss + loss_of_other) / 2)
    assert total.item() == 3 and loss.shape == (2,)
    x, y = batch_of(16)
    assert_same_weights(weights, torch_training("AdamW", 3 * [(x, y)], 1, lr=1e-2))
