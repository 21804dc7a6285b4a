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
TILED_FROM = 128  # rows and columns from which on bf16 is faster on CPUs with AMX


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
            shapes: Dict[Tuple[int, ...], List[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                momenta = self._momenta(parameters, group["momentum"])
                updates = [new.view_as(old) for new, old in zip(self.orthogonal(momenta), parameters)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-group["lr"] * ADAM_RMS * max(rows, columns) ** 0.5)

    def orthogonal(self, momenta: List[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Orthogonalize matrices of one shape."""
        return orthogonal(torch.stack(momenta))

    def _momenta(self, parameters: List[torch.Tensor], momentum: float) -> List[torch.Tensor]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients: List[Any] = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_mul(gradients, 1 - momentum)  # Nesterov's
        torch._foreach_add_(ahead, averages, alpha=momentum)
        return [x.flatten(1) for x in ahead]


def has_amx() -> bool:
    """Return whether this CPU has tile units for bf16 products; False with torch 2.0, which does not use them."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _fastest_dtype(matrices: torch.Tensor) -> torch.dtype:
    if matrices.is_cuda:
        return torch.bfloat16 if torch.cuda.get_device_capability(matrices.device) >= (8, 0) else torch.float16
    large = min(matrices.shape[-2:]) >= TILED_FROM
    return torch.bfloat16 if large and has_amx() else torch.float32


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of (B, n, m) matrices near 1 (between 0.7 and 1.2) by Newton–Schulz iteration.

    Computes in bf16 on GPUs (fp16 before Ampere, which emulates bf16) and, for large matrices, on CPUs with AMX, where
    that takes a third of the time; in fp32 elsewhere.
    """
    x = matrices.to(_fastest_dtype(matrices))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the product with its own transpose is then the smaller of the two
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
