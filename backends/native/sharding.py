"""--shard: trainer.py's step with weights, gradients and moments shared out among torchrun's processes (FSDP2).

Here is only what differs: who holds what, and how a state is gathered for a checkpoint and shared out from one.
Checkpoints are the same files as without. Run with gloo on CPUs so far; written for NCCL on GPUs as well.
"""

import contextlib

import torch
from torch import distributed as dist
from torch.distributed import fsdp

from backends.native.trainer import NativeTrainer, SharedMuon, forward


def check(world_size, precision):
    """ValueError in one line where --shard cannot work."""
    if world_size == 1:
        raise ValueError("--shard: there is one process only; start several with torchrun, or leave the flag out")
    if not hasattr(fsdp, "fully_shard"):
        raise ValueError(f"--shard: needs torch 2.6 or newer, this is {torch.__version__}; leave the flag out")
    if precision == "fp16":
        raise ValueError("--shard: not with --precision fp16, whose loss scaling is not shared out; use bf16 or fp32")


def shard(model, device):
    """Share a DALLE's parameters out, in place: each layer a unit, which is gathered when it computes, and what is left
    (embeddings, head) another. The frozen VQGAN stays whole. Every process brings the same weights.

    Weights travel in fp32 and autocast decides on dtypes, as without sharding: FSDP2's own mixed precision would take
    norms and the residual stream to bf16 as well.
    """
    if hasattr(fsdp, "fully_shard") and hasattr(dist, "init_device_mesh"):
        # Named, since the default is a GPU where there is one.
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.transformer.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        vae, model.vae = model.vae, None
        fsdp.fully_shard(model, mesh=mesh)
        model.vae = vae


class Exchange:
    """A sharded model, called as DistributedDataParallel is."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        """Within: gradients of backward passes are kept whole and not exchanged."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)


class ShardedMuon(SharedMuon):
    """Muon whose matrices are gathered to be made orthogonal; each process keeps its rows of the update."""

    def orthogonal(self, momenta):
        whole = super().orthogonal([momentum.full_tensor() for momentum in momenta])
        return [own_rows(update, momentum) for update, momentum in zip(whole, momenta)]


class ShardedTrainer(NativeTrainer):
    muon = ShardedMuon
    alone = False  # whether another process has ended

    def placed(self, model):
        shard(model, self.backend.device)
        return super().placed(model)

    def exchanging(self):
        return Exchange(self.model)

    def parts(self, text, image):
        return [(text, image)]  # every process calls the network as often as the others

    def step(self, batch):
        try:
            return super().step(batch)
        except ConnectionError:
            self.alone = True
            raise

    def evaluate(self, batches):
        network = self.model if self.average is None else self.average
        losses = super().evaluate(self.in_step(network, batches))
        network.reshard()  # without a backward pass, what is not in layers stays gathered
        return losses

    def in_step(self, network, batches):
        """Batches of one micro-batch each. A process that has no more computes on while others have: layers are
        gathered by all or none.
        """
        lengths = self.model.text_seq_len, self.model.image_seq_len
        stream = (micro_batch for batch in batches for micro_batch in batch)
        while True:
            micro_batch = next(stream, None)
            if not self.backend.agreed(micro_batch is not None):
                return
            if micro_batch is not None:
                yield [micro_batch]
            else:
                forward(network, *(torch.zeros(1, length, dtype=torch.long) for length in lengths), self.backend)

    def sampler(self):
        """None: no process holds the whole model."""

    def state_dict(self):
        """To be called by all processes; whole tensors on the CPU in rank 0, None in their place in the others.

        ConnectionError where a process has ended, and its share with it.
        """
        if self.alone:
            raise ConnectionError("another process of this run has ended")
        with self.backend.processes.together():
            return gathered(super().state_dict(), keep=self.backend.rank == 0)

    def load_state_dict(self, state):
        own = self.model.state_dict()
        weights = {
            kind: {name: own_rows(tensor, own.get(name)) for name, tensor in (state.get(kind) or {}).items()}
            for kind in ("weights", "ema_weights")
        }
        super().load_state_dict({**state, **weights})

    def own_state(self, optimizer, saved):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {name: own_rows(value, parameters[number]) for name, value in values.items()}
            for number, values in saved["state"].items()
        }
        return {**saved, "state": moments}


def gathered(value, keep):
    """Every sharded tensor within dicts and lists → whole and on the CPU, or None in its place without `keep`."""
    if isinstance(value, dict):
        return {name: gathered(part, keep) for name, part in value.items()}
    if isinstance(value, list):
        return [gathered(part, keep) for part in value]
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor()
    return torch.empty_like(whole, device="cpu").copy_(whole) if keep else None  # it may be part of a larger storage


@torch.no_grad()
def own_rows(whole, like):
    """A whole tensor → one that is shared out as `like` is; itself, where `like` is not, or of another shape."""
    if not hasattr(like, "full_tensor") or getattr(whole, "shape", None) != like.shape:
        return whole
    mesh, part = like.device_mesh, torch.empty_like(like)
    rows = -(-len(whole) // mesh.size())  # FSDP2 deals them out as torch.chunk does
    first = rows * mesh.get_local_rank()
    part.to_local().copy_(whole[first : first + rows])
    return part
