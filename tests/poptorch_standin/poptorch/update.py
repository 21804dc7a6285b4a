"""Gradients of one update: accumulated, reduced over replicas and instances, clipped, and turned into Adam's step."""

import torch

from .enums import MeanReductionStrategy, ReductionType


class Gradients:
    """One accumulator a replica and parameter, in accum_type."""

    def __init__(self, options, dtype):
        self.options, self.dtype = options, dtype
        self.mean = options.Training._values["reduction"] is ReductionType.Mean
        # fp16 would overflow in a sum, so its mean is kept as one at every step.
        asked = options.Training._values["strategy"] is MeanReductionStrategy.Running
        self.running = self.mean and (asked or dtype == torch.float16)
        self.sums = [{} for _ in range(options.replication_factor)]

    def add(self, replica, step, gradients):
        """step counts from 0; a parameter without a gradient is None."""
        sums = self.sums[replica]
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            gradient = gradient.to(self.dtype)
            if step == 0:
                sums[name] = gradient.clone()
            elif self.running:
                sums[name].mul_(step / (step + 1)).add_(gradient / (step + 1))
            else:
                sums[name].add_(gradient)

    def reduced(self, loss_scaling):
        """{name: fp32 gradient} over all micro-batches, replicas and instances, without the loss scaling."""
        total = {name: sum(sums[name].float() for sums in self.sums) for name in self.sums[0]}
        self.options._sum_over_instances(list(total.values()))
        divisor = loss_scaling
        if self.mean:
            divisor *= self.options.replication_factor * self.options._instances
            if not self.running:
                divisor *= self.options.Training.gradient_accumulation
        return {name: gradient / divisor for name, gradient in total.items()}


def clip(gradients, limit):
    if limit == float("inf"):
        return
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    if norm > limit:
        for gradient in gradients.values():
            gradient.mul_(limit / norm)


def new_state(weight, first_dtype, second_dtype):
    first, second = (torch.zeros_like(weight, dtype=dtype) for dtype in (first_dtype, second_dtype))
    return {"Accl1": first, "Accl2": second, "Step": torch.zeros(1)}


@torch.no_grad()
def adam(weight, gradient, state, settings, decoupled):
    """torch's Adam, or AdamW when decoupled, in fp32 whatever the dtypes of weight and state."""
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
