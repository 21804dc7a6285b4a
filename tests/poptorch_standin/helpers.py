"""What the tests of the stand-in share: small models, options and executors of them, and training in plain torch."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Two layers and a loss; `dropout` draws on the device, `calls` is a buffer that forward writes to."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.dropout = nn.Linear(4, 8), nn.Linear(8, 3), dropout
        self.register_buffer("calls", torch.zeros(1))

    def scores(self, x):
        return self.second(F.dropout(torch.relu(self.first(x)), self.dropout))

    def forward(self, x, y):
        self.calls.add_(1)
        out = self.scores(x)
        return F.cross_entropy(out, y), out


class Through(nn.Module):
    """forward is a function of the module and its inputs."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def batch_of(size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def options_of(poptorch, iterations=1, accumulation=1, replicas=1, mode=None):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas).randomSeed(3)
    options.Training.gradientAccumulation(accumulation)
    return options if mode is None else options.outputMode(mode)


def trainer_of(poptorch, model=None, options=None, **attributes):
    """An executor, and the host model and optimizer that it was made of."""
    model = Net() if model is None else model
    optimizer = poptorch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **attributes})
    return poptorch.trainingModel(model, options, optimizer), model, optimizer


def infer(poptorch, function, *inputs, options=None, **members):
    return poptorch.inferenceModel(Through(function, **members), options)(*inputs)


def torch_training(kind, batches, accumulation, clip=None, model=None, **attributes):
    """The losses of each step and the weights after them, one optimizer step per entry of `batches`."""
    model = Net() if model is None else model
    optimizer = getattr(torch.optim, kind)(model.parameters(), **attributes)
    for x, y in batches:
        optimizer.zero_grad()
        for rows in range(0, len(x), len(x) // accumulation):
            part = slice(rows, rows + len(x) // accumulation)
            (F.cross_entropy(model.scores(x[part]), y[part]) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return dict(model.named_parameters())


def assert_same_weights(found, wanted, tolerance=1e-6):
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name].float(), weight.detach().float(), rtol=0, atol=tolerance)
