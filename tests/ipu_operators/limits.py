"""Arguments that PopTorch 3.4 refuses, or accepts and ignores, of the operators in table.txt.

Each function reads an operator's arguments by their names in torch's schema and returns what is wrong, or None.
"""

import torch

FLOATS_8 = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}
BAD_DTYPES = {torch.bfloat16, torch.complex32, torch.complex64, torch.complex128} | FLOATS_8
MEAN = 1  # of a loss, among the numbers that torch's schemas have for reductions
MASKS = (torch.bool, torch.uint8)
# Shapes that depend on values.
DYNAMIC = {"nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive"}
DYNAMIC |= {"unique_dim_consecutive"}
TO_HOST = {"item", "_local_scalar_dense", "is_nonzero", "equal"}


def stops(name, given):
    """Return why tracing ends at this operator, or None if it continues."""
    if name in TO_HOST:
        return "a value is read on the host (.item(), int(x), if x:, torch.equal); a graph has none while it is built"
    if name in DYNAMIC:
        return "the shape of the result depends on values"
    if name == "index" and any(index is not None and index.dtype in MASKS for index in given["indices"]):
        return "a boolean mask as index: the shape of the result depends on values"
    if name == "one_hot" and given["num_classes"] < 0:
        return "one_hot without num_classes: the shape of the result depends on values"
    device = given.get("device")
    if name == "_to_copy" and device is not None and device.type != "meta":
        return "a tensor is brought to the host inside of the forward pass"
    return None


def refusal(name, given):
    """Return why an operator that has a handler (or is composite) is refused with these arguments."""
    rule = RULES.get(name)
    return rule(given) if rule else None


def remark(name, given):
    """Return what an operator does differently there without being refused."""
    if name == "gelu" and given["approximate"] == "none":
        return "gelu is computed by its tanh approximation"
    if name == "cumsum" and not given["self"].dtype.is_floating_point:
        return "cumsum of integers goes through fp32: exact up to 2**24"
    return None


def refuse_smoothing(given):
    """torch 2.0.1 averages smoothed losses by masked_select; later ones do not."""
    labels = given["target"].shape != given["self"].shape
    if labels and given["label_smoothing"] and given["reduction"] == MEAN:
        return "label_smoothing= becomes a masked_select in torch 2.0.1, whose shape depends on values"
    return None


def refuse_scale(given):
    image = given["input"] if "input" in given else given["self"]  # two overloads, two names
    factors = given.get("scale_factors") or [new / old for new, old in zip(given["output_size"], image.shape[2:])]
    if len(set(factors)) > 1 or factors[0] != int(factors[0]):
        return "bilinear resizing is there for one whole factor only"
    return None


def refuse_if(condition, reason):
    """Return a rule that gives the reason if the condition holds for an operator's arguments."""
    return lambda given: reason if condition(given) else None


WEIGHT = refuse_if(lambda given: given["weight"] is not None, "weight= of classes is not supported")
DROPOUT = refuse_if(lambda given: given["train"] and not 0 <= given["p"] < 1, "p has to be in [0, 1)")
INDICES = refuse_if(lambda given: True, "PopTorch's max pooling has no indices to return")

RULES = {
    "cross_entropy_loss": refuse_smoothing,
    "nll_loss_forward": WEIGHT,
    "nll_loss2d_forward": WEIGHT,
    "embedding": refuse_if(
        lambda given: given["sparse"] or given["scale_grad_by_freq"],
        "sparse= and scale_grad_by_freq= are not supported",
    ),
    "topk": refuse_if(lambda given: not given["sorted"], "sorted=False is not supported"),
    "index_put": refuse_if(lambda given: given["accumulate"], "accumulate=True is silently ignored"),
    # torch 2.0.1 always scales by 1/sqrt(d), and takes as many key heads as query heads.
    "scaled_dot_product_attention": refuse_if(
        lambda given: given.get("scale") is not None or given.get("enable_gqa"),
        "torch 2.0.1 has neither scale= nor enable_gqa=",
    ),
    "dropout": DROPOUT,
    "feature_dropout": DROPOUT,
    "max_pool2d_with_indices": INDICES,
    "max_pool3d_with_indices": INDICES,
    "upsample_bilinear2d": refuse_scale,
    "upsample_bicubic2d": refuse_if(lambda given: given["align_corners"], "align_corners=True is not supported"),
}
