"""Adam and AdamW as torch has them, with what an IPU adds: loss scaling, dtypes of the state, gradient clipping.

They never step on the host: the executor takes a snapshot of their attributes and applies the updates on the device. An
attribute that was not given to the constructor is a constant of the compiled graph.
"""

import weakref

import torch

from .options import check_number

IN_GROUPS = ("lr", "betas", "eps", "weight_decay")
IN_OPTIMIZER = ("loss_scaling", "max_grad_norm")
DTYPES = ("accum_type", "first_order_momentum_accum_type", "second_order_momentum_accum_type")


class DeviceOptimizer:
    """What both have in common; mixed in before torch's class."""

    def __init__(self, params, **attributes):
        unknown = set(attributes) - {*IN_GROUPS, *IN_OPTIMIZER, *DTYPES}
        if unknown:
            raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
        given = {name: value for name, value in attributes.items() if value is not None}
        super().__init__(params, **{name: given[name] for name in IN_GROUPS if name in given})
        for name, default in zip(IN_OPTIMIZER, (1.0, float("inf"))):
            setattr(self, name, check_number(name, given.get(name, default)))
        self.explicit = {name for name in (*IN_GROUPS, *IN_OPTIMIZER) if name in given}
        for name in DTYPES:
            setattr(self, name, given.get(name, torch.float32))
        self._executor = lambda: None  # a weak reference to the executor that has the state on the device
        self._loaded = None  # state of a load_state_dict that the device has not taken yet

    def step(self, closure=None):
        raise RuntimeError("an IPU optimizer has no step(): the training model's call updates the weights")

    def state_dict(self):
        """Return torch's state_dict, whose `state` stays empty, and the device's state: None before anything ran."""
        state = {**super().state_dict(), "ipu_state": None, "ipu_param": None}
        executor = self._executor()
        if self._loaded is not None:
            state.update(self._loaded)
        elif executor is not None:
            state.update(executor._optimizer_state())
        return state

    def load_state_dict(self, state_dict):
        ours = {name: state_dict[name] for name in ("ipu_state", "ipu_param")}
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in ours})
        self._loaded = ours if ours["ipu_state"] is not None else None

    def _attach(self, executor):
        self._executor = weakref.ref(executor)

    def _snapshot(self):
        """Return what the device works with from now on: one dict for each group, plain numbers only."""
        groups = []
        for group in self.param_groups:
            values = {name: check_number(name, group[name]) for name in IN_GROUPS if name != "betas"}
            values["betas"] = tuple(check_number("betas", beta) for beta in group["betas"])
            values.update((name, check_number(name, getattr(self, name))) for name in IN_OPTIMIZER)
            groups.append(values)
        return groups


class Adam(DeviceOptimizer, torch.optim.Adam):
    decoupled = False


class AdamW(DeviceOptimizer, torch.optim.AdamW):
    decoupled = True


# ---- the update on the device


class Gradients:
    """One accumulator for each replica and parameter, in accum_type."""

    def __init__(self, options, dtype):
        self.options, self.dtype = options, dtype
        self.running = dtype == torch.float16  # a sum would overflow, so the mean is kept at every step
        self.sums = [{} for _ in range(options.replication_factor)]

    def add(self, replica, step, gradients):
        """Add gradients by name; step counts from 0."""
        sums = self.sums[replica]
        for name, gradient in gradients.items():
            gradient = gradient.to(self.dtype)
            if step == 0:
                sums[name] = gradient.clone()
            elif self.running:
                sums[name].mul_(step / (step + 1)).add_(gradient / (step + 1))
            else:
                sums[name].add_(gradient)

    def reduce(self, loss_scaling):
        """Return {name: fp32 mean} over micro-batches, replicas and instances, without the loss scaling."""
        total = {name: sum(sums[name].float() for sums in self.sums) for name in self.sums[0]}
        self.options._sum_over_instances(list(total.values()))
        divisor = loss_scaling * self.options.replication_factor * self.options._instances
        if not self.running:
            divisor *= self.options.Training.gradient_accumulation
        return {name: gradient / divisor for name, gradient in total.items()}


def clip_norm(gradients, limit):
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    if norm > limit:
        for gradient in gradients.values():
            gradient.mul_(limit / norm)


def new_state(weight, optimizer):
    first, second = optimizer.first_order_momentum_accum_type, optimizer.second_order_momentum_accum_type
    moments = {"Accl1": torch.zeros_like(weight, dtype=first), "Accl2": torch.zeros_like(weight, dtype=second)}
    return {**moments, "Step": torch.zeros(1)}


@torch.no_grad()
def update_weight(weight, gradient, state, settings, decoupled):
    """Apply torch's Adam, or AdamW if decoupled, in fp32 for any dtypes of weight and state."""
    lr, decay, (beta1, beta2) = settings["lr"], settings["weight_decay"], settings["betas"]
    value, first, second = weight.float(), state["Accl1"].float(), state["Accl2"].float()
    if decoupled:
        value = value * (1 - lr * decay)
    elif decay:
        gradient = gradient.add(value, alpha=decay)
    step = state["Step"].add_(1).item()
    first = first.lerp(gradient, 1 - beta1)
    second = second.mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
    denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(settings["eps"])
    weight.copy_(value.addcdiv(first, denominator, value=-lr / (1 - beta1**step)))
    state["Accl1"].copy_(first)
    state["Accl2"].copy_(second)
