"""Options of an instance that PopRun started, which sets its replicas and its number."""

import poptorch
from poptorch.options import check_int

import popdist


class Options(poptorch.Options):
    def __init__(self, ipus_per_replica=1):
        super().__init__()
        self._set(ipus_per_replica=check_int("ipus_per_replica", ipus_per_replica))
        super().replicationFactor(popdist.getNumLocalReplicas())
        self.Distributed.configureProcessId(popdist.getInstanceIndex(), popdist.getNumInstances())

    def replicationFactor(self, replication_factor):
        own = popdist.getNumLocalReplicas()
        if replication_factor != own:
            raise RuntimeError(f"replicationFactor({replication_factor}): PopRun gave this instance {own}")
        return super().replicationFactor(replication_factor)

    @property
    def _partition(self):
        return self._values["ipus_per_replica"]

    @property
    def _instances(self):
        return popdist.getNumInstances()

    def _sum_over_instances(self, tensors):
        group = popdist._group()
        if group is not None:
            for tensor in tensors:
                group.all_reduce(tensor)
