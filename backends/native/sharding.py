"""Train with --shard: torchrun's processes share weights, gradients and optimizer state (FSDP2).

This module has only what differs from trainer.py: who holds what, and how a checkpoint's state is gathered and shared.
Checkpoints are the same files as without sharding. It has run with gloo on CPUs so far, not with NCCL on GPUs.
"""

import atexit
import contextlib
import functools
import gc
import sys
from typing import Any, Dict, Iterable, Iterator, List, Tuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import fsdp

from backends.base import LossValues
from backends.native.trainer import NativeTrainer, SharedMuon, forward_batch
from models.dalle import DALLE


def check(world_size: int, precision: str) -> None:
    """Raise ValueError, in one line, if --shard cannot work here."""
    if world_size == 1:
        raise ValueError("--shard: there is only one process; start several with torchrun, or leave the flag out")
    if not hasattr(fsdp, "fully_shard"):
        raise ValueError(f"--shard: needs torch 2.6 or newer, this is {torch.__version__}; leave the flag out")
    if precision == "fp16":
        raise ValueError("--shard: not with --precision fp16, whose loss scaling is not shared; use bf16 or fp32")


def shard(model: DALLE, device: torch.device) -> None:
    """Shard a DALLE's parameters in place; every process must bring the same weights.

    Each layer is a unit, gathered when it computes; embeddings and head are another. The frozen VQGAN stays whole.
    Weights are exchanged in fp32 and autocast decides on dtypes, as without sharding: FSDP2's own mixed precision
    would also compute norms and the residual stream in bf16.
    """
    if hasattr(fsdp, "fully_shard") and hasattr(dist, "init_device_mesh"):
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))  # the default is a GPU if there is one
        for layer in model.transformer.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        vae, model.vae = model.vae, None
        fsdp.fully_shard(model, mesh=mesh)
        model.vae = vae
        atexit.register(clear_torch_caches)  # before leave_group(), which was registered earlier


def clear_torch_caches() -> None:
    """Clear torch's caches of sharded operations, which keep the process group and its threads alive."""
    planner = sys.modules.get("torch.distributed.tensor._redistribute")
    clear_planner = getattr(planner, "clear_redistribute_planner_cache", None)
    if clear_planner is not None:
        clear_planner()
    for cache in gc.get_objects():
        if type(cache) is functools._lru_cache_wrapper and str(cache.__module__).startswith("torch.distributed"):
            cache.cache_clear()
    if hasattr(torch._C, "_clear_DTensor_sharding_propagator_cache"):
        torch._C._clear_DTensor_sharding_propagator_cache()


class Exchange:
    """A sharded model that is called like a DistributedDataParallel."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the gradients of this block's backward passes whole, without exchanging them."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)


class ShardedMuon(SharedMuon):
    """Muon that gathers matrices to orthogonalize them; each process keeps its rows of the update."""

    def orthogonal(self, momenta: List[Any]) -> Iterable[Tensor]:
        """Return this process's rows of the orthogonalized momenta."""
        whole = super().orthogonal([momentum.full_tensor() for momentum in momenta])
        return [own_rows(update, momentum) for update, momentum in zip(whole, momenta)]


class ShardedTrainer(NativeTrainer):
    """A trainer that holds this process's share of the model and of the optimizers' state."""

    muon = ShardedMuon

    def place(self, model: DALLE) -> DALLE:
        """Shard a model, move it to the device and give it fast layers."""
        shard(model, self.backend.device)
        return super().place(model)

    def exchange_gradients(self) -> Exchange:
        """Return the model as `step` calls it."""
        return Exchange(self.model)

    def measure_max_samples(self) -> int:
        """Return 0: micro-batches stay as they are."""
        return 0

    def try_out(self, samples: int, exchange: bool = True) -> None:
        """Exchange gradients, too, because FSDP2 keeps those that it has not exchanged."""
        super().try_out(samples, exchange)

    def samples_at_once(self) -> int:
        """Return the samples of a micro-batch."""
        return self.backend.batch_size

    def regroup(self, batches: Iterable) -> Iterable[Tuple[Tensor, Tensor]]:
        """Return the micro-batches as they are, since every process must call the network equally often."""
        return batches

    def evaluate(self, batches: Iterable) -> LossValues:
        """Return the mean losses of all processes' samples."""
        network: Any = self.model if self.average is None else self.average
        losses = super().evaluate(self._in_step(network, batches))
        network.reshard()  # without a backward pass, embeddings and head stay gathered
        return losses

    def _in_step(self, network: DALLE, batches: Iterable) -> Iterator[List]:
        """Yield batches of one micro-batch each.

        Layers are gathered by all processes or none, so a process without samples computes on as long as others have
        some.
        """
        lengths = self.model.text_seq_len, self.model.image_seq_len
        stream = (micro_batch for batch in batches for micro_batch in batch)
        while True:
            micro_batch = next(stream, None)
            if not self.backend.any_process(micro_batch is not None):
                return
            if micro_batch is not None:
                yield [micro_batch]
            else:
                text, codes = (torch.zeros(1, length, dtype=torch.long) for length in lengths)
                forward_batch(network, text, codes, self.backend)

    def sampler(self) -> None:
        """Return None: no process holds the whole model."""

    def state_dict(self) -> Dict[str, Any]:
        """Return whole tensors on the CPU in rank 0, and None in their place in other processes; all must call it.

        Raises:
            ConnectionError: a process has ended, and its share is lost.
        """
        with self.backend.processes.explain_lost_connection():
            return gather_shards(super().state_dict(), keep=self.backend.rank == 0)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load this process's share of a whole state."""
        own = self.model.state_dict()
        weights = {
            kind: {name: own_rows(tensor, own.get(name)) for name, tensor in (state.get(kind) or {}).items()}
            for kind in ("weights", "ema_weights")
        }
        super().load_state_dict({**state, **weights})

    def take_share(self, optimizer: torch.optim.Optimizer, saved: Dict[str, Any]) -> Dict[str, Any]:
        """Return this process's share of an optimizer's saved state."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {name: own_rows(value, parameters[number]) for name, value in values.items()}
            for number, values in saved["state"].items()
        }
        return {**saved, "state": moments}


def gather_shards(value: Any, keep: bool) -> Any:
    """Return dicts and lists with every sharded tensor whole, on the CPU, or as None without `keep`."""
    if isinstance(value, dict):
        return {name: gather_shards(part, keep) for name, part in value.items()}
    if isinstance(value, list):
        return [gather_shards(part, keep) for part in value]
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor()
    return torch.empty_like(whole, device="cpu").copy_(whole) if keep else None  # it may be part of a larger storage


@torch.no_grad()
def own_rows(whole: Any, like: Any) -> Any:
    """Return a whole tensor sharded as `like` is; unchanged if `like` is not sharded or has another shape."""
    if not hasattr(like, "full_tensor") or getattr(whole, "shape", None) != like.shape:
        return whole
    mesh = like.device_mesh
    part: Any = torch.empty_like(like)
    rows = -(-len(whole) // mesh.size())  # FSDP2 divides them as torch.chunk does
    first = rows * mesh.get_local_rank()
    part.to_local().copy_(whole[first : first + rows])
    return part
