"""Estimate memory and time of a model on IPUs by arithmetic, without code, constants and what a compiler adds."""

from typing import Dict, List, NamedTuple, Sequence

from torch import nn

from models.dalle import DALLE
from models.pipeline_dalle import AxialAttention, Placement, axial_attention, stages

MEMORY = 1472 * 624 * 1024  # bytes of a Mk2 IPU
PEAK = {2: 250e12, 4: 62.5e12}  # operations per second of a Mk2 IPU, by bytes of a number
SAMPLER_SHARE = 0.6  # of the memory that a sampler's tensors may take; the rest is for code and temporary values
MAX_SEQUENCES = 32  # of a sampler's call, from which on more are no faster


def sampler_memory(model: DALLE, sequences: int, size: int) -> Dict[str, int]:
    """Return the bytes of a StaticSampler's tensors by kind; `size` is the bytes of a number."""
    attention = model.transformer.layers[0][0].fn.fn
    positions = model.text_seq_len + model.image_seq_len
    layers, inner = len(model.transformer.layers), attention.heads * attention.dim_head
    return {
        "weights": size * trained_parameters(model),
        "keys and values": 2 * layers * positions * inner * size * sequences,
        "noise": 4 * model.image_seq_len * model.num_image_tokens * sequences,
    }


def sampler_sequences(model: DALLE, size: int) -> int:
    """Return how many sequences a call of a StaticSampler can compute: a power of two from 2 on."""
    sequences = MAX_SEQUENCES
    while sequences > 2 and sum(sampler_memory(model, sequences, size).values()) > SAMPLER_SHARE * MEMORY:
        sequences //= 2
    return sequences


def trained_parameters(module: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Cost(NamedTuple):
    """What a module needs when it trains.

    Attributes:
        parameters: trained ones.
        frozen: parameters that are not trained.
        operations: multiplications and additions of a micro-batch's forward pass.
        kept: bytes of a micro-batch that are kept for the backward pass.
        temporary: bytes that are alive at once in the backward pass.
    """

    parameters: int
    frozen: int = 0
    operations: float = 0.0
    kept: int = 0
    temporary: int = 0


class Training(NamedTuple):
    """What decides a stage's memory in training: bytes of a number, of Adam's moments per parameter, and the batch."""

    size: int
    moments: float
    batch_size: int


class Stage(NamedTuple):
    """The estimate of one pipeline stage.

    Attributes:
        memory: bytes by kind.
        seconds: of a micro-batch, forward and backward, at the IPU's peak; without the VQGAN.
    """

    ipu: int
    memory: Dict[str, float]
    seconds: float


def module_costs(model: DALLE, modules: Sequence[str], training: Training) -> Dict[str, Cost]:
    """Return the cost of each module of a placement, by its name."""
    batch, size = training.batch_size, training.size
    positions, dim = model.text_seq_len + model.image_seq_len, model.text_emb.embedding_dim
    activation = batch * positions * dim * size  # bytes
    logits = batch * (model.text_seq_len * model.num_text_tokens + model.image_seq_len * model.num_image_tokens)
    costs = {}
    for name in modules:
        module = model.get_submodule(name)
        parameters = trained_parameters(module)
        if name == "vae":
            costs[name] = Cost(0, sum(parameter.numel() for parameter in module.parameters()))
        elif name == "to_logits":
            # Logits and their gradient, and both of their log-softmax in fp32.
            costs[name] = Cost(parameters, 0, 2 * logits * dim, 0, logits * 2 * (size + 4))
        elif name.startswith("transformer."):
            costs[name] = layer_cost(module, parameters, activation, model, training)
        else:
            costs[name] = Cost(parameters, 0, 0, activation, 2 * activation)
    return costs


def layer_cost(layer: nn.Module, parameters: int, activation: int, model: DALLE, training: Training) -> Cost:
    """Return a layer's cost; `activation` is the bytes of its output."""
    attention = layer[0].fn.fn  # type: ignore[index]
    size, rows = training.size, activation // training.size // model.text_emb.embedding_dim
    inner = attention.heads * attention.dim_head
    axial = axial_attention(attention.mask, model.text_seq_len + 1, model.fmap_size)
    visible = AxialAttention.scores(model.text_seq_len + 1, model.fmap_size) if axial else attention.mask.numel()
    scores = training.batch_size * attention.heads * visible
    # Three tensors of scores: before the softmax, after it, and a gradient.
    attending = 3 * size * scores + 4 * rows * inner * size
    feeding = 2 * 12 * activation  # 8·dim before and 4·dim after the gate, and their gradients
    operations = 2 * rows * parameters + 4 * scores * attention.dim_head
    return Cost(parameters, 0, operations, activation, max(attending, feeding))


def estimate_stages(places: Placement, costs: Dict[str, Cost], training: Training, elsewhere: int) -> List[Stage]:
    """Return the estimate of each stage.

    Args:
        elsewhere: trained parameters of no placed module, which stage 0 holds.
    """
    found = stages(places)
    return [
        stage_estimate(ipu, [costs[name] for name in names], number, len(found), training, 0 if number else elsewhere)
        for number, (ipu, names) in enumerate(found)
    ]


def stage_estimate(
    ipu: int, costs: Sequence[Cost], number: int, count: int, training: Training, more: int = 0
) -> Stage:
    """Return the estimate of stage `number` of `count`, which consists of modules with these costs."""
    parameters = more + sum(cost.parameters for cost in costs)
    in_flight = 2 * (count - 1 - number) + 1  # micro-batches between their forward and their backward pass
    memory = {
        "weights": training.size * (parameters + sum(cost.frozen for cost in costs)),
        "gradients": training.size * parameters,
        "optimizer": training.moments * parameters,
        "stash": in_flight * sum(cost.kept for cost in costs),
        "temporary": max((cost.temporary for cost in costs), default=0),
    }
    # Forward, forward once more, because activations are recomputed, and twice as much for the gradients.
    return Stage(ipu, memory, 4 * sum(cost.operations for cost in costs) / PEAK[training.size])
