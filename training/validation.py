"""Held-out pairs → losses: which batches each process takes. What an evaluation computes is the trainer's business."""

import math


def batches_of(length, samples_per_step, rank, world_size):
    """Every index of a dataset once, as lists of keys (0, index): this process's share, as many lists as the others'.

    The last lists may be shorter, or empty.
    """
    mine = [(0, index) for index in range(rank, length, world_size)]
    count = math.ceil(math.ceil(length / world_size) / samples_per_step)
    return [mine[place * samples_per_step : (place + 1) * samples_per_step] for place in range(count)]


def validate(trainer, backend, dataset):
    """Total, text and image loss of a dataset in its first captions' order, and `perplexity`, of a code."""
    order = batches_of(len(dataset), backend.samples_per_step, backend.rank, backend.world_size)
    return with_perplexity(trainer.evaluate(backend.loader(dataset, order)))


def with_perplexity(losses):
    """Losses, and `perplexity`: among how many codes the model wavers."""
    return {**losses, "perplexity": math.exp(min(losses["image"], 700))}  # above, floats have no name for it
