"""Train on IPUs: one call of the device makes one optimizer update, with micro-batches, replicas and all."""

import contextlib
import copy
import logging
from typing import TYPE_CHECKING, Any, ContextManager, Dict, Iterable, List, Sequence

from torch import Tensor

from backends.base import DeviceLost, LossValues, Trainer
from models.dalle import DALLE
from models.pipeline_dalle import WrappedDALLE
from utils.optimization import load_keeping_flags

if TYPE_CHECKING:
    from backends.ipu.backend import IpuTrainingBackend

logger = logging.getLogger("minidalle")


class IpuTrainer(Trainer):
    """PopTorch's training and evaluation programs of one model, and their optimizer."""

    def __init__(self, model: DALLE, backend: "IpuTrainingBackend"):
        self.backend = backend
        self.vqgan = {f"vae.{name}": tensor for name, tensor in model.vae.state_dict().items()}
        self.vqgan_on_device = backend.settings.no_codes_cache
        model = copy.deepcopy(model, {} if self.vqgan_on_device else {id(model.vae): None}).train()
        self.wrapped = WrappedDALLE(model, backend.places, backend.settings.embedding_serialization_factor)
        if backend.half:
            self.wrapped.half()
        self.optimizer = backend.optimizer(self.wrapped)
        self.executor = backend.training_model(self.wrapped, self.optimizer)
        self.evaluator: Any = None
        self.lr = backend.settings.learning_rate

    def compile(self, batch: Any) -> None:
        """Compile the training program; ValueError if the batch is not what one step takes."""
        rows, expected = len(batch[0]), self.backend.samples_per_step
        if rows != expected:
            raise ValueError(
                f"a batch of {rows} samples; --batch-size × --gradient-accumulation × --replication-factor × "
                f"--device-iterations are {expected}"
            )
        self.backend.release()
        self.executor.setOptimizer(self.optimizer)
        with self.backend.device_errors("the model does not compile"):
            self.executor.compile(*batch)

    def device_errors(self, problem: str) -> ContextManager[None]:
        """Return a context that turns errors of the compiled program into DeviceLost."""
        return self.backend.device_errors(problem, DeviceLost)

    def step(self, batch: Any) -> LossValues:
        with self.device_errors("training stopped"):
            sums = self.executor(*batch)
        return self.means(sums, len(batch[0]))

    def evaluate(self, batches: Iterable) -> LossValues:
        """Return the mean losses without dropout, on the IPUs that otherwise train."""
        losses = []
        with self.device_errors("validation stopped"):
            training = self.executor.isAttachedToDevice()
            if training:  # also copies the current weights to the host
                self.executor.detachFromDevice()
            try:
                for batch in batches:
                    losses.append(self.means(self.evaluate_batch(batch), len(batch[0])))
            finally:  # the samples may end, or Ctrl-C may come
                if self.evaluator is not None and self.evaluator.isAttachedToDevice():
                    self.evaluator.detachFromDevice()
                if training:
                    self.executor.attachToDevice()
        return {name: sum(found[name] for found in losses) / len(losses) for name in losses[0]}

    def evaluate_batch(self, batch: Any) -> Sequence[Tensor]:
        """Return the sums of the losses of a call's micro-batches."""
        if self.evaluator is None:
            evaluator = self.backend.evaluation_model(self.wrapped, len(batch[0]))
            evaluator.compile(*batch)
            self.wrapped.train()
            self.evaluator = evaluator
        elif not self.evaluator.isAttachedToDevice():
            self.evaluator.attachToDevice()
        return self.evaluator(*batch)

    def means(self, sums: Sequence[Tensor], samples: int) -> LossValues:
        """Return the means over all instances of losses summed over a call's micro-batches, one row per replica."""
        names = ("total", "text", "image")
        if self.backend.settings.synthetic_data:  # nothing is read back from the device
            return dict.fromkeys(names, 0.0)
        means = [float(part.float().sum()) * self.backend.batch_size / samples for part in sums]
        return dict(zip(names, self.backend.instances.mean(means)))

    def sampler(self) -> None:
        """Return None: the IPUs hold the training program."""

    def set_lr(self, lr: float) -> None:
        if lr == self.lr:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.device_errors("training stopped"):
            self.executor.setOptimizer(self.optimizer)  # or the device keeps the old one
        self.lr = lr

    def state_dict(self) -> Dict[str, Any]:
        """Return weights in fp32 under the DALLE's own names, and PopTorch's optimizer state."""
        with self.device_errors("the weights cannot be read"):
            trained = {name.partition(".")[2]: tensor for name, tensor in self.executor.state_dict().items()}
            trained = {name: tensor.detach().float().cpu() for name, tensor in trained.items()}
            opt_state = {**self.optimizer.state_dict(), "parameters": self.parameters()}
        return {"weights": {**trained, **self.vqgan}, "opt_state": [opt_state]}

    def parameters(self) -> List[str]:
        """Describe the parameters that the optimizer's state belongs to; another partition has other names."""
        return [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in self.wrapped.named_parameters() if p.requires_grad]

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load any backend's weights, and the optimizer's state if it fits this model on the device."""
        kept = {
            f"model.{name}": tensor
            for name, tensor in state["weights"].items()
            if self.vqgan_on_device or not name.startswith("vae.")
        }
        self.executor.load_state_dict(kept)
        opt_state = state.get("opt_state")
        if opt_state is None:
            return
        try:
            (saved,) = opt_state
            if not saved.get("ipu_state") or saved.get("parameters") != self.parameters():
                raise ValueError
            load_keeping_flags(self.optimizer, {name: saved[name] for name in saved if name != "parameters"})
            self.executor.setOptimizer(self.optimizer)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            logger.warning("the checkpoint's optimizer state is not for this optimizer on IPUs; it starts afresh")

    def close(self) -> None:
        for executor in (self.executor, self.evaluator):
            if executor is not None:
                # It reads the weights, which fails if the device has failed before.
                with contextlib.suppress(DeviceLost), self.device_errors("closing"):
                    executor.destroy()
