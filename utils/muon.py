"""Muon: momentum whose update is made orthogonal, so that every direction of a matrix moves by the same amount.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the step size of Liu et al. 2025 (arXiv 2502.16982): an
update has the root mean square of one of AdamW, and one learning rate serves both. For matrices and convolution
kernels; vectors, embeddings and heads stay with AdamW. torch.optim.Muon (torch 2.9) takes no kernels and works in
bf16, which CPUs without bf16 arithmetic take fifty times as long for.
"""

import torch

ADAM_RMS = 0.2  # root mean square of AdamW's updates, in learning rates
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Muon authors' quintic
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; decoupled weight decay. Parameters of two and more dimensions, taken as
    matrices of (first, all others).
    """

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            updates = {}  # those of one shape are made orthogonal together
            for parameter in group["params"]:
                if parameter.grad is not None:
                    updates.setdefault(parameter.flatten(1).shape, []).append(
                        (parameter, self._momentum(parameter, group))
                    )
            for (rows, columns), pairs in updates.items():
                parameters, momenta = zip(*pairs)
                lr = group["lr"] * ADAM_RMS * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, self.orthogonal(momenta)):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-lr)

    def orthogonal(self, momenta):
        """Matrices of one shape → as many, of that shape."""
        return orthogonal(torch.stack(momenta))

    def _momentum(self, parameter, group):
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov's look ahead


def orthogonal(matrices):
    """(B, n, m) → the same with all singular values near 1 (between 0.7 and 1.2), by Newton–Schulz iteration.

    In bf16 on GPUs, where that is enough, in fp32 elsewhere.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the product with its own transpose is then the smaller of the two
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
