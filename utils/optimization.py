"""States of optimizers, and a schedule; the backends have the optimizers."""

import math
import re
from typing import Any, Dict

import torch

from utils.checkpoint import model_weights


def load_keeping_flags(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load a saved state into an optimizer, but keep this run's decay rates, weight decay and the like.

    ValueError, and no change, if a moment has another shape than its parameter; torch would notice during an update.
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
    # Without bias correction, nothing counts the steps there; after a million, torch corrects nothing, either.
    step = max((float(value.flatten()[0]) for value in parts["Step"].values()), default=1e6)
    first, second = model_weights(parts["Accl1"]), model_weights(parts["Accl2"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {"step": torch.tensor(step), "exp_avg": first[name], "exp_avg_sq": second[name]}
        for number, name in enumerate(parameters)
    }
    return {**optimizer.state_dict(), "state": state}


def cosine(step: int, steps: int, warmup: int) -> float:
    """Warm up linearly over `warmup` steps, then follow half a cosine that would reach 0 one step after the last."""
    if step < warmup:
        return (1 + step) / (1 + warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
