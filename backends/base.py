"""The contract between the commands and a machine, written once. The seam is the step: one call, one optimizer update.

How micro-batches, replicas, precision and the update are carried out differs between an IPU pod and a CPU, and
is hidden here; devices, optimizers and ranks are not wrapped for their own sake.
"""

from typing import Callable, ContextManager, Dict, Iterable, Optional, Protocol, Sequence


class SamplesLost(OSError):
    """loader() can give no more samples; says why, in one line."""


class Trainer(Protocol):
    """Owns the model's weights and the optimizer while a run lasts."""

    def compile(self, batch) -> None:
        """Prepare for batches of this shape. Trains nothing."""

    def step(self, batch) -> Dict[str, float]:
        """One update from one of loader()'s batches → total, text and image loss, means over the whole global batch.

        With them `grad_norm`, the gradient's norm before clipping, on machines that leave an update out where it is
        not finite.
        """

    def evaluate(self, batches: Iterable) -> Dict[str, float]:
        """step()'s losses without dropout and updates, means over all samples of loader()'s batches and over all
        processes; of the averaged weights where the trainer keeps an average.

        Processes may have different numbers of samples. The last batch may be smaller; machines of fixed shapes fill
        it up with its own samples, which then count more.
        """

    def sampler(self) -> Optional[Callable]:
        """Backend.sampler of the weights as they are, of their average where one is kept: to be used before the next
        step, which it does not change. None where the machine cannot draw while it trains. Called by rank 0 alone.
        """

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""

    def state_dict(self) -> Dict:
        """weights (a DALLE's own names), opt_state, and what else the trainer keeps; tensors and plain values only.

        `ema_weights`, where an average is kept: weights again, without the VQGAN's.
        """

    def load_state_dict(self, state: Dict) -> None:
        """What state_dict() gave, on any backend; all but weights may be absent or None."""


class Backend(Protocol):
    """A machine, or one of several processes that train together.

    samples_per_step: what this process consumes in a step, batch_size × gradient_accumulation × its replicas ×
    device_iterations. rank and world_size: which of the processes this is, and how many there are; rank 0 writes and
    logs. compile_only: there is no device to run on, the run ends after compile().
    """

    samples_per_step: int
    rank: int
    world_size: int
    compile_only: bool

    def making_codes(self) -> ContextManager:
        """Within, pictures may be encoded: by all processes at once, or by rank 0 while the others wait for it."""

    def agreed(self, wish: bool) -> bool:
        """Whether any of the processes wishes it; each must ask."""

    def gather(self, rows):
        """For commands that do not train: tensors (n, …) on the CPU, n each process's own → (sum of all n, …), rank 0's
        first, in every process. None in place of the method where processes cannot.
        """

    def loader(self, dataset, order: Sequence) -> Iterable:
        """Batches, each all that one step consumes: `order` holds lists of samples_per_step keys of `dataset`.

        Raises SamplesLost, only where the next batch or a part of it is wanted.
        """

    def trainer(self, model) -> Trainer: ...

    def evaluator(self, model):
        """A trained model's losses, without an optimizer: batches of any size of (text, codes), int64 (B, text_seq_len)
        and (B, L) → total, text and image loss, means over all samples.
        """

    def encode(self, vae):
        """Pixels float (B, 3, S, S) in [0, 1] → codes int64 (B, L) on the CPU, computed on this machine."""

    def decode(self, vae):
        """Codes int64 (B, L) → pixels float (B, 3, S, S) in [0, 1] on the CPU, computed on this machine.

        Where `on_code` below is called, decode(codes, rows) makes pixels of a picture's upper rows.
        """

    def sampler(self, model):
        """generate_codes for this machine: (text, **settings) → codes int64 (B, L) on the CPU.

        Machines that draw a whole picture in one call do not call `on_code`.
        """
