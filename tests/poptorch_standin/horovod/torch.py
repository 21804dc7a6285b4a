"""Exchange of tensors among the instances that PopRun started; the identity if there is only one."""

import popdist

Average, Sum = "Average", "Sum"
_ready = []


def init():
    popdist._group()
    _ready.append(True)


def _check():
    if not _ready:
        raise ValueError("Horovod has not been initialized; use hvd.init().")


def rank():
    _check()
    return popdist.getInstanceIndex() if popdist.isPopdistEnvSet() else 0


def size():
    _check()
    return popdist.getNumInstances() if popdist.isPopdistEnvSet() else 1


def local_rank():
    """Return rank(): all instances are on one machine."""
    return rank()


def broadcast(tensor, root_rank, name=None):
    """Return a copy of the root's tensor."""
    _check()
    tensor = tensor.detach().clone()
    group = popdist._group()
    if not 0 <= root_rank < size():
        raise ValueError(f"root_rank {root_rank} of {size()}")
    if group is not None:
        group.broadcast(tensor, root_rank)
    return tensor


def allreduce(tensor, average=None, name=None, op=None):
    """Return the mean over all instances, or the sum with op=Sum or average=False."""
    _check()
    if average is not None and op is not None:
        raise ValueError("give op or average, not both")
    if op not in (None, Average, Sum):
        raise ValueError(f"op is Average or Sum, not {op!r}")
    mean = average if average is not None else op in (None, Average)
    tensor = tensor.detach().clone()
    group = popdist._group()
    if group is not None:
        group.all_reduce(tensor)
        if mean:
            tensor = tensor / size() if tensor.is_floating_point() else tensor // size()
    return tensor
