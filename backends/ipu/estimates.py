"""Estimate memory and time of a model on IPUs by arithmetic, without code, constants and what a compiler adds."""

import copy
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import nn

from backends.base import StageEstimate
from models.dalle import DALLE
from models.pipeline_dalle import AxialAttention, Placement, axial_attention, stages

MEMORY = 1472 * 624 * 1024  # bytes of a Mk2 IPU
PEAK = {2: 250e12, 4: 62.5e12}  # operations per second of a Mk2 IPU, by bytes of a number
SAMPLER_SHARE = 0.6  # of the memory that a sampler's tensors may take; the rest is for code and temporary values
LAYERS_SHARE = 0.9  # of the memory that a stage's tensors may take if --layers-per-ipu auto places layers
MAX_SEQUENCES = 32  # of a sampler's call, from which on more are no faster


def sampler_memory(model: DALLE, sequences: int, size: int) -> Dict[str, int]:
    """Return the bytes of a StaticSampler's tensors by kind; `size` is the bytes of a number."""
    attention = model.transformer.layers[0].attention
    positions = model.text_seq_len + model.image_seq_len
    layers, inner = len(model.transformer.layers), attention.heads * attention.dim_head
    return {
        "weights": size * trained_parameters(model),
        "keys and values": 2 * layers * positions * inner * size * sequences,
        "noise": 4 * model.image_seq_len * model.num_image_tokens * sequences,
    }


def describe_sampler(model: DALLE, sequences: int, size: int) -> str:
    """Return a line on what a sampler computes in a call and takes of an IPU's memory."""
    memory = sampler_memory(model, sequences, size)
    parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in memory.items())
    return (
        f"{sequences} sequences a call (a guided image is two): about {sum(memory.values()) / 1e6:.0f} of "
        f"{MEMORY / 1e6:.0f} MB of an IPU: {parts}"
    )


def sampler_sequences(model: DALLE, size: int) -> int:
    """Return how many sequences a call of a StaticSampler can compute: a power of two from 2 on."""
    sequences = MAX_SEQUENCES
    while sequences > 2 and sum(sampler_memory(model, sequences, size).values()) > SAMPLER_SHARE * MEMORY:
        sequences //= 2
    return sequences


def trained_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Cost(NamedTuple):
    """What a module needs when it trains."""

    parameters: int  # trained ones
    frozen: int = 0  # parameters that are not trained
    operations: float = 0.0  # multiplications and additions of a micro-batch, forward and backward
    kept: int = 0  # bytes of a micro-batch that the backward pass needs
    temporary: int = 0  # bytes that are alive at once in the backward pass


class Training(NamedTuple):
    """What decides memory and time besides the model."""

    size: int  # bytes of a number
    moments: float  # bytes of the optimizer's state per parameter
    batch_size: int  # samples of a micro-batch


def training_of(settings: Namespace, half: bool, replicas: int) -> Training:
    """Return what train.py's flags decide; `replicas` may share the optimizer's state."""
    moments = 0.0 if settings.optimizer_state_offchip else 6 if settings.enable_half_first_order_momentum else 8
    return Training(2 if half else 4, moments / replicas if settings.enable_rts else moments, settings.batch_size)


# Forward, forward once more, because activations are recomputed, and twice as much for the gradients.
PASSES = 4


def module_costs(model: DALLE, training: Training, pixels: bool) -> Dict[str, Cost]:
    """Return the costs of the modules that a placement names; the rest, such as positions, has the name "".

    Args:
        pixels: whether the VQGAN encodes in every step.
    """
    batch, size = training.batch_size, training.size
    positions, dim = model.text_seq_len + model.image_seq_len, model.text_emb.embedding_dim
    activation = batch * positions * dim * size  # bytes
    logits = batch * (model.text_seq_len * model.num_text_tokens + model.image_seq_len * model.num_image_tokens)
    costs = {}
    layers = [f"transformer.layers.{number}" for number in range(len(model.transformer.layers))]
    for name in [*(["vae"] if pixels else []), "text_emb", "image_emb", *layers, "to_logits"]:
        module = model.get_submodule(name)
        parameters = trained_parameters(module)
        if name == "vae":
            encoder = encoder_cost(module)
            costs[name] = encoder._replace(operations=batch * encoder.operations)
        elif name == "to_logits":
            # Logits and their gradient, and both of their log-softmax in fp32.
            costs[name] = Cost(parameters, 0, PASSES * 2 * logits * dim, 0, logits * 2 * (size + 4))
        elif name.startswith("transformer."):
            costs[name] = layer_cost(module, parameters, activation, model, training)
        else:
            costs[name] = Cost(parameters, 0, 0, activation, 2 * activation)
    costs[""] = Cost(trained_parameters(model) - sum(cost.parameters for cost in costs.values()))
    return costs


def layer_cost(layer: Any, parameters: int, activation: int, model: DALLE, training: Training) -> Cost:
    """Return a layer's cost; `activation` is the bytes of its output."""
    attention = layer.attention
    text_len, size = model.text_seq_len + 1, training.size
    rows = training.batch_size * (text_len - 1 + model.image_seq_len)
    axial = axial_attention(attention.mask, text_len, model.fmap_size) is not None
    scores = AxialAttention.scores(text_len, model.fmap_size) if axial else attention.mask.numel()
    scores *= training.batch_size * attention.heads
    # Scores, their softmax and a gradient; queries, keys, values and the result.
    attending = 3 * scores * size + 4 * rows * attention.heads * attention.dim_head * size
    feeding = 2 * 12 * activation  # 8·dim before the gate, 4·dim after it, and their gradients
    operations = PASSES * (2 * rows * parameters + 4 * scores * attention.dim_head)
    return Cost(parameters, 0, operations, activation, max(attending, feeding))


def encoder_cost(vae: Any) -> Cost:
    """Return the cost of encoding one image: the modules that a pass enters, and its convolutions."""
    entered = trace(vae, torch.zeros(1, 3, vae.image_size, vae.image_size))
    parameters = sum(tensor.numel() for module, _ in entered for tensor in module.parameters(recurse=False))
    return Cost(0, parameters, count_operations(entered))


def trace(network: nn.Module, *inputs: torch.Tensor) -> List[Tuple[nn.Module, torch.Tensor]]:
    """Return the modules that a pass enters, with their outputs; nothing is computed."""
    tensors = [*network.parameters(), *network.buffers()]
    network = copy.deepcopy(network, {id(tensor): tensor.to("meta") for tensor in tensors})
    entered: List[Tuple[nn.Module, torch.Tensor]] = []
    for module in network.modules():
        module.register_forward_hook(lambda module, inputs, output: entered.append((module, output)))
    with torch.no_grad():
        network(*(tensor.to("meta") for tensor in inputs))
    return entered


def count_operations(entered: Sequence[Tuple[nn.Module, torch.Tensor]]) -> int:
    """Count the operations of a traced pass's convolutions."""
    convolutions = [(module, output) for module, output in entered if isinstance(module, nn.Conv2d)]
    return sum(2 * output.numel() * module.weight[0].numel() for module, output in convolutions)


def estimate_stages(places: Placement, costs: Dict[str, Cost], training: Training) -> List[StageEstimate]:
    """Return the estimate of each stage; modules of no place are on the first one."""
    found = stages(places)
    parts = [[costs[name] for name in names] for _, names in found]
    parts[0].append(costs[""])
    numbered = enumerate(zip(found, parts))
    return [estimate_stage(ipu, part, number, len(found), training) for number, ((ipu, _), part) in numbered]


def estimate_stage(ipu: int, costs: Sequence[Cost], number: int, count: int, training: Training) -> StageEstimate:
    """Return the estimate of stage `number` of `count`, which consists of modules with these costs."""
    parameters = sum(cost.parameters for cost in costs)
    in_flight = 2 * (count - 1 - number) + 1  # micro-batches between their forward and their backward pass
    memory = {
        "weights": training.size * (parameters + sum(cost.frozen for cost in costs)),
        "gradients": training.size * parameters,
        "optimizer": training.moments * parameters,
        "stash": in_flight * sum(cost.kept for cost in costs),
        "temporary": max((cost.temporary for cost in costs), default=0),
    }
    return StageEstimate(ipu, memory, MEMORY, sum(cost.operations for cost in costs) / PEAK[training.size])


def balanced_layers(costs: Dict[str, Cost], training: Training, settings: Namespace) -> List[int]:
    """Return the numbers of layers for which the slowest stage is about as fast as it can be and memory suffices."""
    depth, ipus = settings.num_hidden_layers, settings.ipus_per_replica
    head_ipu = ipus - 1 if settings.cls_ipu_id is None else settings.cls_ipu_id

    def load(ipu: int, first: int, last: int) -> float:
        """Return the seconds of an IPU with the layers from `first` up to `last`, more if it lacks memory."""
        names = [f"transformer.layers.{number}" for number in range(first, last)]
        names += ["text_emb", "image_emb"] if ipu == settings.embedding_ipu_id else []
        names += ["to_logits"] if ipu == head_ipu else []
        names += [name for name in ("vae", "") if ipu == 0 and name in costs]
        stage = estimate_stage(ipu, [costs[name] for name in names], ipu, ipus, training)
        lacking = sum(stage.memory.values()) - LAYERS_SHARE * MEMORY
        return stage.seconds + max(lacking, 0)  # a byte too many is worse than any time

    # best[i]: the cost of the IPUs so far if they have the first i layers, and their numbers of layers. The sum of
    # eighth powers is nearly decided by the greatest load, and balances the others.
    scale = load(0, 0, depth)
    best: Dict[int, Tuple[float, List[int]]] = {0: (0.0, [])}
    for ipu in range(ipus):
        best = {
            last: min(
                (cost + (load(ipu, first, last) / scale) ** 8, [*counts, last - first])
                for first, (cost, counts) in best.items()
                if first <= last
            )
            for last in (range(depth + 1) if ipu < ipus - 1 else [depth])
        }
    return best[depth][1]
