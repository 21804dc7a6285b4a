"""The contract between the commands and a machine. The seam is the step: one call makes one optimizer update.

Micro-batches, replicas, precision and the update differ between an IPU pod and a CPU, and are hidden behind it.
"""

from argparse import Namespace
from typing import Any, Callable, ContextManager, Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from models.dalle import DALLE
from models.vae import ImageTokenizer

LossValues = Dict[str, float]  # total, text and image loss, in nats; after an update perhaps grad_norm


class DeviceLost(ValueError):
    """A device failed, and the weights on it are lost; the message is one line."""


class StageEstimate(NamedTuple):
    """What a pipeline stage needs, by arithmetic."""

    ipu: int  # number of its IPU
    memory: Dict[str, float]  # bytes by kind
    capacity: float  # bytes of the IPU, which several stages may share
    seconds: float  # of a micro-batch, forward and backward, at the IPU's peak


class Trainer(Protocol):
    """The owner of the model's weights and of the optimizer during a run."""

    def compile(self, batch: Any) -> None:
        """Prepare for batches of this shape, without an update."""

    def step(self, batch: Any) -> LossValues:
        """Make one update and return the losses, means over the global batch of all processes.

        The result also has `grad_norm`, the gradient's norm before clipping, on machines that skip updates whose
        gradient is not finite.

        Raises:
            ConnectionError: another process of the run has ended.
        """

    def evaluate(self, batches: Iterable) -> LossValues:
        """Return the losses without dropout or updates, means over all samples of all processes.

        Uses the averaged weights if the trainer keeps an average. Processes may have different numbers of samples.
        The last batch may be smaller; machines with fixed shapes repeat its samples, which then count more.
        """

    def sampler(self) -> Optional[Callable[..., Tensor]]:
        """Return `Backend.sampler` for the current weights, or for their average if the trainer keeps one.

        Only rank 0 may call it, and must use it before the next step. None if the machine cannot sample while it
        trains.
        """

    def set_lr(self, lr: float) -> None:
        """Set the learning rate from the next step on."""

    def state_dict(self) -> Dict[str, Any]:
        """Return weights (with the DALLE's own names), opt_state and other state; tensors and plain values only.

        If the trainer keeps an average of the weights, `ema_weights` has it, without the VQGAN.
        """

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load what `state_dict` returned on any backend; everything but the weights may be missing or None."""

    def close(self) -> None:
        """Give up the device; nothing can be trained afterwards."""


class Backend(Protocol):
    """A machine that samples and evaluates, or one of several processes that do so together."""

    kind: str  # "cpu", "cuda" or "ipu"
    device: torch.device  # where plain PyTorch modules run; the CPU if the backend is an IPU
    rank: int  # the number of this process; rank 0 writes and logs
    world_size: int  # the number of processes
    can_gather: bool  # whether `gather` works here

    def autocast(self) -> ContextManager[Any]:
        """Return a context in which plain PyTorch modules compute in the backend's precision."""

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows (n, …) of all processes, rank 0's first, on the CPU; n may differ between processes."""

    def encode(self, vae: ImageTokenizer) -> Callable[[Tensor], Tensor]:
        """Return a function from pixels, float (B, 3, S, S) in [0, 1], to codes, int64 (B, L) on the CPU."""

    def decode(self, vae: ImageTokenizer) -> Callable[..., Tensor]:
        """Return a function from codes, int64 (B, L), to pixels, float (B, 3, S, S) in [0, 1] on the CPU.

        decode(codes, rows) decodes only the upper rows of an image, on machines that call a sampler's `on_code`.
        """

    def images_at_once(self, model: DALLE) -> int:
        """Return how many images a sampler should generate at once to be fast and fit the machine's memory."""

    def sampler(self, model: DALLE, batch_size: int, window: Optional[int] = None) -> Callable[..., Tensor]:
        """Return `generate_codes` for this machine, for about `batch_size` images at once.

        Its codes are int64 (B, L) on the CPU, the same for each window: the number of codes of an image that a pass
        computes, None for what is fastest. Machines that sample a whole image in one call never report single codes,
        and have no windows.
        """

    def evaluator(self, model: DALLE) -> Callable[[Iterable[Tuple[Tensor, Tensor]]], LossValues]:
        """Return a function from batches of (text int64 (B, T), codes int64 (B, L)) to mean losses over all samples."""


class TrainingBackend(Backend, Protocol):
    """A machine that trains, or one of several processes that train together."""

    settings: Namespace  # train.py's flags
    batch_size: int  # samples of a micro-batch of this process
    micro_batches: int  # of this process per step
    samples_per_step: int  # of this process: micro-batch × accumulation × replicas × device iterations
    compile_only: bool  # there is no device to run on; the run ends after `Trainer.compile`
    least_accumulation: int = 1  # micro-batches that an update needs; a pipeline must be filled

    def any_process(self, wish: bool) -> bool:
        """Return whether any process wishes it; every process must call this."""

    def evaluation_samples(self, count: int) -> int:
        """Return how many samples of this process a batch should have to evaluate `count` samples."""

    def loader(self, dataset: Any, order: Sequence[List[Any]], samples: Optional[int] = None) -> Iterable:
        """Yield batches; each has the samples of one step, or of one evaluation.

        Args:
            dataset: key → (text, image).
            order: lists of keys, one list for each batch.
            samples: of a batch; None: samples_per_step. Machines with fixed shapes fill up batches that have fewer.

        Raises:
            SamplesLost: the next batch, or a part of it, cannot be read.
        """

    def trainer(self, model: DALLE) -> Trainer:
        """Return a trainer for this model."""

    def stage_estimates(self) -> List[StageEstimate]:
        """Return what each pipeline stage of the last trainer needs; empty without a pipeline."""
