"""Muon: momentum with orthogonalized updates, so that all directions of a matrix move by the same amount.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the step size of Liu et al. 2025 (arXiv:2502.16982): an
update has the root mean square of AdamW's, so one learning rate fits both. It is for matrices and convolution kernels;
vectors, embeddings and heads stay with AdamW. torch.optim.Muon (torch 2.9) takes no kernels and computes in bf16, which
is fifty times slower on CPUs without bf16 arithmetic.
"""

from typing import Any, Dict, Iterable, List, Tuple

import torch

ADAM_RMS = 0.2  # root mean square of an AdamW update, in units of the learning rate
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Muon authors' quintic
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum with decoupled weight decay.

    Parameters have two or more dimensions and count as matrices of (first, all others).
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one update; `closure` is not used."""
        for group in self.param_groups:
            # By shape: momenta of one shape are orthogonalized together.
            shapes: Dict[Tuple[int, ...], List[Tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self._momentum(parameter, parameter.grad, group["momentum"])
                    shapes.setdefault(momentum.shape, []).append((parameter, momentum))
            for (rows, columns), pairs in shapes.items():
                updates = self.orthogonal([momentum for _, momentum in pairs])
                lr = group["lr"] * ADAM_RMS * max(rows, columns) ** 0.5
                for (parameter, _), update in zip(pairs, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-lr)

    def orthogonal(self, momenta: List[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Orthogonalize matrices of one shape."""
        return orthogonal(torch.stack(momenta))

    def _momentum(self, parameter: torch.Tensor, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum).flatten(1)  # Nesterov's look ahead


def has_amx() -> bool:
    """Return whether this CPU has tile units for bf16 products; False with torch 2.0, which does not use them."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _fastest_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.bfloat16 if has_amx() else torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of (B, n, m) matrices near 1 (between 0.7 and 1.2) by Newton–Schulz iteration.

    Computes in bf16 on GPUs (fp16 before Ampere, which emulates bf16) and on CPUs with AMX, where that takes a third of
    the time, and in fp32 elsewhere.
    """
    x = matrices.to(_fastest_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the product with its own transpose is then the smaller of the two
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
