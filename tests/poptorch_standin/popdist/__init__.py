"""A stand-in for popdist: the numbers that PopRun gives its instances, and the exchange among them.

The numbers are there after init() only. PopRun's own variables are not modelled. The environment has four of ours:
POPDIST_NUM_TOTAL_REPLICAS, POPDIST_NUM_LOCAL_REPLICAS, POPDIST_INSTANCE_INDEX and POPDIST_NUM_INSTANCES. Instances on
one machine meet through the file that STANDIN_STORE names. popdist.poptorch is a separate module that
importing popdist does not load.
"""

import atexit
import functools
import os

_ready = []


def isPopdistEnvSet():
    return "POPDIST_NUM_TOTAL_REPLICAS" in os.environ


def init():
    _ready.append(True)


def _read(name):
    if not _ready:
        raise RuntimeError("popdist.init() has not been called")
    return int(os.environ[name])


getNumTotalReplicas = functools.partial(_read, "POPDIST_NUM_TOTAL_REPLICAS")
getNumLocalReplicas = functools.partial(_read, "POPDIST_NUM_LOCAL_REPLICAS")
getInstanceIndex = functools.partial(_read, "POPDIST_INSTANCE_INDEX")
getNumInstances = functools.partial(_read, "POPDIST_NUM_INSTANCES")


def _group():
    """Return torch.distributed, connected with the other instances, or None if there are none."""
    if not isPopdistEnvSet() or getNumInstances() == 1:
        return None
    from torch import distributed

    if not distributed.is_initialized():
        # Imported later, its functions would keep the group as their default argument: its threads would not end.
        import torch.distributed.nn  # noqa: F401

        store = distributed.FileStore(os.environ["STANDIN_STORE"], getNumInstances())
        distributed.init_process_group("gloo", store=store, rank=getInstanceIndex(), world_size=getNumInstances())
        atexit.register(distributed.destroy_process_group)
    return distributed
