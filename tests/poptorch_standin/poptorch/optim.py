"""Adam and AdamW as torch has them, with what an IPU adds: loss scaling, dtypes of the state, clipping of gradients.

They never step on the host: the executor takes a snapshot of their attributes and applies updates on the device. An
attribute that was not given to the constructor is a constant of the compiled graph.
"""

import warnings
import weakref

import torch

from . import checks

IN_GROUPS = ("lr", "betas", "eps", "weight_decay")
IN_OPTIMIZER = ("loss_scaling", "max_grad_norm")
DTYPES = ("accum_type", "first_order_momentum_accum_type", "second_order_momentum_accum_type")
# What torch's own optimizers and schedulers keep in a group beside the above; the device has no use for it.
TORCH_KEYS = {
    "params",
    "amsgrad",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
}


class DeviceOptimizer:
    """What both have in common; mixed in before torch's class."""

    def __init__(self, params, amsgrad, attributes, extras):
        if amsgrad:
            raise ValueError("amsgrad is not supported")
        given = {name: value for name, value in attributes.items() if value is not None}
        super().__init__(params, **given)
        self.explicit = {*given, *(name for name in IN_OPTIMIZER if extras[name] is not None)}
        self.loss_scaling = checks.number("loss_scaling", _or(extras["loss_scaling"], 1.0))
        self.max_grad_norm = checks.number("max_grad_norm", _or(extras["max_grad_norm"], float("inf")))
        for name in DTYPES:
            setattr(self, name, checks.precision(name, _or(extras[name], torch.float32)))
        self._executor = lambda: None  # a weak reference to who holds the state on the device
        self._loaded = None  # state that a load_state_dict brought and the device has not taken yet

    def step(self, closure=None):
        raise RuntimeError("an IPU optimizer has no step(): the training model's call updates the weights")

    def state_dict(self):
        """torch's, whose `state` stays empty, and what the device holds; None and None before anything ran."""
        state = super().state_dict()
        executor = self._executor()
        state["ipu_state"], state["ipu_param"] = None, None
        if self._loaded is not None:
            state.update(self._loaded)
        elif executor is not None:
            state.update(executor._optimizer_state())
        return state

    def load_state_dict(self, state_dict):
        if "ipu_state" not in state_dict or "ipu_param" not in state_dict:
            raise ValueError("Only IPU optimizer states can be loaded onto the IPU.")
        ours = {name: state_dict[name] for name in ("ipu_state", "ipu_param")}
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in ours})
        self._loaded = ours if ours["ipu_state"] is not None else None

    def _attach(self, executor):
        self._executor = weakref.ref(executor)

    def _snapshot(self, relaxed):
        """What the device works with from now on: a dict a group, plain numbers only."""
        groups = []
        for group in self.param_groups:
            unexpected = set(group) - TORCH_KEYS - set(IN_GROUPS)
            if unexpected and not relaxed:
                warnings.warn(f"ignored optimizer attributes: {', '.join(sorted(unexpected))}", stacklevel=4)
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError("amsgrad and maximize are not supported")
            values = {name: checks.number(name, group[name]) for name in IN_GROUPS if name != "betas"}
            values["betas"] = tuple(checks.number("betas", beta) for beta in group["betas"])
            values.update((name, checks.number(name, getattr(self, name))) for name in IN_OPTIMIZER)
            groups.append(values)
        return groups


def _or(value, default):
    return default if value is None else value


class Adam(DeviceOptimizer, torch.optim.Adam):
    decoupled = False

    def __init__(
        self,
        params,
        lr=None,
        betas=None,
        eps=None,
        weight_decay=None,
        amsgrad=None,
        loss_scaling=None,
        accum_type=None,
        first_order_momentum_accum_type=None,
        second_order_momentum_accum_type=None,
        max_grad_norm=None,
    ):
        attributes = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        extras = {
            "loss_scaling": loss_scaling,
            "accum_type": accum_type,
            "first_order_momentum_accum_type": first_order_momentum_accum_type,
            "second_order_momentum_accum_type": second_order_momentum_accum_type,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, amsgrad, attributes, extras)


class AdamW(DeviceOptimizer, torch.optim.AdamW):
    """bias_correction: taken and without effect when False, as in PopTorch 3.4."""

    decoupled = True

    def __init__(
        self,
        params,
        lr=None,
        betas=None,
        eps=None,
        weight_decay=None,
        amsgrad=None,
        loss_scaling=None,
        bias_correction=None,
        accum_type=None,
        first_order_momentum_accum_type=None,
        second_order_momentum_accum_type=None,
        max_grad_norm=None,
    ):
        if bias_correction is not None:
            checks.of_type("bias_correction", bias_correction, bool)
        attributes = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        extras = {
            "loss_scaling": loss_scaling,
            "accum_type": accum_type,
            "first_order_momentum_accum_type": first_order_momentum_accum_type,
            "second_order_momentum_accum_type": second_order_momentum_accum_type,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, amsgrad, attributes, extras)
