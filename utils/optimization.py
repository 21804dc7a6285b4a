"""Which parameters decay, and how the learning rate moves. The optimizers themselves belong to the backends."""

import math

import torch


def parameter_groups(model, weight_decay):
    """Trainable parameters as two torch groups: matrices with weight_decay, everything else without.

    LayerScale (1, 1, dim) and the axial positions (1, H, 1, dim) are vectors for all their dimensions, so they do not
    decay. Order is that of model.parameters() within each group, the same on every machine.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    others = [parameter for parameter in trained if parameter.dim() != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def load_keeping_flags(optimizer, state):
    """A saved state into an optimizer, whose decay rates, weight decay and the like stay those of this run's flags.

    ValueError, and nothing is changed, where a moment has not its parameter's shape: torch would notice in the middle
    of an update.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        for moment in moments.values():
            if torch.is_tensor(moment) and moment.dim() and moment.shape != parameters[number].shape:
                raise ValueError(f"a moment of {tuple(moment.shape)} for {tuple(parameters[number].shape)}")
    flags = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    groups = [{**saved, **own} for saved, own in zip(state["param_groups"], flags)]  # before: how it is kept is a flag
    optimizer.load_state_dict({**state, "param_groups": groups})


def multi_step(epoch, epochs):
    """Linear warm-up over the first fifth of the epochs, then 1, then 0.1 for the second half of what is left."""
    warmup = int(0.2 * epochs)
    if epoch < warmup:
        return (1 + epoch) / (1 + warmup)
    return 1.0 if epoch < warmup + (epochs - warmup) / 2 else 0.1


def constant(epoch, epochs):
    """multi_step's warm-up, then 1."""
    warmup = int(0.2 * epochs)
    return (1 + epoch) / (1 + warmup) if epoch < warmup else 1.0


def cosine(step, steps, warmup):
    """Linear warm-up over `warmup` steps, then a half cosine that would touch 0 one step after the last."""
    if step < warmup:
        return (1 + step) / (1 + warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trapezoid(step, steps, warmup):
    """Linear warm-up over `warmup` steps, then 1, then linearly towards 0 over the second half of the run."""
    rising = (1 + step) / (1 + warmup)
    falling = 2 * (steps - step) / steps
    return min(rising, 1.0, falling)


class LearningRate:
    """The learning rate of each update, correct from the first; `name` is one of --lr-scheduler's.

    Asked before the update: at(step, epoch). Told after every epoch: epoch_ended(loss on held-out pairs, or the mean
    of the training loss), which only ReduceLROnPlateau heeds (factor 0.5, patience 10, cooldown 10, never below 1e-6).
    """

    def __init__(self, name, peak, *, epochs, steps, warmup_steps=0):
        self.name, self.peak, self.epochs, self.steps, self.warmup_steps = name, peak, epochs, steps, warmup_steps
        # torch's own scheduler, on a parameter nobody trains: it is the bookkeeping that is wanted.
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=peak)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, factor=0.5, patience=10, cooldown=10, min_lr=1e-6
        )

    def at(self, step, epoch):
        """Learning rate of update `step` (from 0), which lies in `epoch` (from 0)."""
        by_epoch = {"multi_step": multi_step, "constant": constant}
        by_step = {"cosine": cosine, "trapezoid": trapezoid}
        if self.name in by_epoch:
            return self.peak * by_epoch[self.name](epoch, self.epochs)
        if self.name in by_step:
            return self.peak * by_step[self.name](step, self.steps, self.warmup_steps)
        return self._holder.param_groups[0]["lr"]

    def epoch_ended(self, loss):
        if self.name == "ReduceLROnPlateau":
            self._plateau.step(loss)

    def state_dict(self):
        plain = (int, float, list)
        state = {key: value for key, value in self._plateau.state_dict().items() if isinstance(value, plain)}
        return {"name": self.name, "lr": self._holder.param_groups[0]["lr"], "plateau": state}

    def load_state_dict(self, state):
        """State of the same scheduler; another one's is left aside, since it then starts afresh."""
        if state.get("name") == self.name:
            self._holder.param_groups[0]["lr"] = state["lr"]
            self._plateau.load_state_dict(state["plateau"])
