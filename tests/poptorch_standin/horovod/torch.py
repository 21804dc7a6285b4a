"""Exchange of tensors among the instances that PopRun started; the identity if there is only one."""

import popdist

Average = "Average"
_ready = []


def init():
    popdist._group()
    _ready.append(True)


def broadcast(tensor, root_rank):
    """Return a copy of the root's tensor."""
    tensor, group = tensor.detach().clone(), popdist._group()
    if group is not None:
        group.broadcast(tensor, root_rank)
    return tensor


def allreduce(tensor, op=Average):
    """Return the mean over all instances."""
    if not _ready:
        raise ValueError("Horovod has not been initialized; use hvd.init().")
    tensor, group = tensor.detach().clone(), popdist._group()
    if group is not None:
        group.all_reduce(tensor)
        tensor = tensor / popdist.getNumInstances()
    return tensor
