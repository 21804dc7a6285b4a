"""Parameter groups and learning-rate schedules; the backends have the optimizers."""

import math
import re
from typing import Any, Dict, List

import torch

from utils.checkpoint import model_weights


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> List[Dict[str, Any]]:
    """Return the trainable parameters as two groups for torch: matrices with weight_decay, all others without.

    LayerScale (1, 1, dim) and the axial positions (1, H, 1, dim) count as vectors. The order within a group is that of
    model.parameters().
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    others = [parameter for parameter in trained if parameter.dim() != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def load_keeping_flags(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load a saved state into an optimizer, but keep this run's decay rates, weight decay and the like.

    Raises:
        ValueError: a moment has another shape than its parameter; nothing is changed then. torch would only notice
            during an update.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        for moment in moments.values():
            if torch.is_tensor(moment) and moment.dim() and moment.shape != parameters[number].shape:
                raise ValueError(f"a moment of {tuple(moment.shape)} for {tuple(parameters[number].shape)}")
    flags = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    groups = [{**saved, **own} for saved, own in zip(state["param_groups"], flags)]  # this run's flags win
    optimizer.load_state_dict({**state, "param_groups": groups})


def convert_ipu_state(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, ipu_state: Dict[str, torch.Tensor]
) -> Dict[str, Any]:
    """Return the `ipu_state` of PopTorch's Adam, keyed by <moment>___<parameter>, as torch's Adam loads it.

    Raises:
        LookupError: a parameter of the model has no moments there.
        ValueError: the pieces of a split embedding do not fit.
    """
    parts: Dict[str, Dict[str, torch.Tensor]] = {"Accl1": {}, "Accl2": {}, "Step": {}}
    for key, value in ipu_state.items():
        moment, _, name = key.partition("___")
        # models.pipeline_dalle and the reference application name the pieces of a split embedding differently.
        parts.setdefault(moment, {})[re.sub(r"\.piece_(\d+)$", r".split_embeddings.\1.weight", name)] = value
    # Without bias correction, nothing counts the steps there; after so many, torch corrects nothing, either.
    step = max((float(value.flatten()[0]) for value in parts["Step"].values()), default=1e6)
    first, second = model_weights(parts["Accl1"]), model_weights(parts["Accl2"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {"step": torch.tensor(step), "exp_avg": first[name], "exp_avg_sq": second[name]}
        for number, name in enumerate(parameters)
    }
    return {**optimizer.state_dict(), "state": state}


def multi_step(epoch: int, epochs: int) -> float:
    """Warm up linearly over the first fifth of the epochs, then 1, then 0.1 for the second half of the rest."""
    warmup = int(0.2 * epochs)
    if epoch < warmup:
        return (1 + epoch) / (1 + warmup)
    return 1.0 if epoch < warmup + (epochs - warmup) / 2 else 0.1


def constant(epoch: int, epochs: int) -> float:
    """Warm up as multi_step does, then 1."""
    warmup = int(0.2 * epochs)
    return (1 + epoch) / (1 + warmup) if epoch < warmup else 1.0


def cosine(step: int, steps: int, warmup: int) -> float:
    """Warm up linearly over `warmup` steps, then follow half a cosine that would reach 0 one step after the last."""
    if step < warmup:
        return (1 + step) / (1 + warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trapezoid(step: int, steps: int, warmup: int) -> float:
    """Warm up linearly over `warmup` steps, then 1, then fall linearly towards 0 over the second half of the run."""
    rising = (1 + step) / (1 + warmup)
    falling = 2 * (steps - step) / steps
    return min(rising, 1.0, falling)


class LearningRate:
    """The learning rate of each update; `name` is a value of --lr-scheduler.

    ReduceLROnPlateau (factor 0.5, patience 10, cooldown 10, minimum 1e-6) depends on the losses given to epoch_ended,
    the others only on step and epoch.
    """

    def __init__(self, name: str, peak: float, *, epochs: int, steps: int, warmup_steps: int = 0):
        self.name, self.peak, self.epochs, self.steps, self.warmup_steps = name, peak, epochs, steps, warmup_steps
        # torch's scheduler does the bookkeeping, on a parameter that is not trained.
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=peak)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, factor=0.5, patience=10, cooldown=10, min_lr=1e-6
        )

    def at(self, step: int, epoch: int) -> float:
        """Return the learning rate of update `step` in `epoch`, both from 0."""
        by_epoch = {"multi_step": multi_step, "constant": constant}
        by_step = {"cosine": cosine, "trapezoid": trapezoid}
        if self.name in by_epoch:
            return self.peak * by_epoch[self.name](epoch, self.epochs)
        if self.name in by_step:
            return self.peak * by_step[self.name](step, self.steps, self.warmup_steps)
        return self._holder.param_groups[0]["lr"]

    def epoch_ended(self, loss: float) -> None:
        """Take the validation loss, or the mean training loss, of the epoch that ended."""
        if self.name == "ReduceLROnPlateau":
            self._plateau.step(loss)

    def state_dict(self) -> Dict[str, Any]:
        """Return the state in plain values."""
        plain = (int, float, list)
        state = {key: value for key, value in self._plateau.state_dict().items() if isinstance(value, plain)}
        return {"name": self.name, "lr": self._holder.param_groups[0]["lr"], "plateau": state}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load the state of a scheduler of the same name; ignore that of another.

        Of the reference application's plateau only the rate counts: it compared losses of single micro-batches.
        """
        if state.get("name") == self.name:
            self._holder.param_groups[0]["lr"] = state["lr"]
            self._plateau.load_state_dict(state["plateau"])
        elif self.name == "ReduceLROnPlateau" and isinstance(state.get("_last_lr"), list):
            self._holder.param_groups[0]["lr"] = float(state["_last_lr"][0])
