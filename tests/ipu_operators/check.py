"""Predicts what PopTorch 3.4 would say of a forward pass; see README.md."""

import contextlib
import copy
import functools
import traceback
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.ipu_operators import limits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OWN = {HERE / name for name in ("check.py", "limits.py", "standins.py")}
TORCH = Path(torch.__file__).resolve().parent
META = torch.device("meta")
# An operator of today's torch and what 2.0.1 calls instead, or what PopTorch makes of an in-place one.
SPELLED = {
    "_safe_softmax": "_softmax",
    "_native_batch_norm_legit": "native_batch_norm",
    "_native_batch_norm_legit_no_training": "native_batch_norm",
    "_batch_norm_with_update": "native_batch_norm",
    "_batch_norm_no_update": "native_batch_norm",
    "native_dropout": "dropout",
    "empty_strided": "empty",
    "zero": "zeros_like",
    "fill": "full_like",
}
SILENT = {"detach", "alias", "lift_fresh"}  # never a node
# Writes that reach the tensor beneath a view, and views through which no write does.
ASSIGNMENTS = {"copy_", "normal_", "uniform_", "random_", "exponential_", "index_put_"}
REORDERED = {"transpose", "permute", "t", "expand", "diagonal", "as_strided", "unfold"}


def one_hot(self, num_classes):
    return torch.empty((*self.shape, num_classes), dtype=torch.int64, device=META)


def nll_loss2d(self, target, weight, reduction, ignore_index):
    losses = torch.empty(() if reduction else target.shape, dtype=self.dtype, device=META)
    return losses, torch.empty((), dtype=self.dtype, device=META)


SHAPES = {"one_hot": one_hot, "nll_loss2d_forward": nll_loss2d}


def read_table(path=HERE / "table.txt"):
    """Read {section: set of operators}."""
    sections = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            names = sections.setdefault(line.strip("[]"), set())
        elif line and not line.startswith("#"):
            names.update(line.split())
    return sections


TABLE = read_table()


class Report(NamedTuple):
    """The verdict on a forward pass; operators have their base names.

    operators, folded: how often each runs on the device, and on constants.
    refused: {operator: reason and place}; empty if an IPU would take the pass.
    losses: the final ones, without those that went into another.
    """

    operators: Counter
    folded: Counter
    refused: Dict[str, str]
    losses: List[str]
    warnings: List[str]


class Stop(Exception):
    """The forward pass cannot continue; the reason is among the refused."""


class Known:
    """What is known of a tensor; a view shares most of it with the tensor beneath."""

    def __init__(self, tensor, constant=False, given=False, beneath=None, through=None, step=1):
        self.tensor, self.given, self.beneath, self.through, self.step = tensor, given, beneath, through, step
        self._constant = constant
        self.losses = frozenset() if beneath is None else beneath.losses  # numbers of those that it was computed from
        self.lost = None  # (the view that was written to, operator, reason)

    def chain(self):
        """Return the view itself, the tensor beneath it, and so on to the bottom."""
        return [self, *(self.beneath.chain() if self.beneath else ())]

    @property
    def constant(self):
        return self.chain()[-1]._constant

    @constant.setter
    def constant(self, value):
        self.chain()[-1]._constant = value


class Trace(TorchDispatchMode):
    """Sees every operator of a forward pass on the meta device."""

    def __init__(self, training):
        super().__init__()
        self.training = training
        self.operators, self.folded = Counter(), Counter()
        self.refused, self.warnings = {}, []
        self.losses, self.surplus = [], set()
        self.known = {}  # by id; keeping the tensors keeps the ids
        self.loops = 0  # how many for_loops are open
        self.paused = False

    def know(self, tensor, **facts):
        found = self.known.get(id(tensor))
        if found is None:
            found = self.known[id(tensor)] = Known(tensor, **facts)
            if tensor.dtype in limits.BAD_DTYPES:
                self.stop("tensor", f"{tensor.dtype} is not supported")
            if 0 in tensor.shape and not found.constant:
                self.stop("tensor", f"no dimension may be 0, as in {tuple(tensor.shape)}")
        return found

    def refuse(self, operator, reason):
        """Note a refusal with the place in the source that is running."""
        self.refused.setdefault(operator, f"{reason} [{place(traceback.walk_stack(None))}]")

    def stop(self, operator, reason):
        self.refuse(operator, reason)
        raise Stop(reason)

    def warn(self, text):
        if text not in self.warnings:
            self.warnings.append(text)

    def mark_loss(self, operator, tensor, sources):
        """Note that `tensor` is a loss; those that it was computed from no longer count."""
        self.surplus.update(*(self.know(source).losses for source in sources))
        self.know(tensor).losses |= {len(self.losses)}
        self.losses.append(operator)

    def make_result(self, operator, like, sources):
        """Return a tensor like `like` as the result of an operator that torch does not have."""
        self.operators[operator] += 1
        self.paused = True
        tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.paused = False
        known = self.know(tensor)
        known.losses = frozenset().union(*(self.know(source).losses for source in sources))
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = arguments(func, args, kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device == META]
        arrives = given.get("device") == META
        if self.paused or not (on_device or arrives):  # the host computes on its own
            return func(*args, **kwargs)

        space, name = func._schema.name.split("::")
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        base = name if name in TABLE["lowered"] else SPELLED.get(base, base)
        if space != "aten":
            self.stop(f"{space}::{name}", "an operator of an extension")
        reason = limits.stops(base, given)
        if reason:
            self.stop(base, reason)
        if base in TABLE["composite"]:
            reason = limits.refusal(base, given)
            if reason:
                self.refuse(base, reason)
                return self.shaped(func, base, args, kwargs, given)
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if len(on_device) < len(tensors) and not (arrives or base == "copy_" and tensors[0].device == META):
            self.stop(base, "a tensor of the host among the device's: register it as a buffer")
        return self.leaf(func, name, base, args, kwargs, given, on_device)

    def leaf(self, func, name, base, args, kwargs, given, tensors):
        """Handle an operator that is a node of the graph, or folded."""
        facts = [self.know(tensor) for tensor in tensors]
        written = [given[argument.name] for argument in func._schema.arguments if is_written(argument)]
        written = [self.know(tensor) for tensor in tree_flatten(written)[0] if isinstance(tensor, torch.Tensor)]
        replaced = base == "copy_" and facts[0].beneath is None  # what was there does not matter
        sources = facts[1:] if replaced else facts
        constant = not self.loops and base not in TABLE["random"] and all(source.constant for source in sources)
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not written

        self.judge(base, given, constant)
        if not is_view:
            self.look_for_lost_writes(facts[1:] if base == "copy_" else facts)
        result = self.shaped(func, base, args, kwargs, given)

        losses = frozenset().union(*(source.losses for source in sources))
        for known in written:
            known.constant = constant
            known.losses |= losses
            self.follow_write(name, known, sources)
        step = given["step"] if base == "slice" else 1
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.known:
                beneath = facts[0] if is_view else None
                self.know(tensor, constant=constant, beneath=beneath, through=base, step=step).losses |= losses
        if base in TABLE["losses"]:
            self.mark_loss(base, result[0] if isinstance(result, tuple) else result, tensors)
        return result

    def shaped(self, func, base, args, kwargs, given):
        """Compute the result's shape and dtype with torch's meta kernel, or ours if torch 2.0 has none."""
        if base in SHAPES:
            return SHAPES[base](**given)
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            if base in self.refused:  # which is the verdict: there is no result to continue with
                raise Stop from None
            raise

    def judge(self, base, given, constant):
        if base in SILENT:
            return
        if constant:
            self.folded[base] += 1
            return
        self.operators[base] += 1
        if base in TABLE["constants only"]:
            self.refuse(base, "for constants only, outside of loops")
        elif base not in TABLE["lowered"] and base not in TABLE["expanded"]:
            self.refuse(base, "PopTorch 3.4 has no handler for it, or torch 2.0.1 does not have it")
        reason, remark = limits.refusal(base, given), limits.remark(base, given)
        if reason:
            self.refuse(base, reason)
        if remark:
            self.warn(remark)

    def follow_write(self, name, written, sources):
        """Follow a write: a graph has no memory, and through a view few writes reach the tensor beneath."""
        chain = written.chain()
        root, views = chain[-1], [known for known in chain[:-1] if known.through not in SILENT]
        if name == "copy_" and root.lost and root.lost[0] in sources:  # x[i] += y ends in x[i] = what was lost
            root.lost = None
        lost = bool(views)
        if name in ASSIGNMENTS or root.given:
            if any(view.step != 1 for view in views):
                self.refuse(name, "a slice with a step is written to")
            lost = any(view.through in REORDERED for view in views)
        if lost:
            root.lost = (
                written,
                name,
                f"written through {views[0].through}, which is lost; what is beneath is used again",
            )

    def look_for_lost_writes(self, sources):
        for known in sources:
            chain = known.chain()
            if chain[-1].lost and chain[-1].lost[0] not in chain:
                self.refuse(*chain[-1].lost[1:])

    def report(self):
        final = [loss for number, loss in enumerate(self.losses) if number not in self.surplus]
        if self.training and len(final) != 1:
            self.refused["loss"] = (
                f"a training graph ends in one loss, not in {len(final)}: {', '.join(final) or 'none'}"
            )
        return Report(self.operators, self.folded, self.refused, final, self.warnings)


ACTIVE = []  # the trace that is running, for standins.py


def check(module, inputs, training=False):
    """Report on module(*inputs); the module is an nn.Module, which stays as it is, or a function.

    Its mode (train() or eval()) is not changed. training: the graph must end in one loss.
    """
    trace = Trace(training)
    ACTIVE.append(trace)
    try:
        with torch.no_grad():
            if isinstance(module, nn.Module):
                module = copy.deepcopy(module).to(META)
                know_parameters(trace, module)
            inputs = tree_map(functools.partial(on_device, trace), tuple(inputs))
            before = own_tensors(module)
            with factories_on_meta(), below_autograd(), trace:
                module(*inputs)
            for name, _ in own_tensors(module) - before:
                trace.refused["attribute"] = f"{name} of a module is assigned a tensor; change buffers in place only"
    except Stop:
        pass
    except Exception as error:  # any error in torch stops PopTorch as well
        where = place(reversed(list(traceback.walk_tb(error.__traceback__))))
        said = str(error).partition("\n")[0]
        trace.refused["forward pass"] = f"{type(error).__name__}: {said} [{where}]"
    finally:
        ACTIVE.remove(trace)
    return trace.report()


def know_parameters(trace, module):
    for tensor in module.parameters():
        trace.know(tensor, given=True)
    for tensor in module.buffers():  # all but floats count as constants
        trace.know(tensor, given=True, constant=not tensor.dtype.is_floating_point)


def on_device(trace, value):
    """Return an input of the graph on the meta device."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = torch.empty(value.shape, dtype=value.dtype, device=META)
    trace.know(tensor, given=True)
    if value.requires_grad:
        trace.refused["input"] = "an input of a graph has no gradient (requires_grad)"
    return tensor


def own_tensors(module):
    """Return (attribute, id) of every tensor of the device that a module has besides its parameters."""
    found = set()
    for part in module.modules() if isinstance(module, nn.Module) else ():
        for name, value in [*vars(part).items(), *part.named_buffers(recurse=False)]:
            if isinstance(value, torch.Tensor) and value.device == META:
                found.add((name, id(value)))
    return found


@contextlib.contextmanager
def factories_on_meta():
    def moved(factory, *args, **kwargs):
        return factory(*args, **{**kwargs, "device": kwargs.get("device") or META})

    with contextlib.ExitStack() as stack:
        for name in TABLE["factories"]:
            stack.enter_context(mock.patch.object(torch, name, functools.partial(moved, getattr(torch, name))))
        yield


@contextlib.contextmanager
def below_autograd():
    """Skip autograd's kernels, which decompose composite operators before a dispatch mode sees them."""
    guard = torch._C._AutoDispatchBelowAutograd()
    if hasattr(guard, "__enter__"):
        with guard:
            yield
    else:  # torch 2.0: a plain object that works until it is deleted
        try:
            yield
        finally:
            del guard


def arguments(func, args, kwargs):
    """Return an operator's arguments by name, defaults included."""
    given = {}
    for number, argument in enumerate(func._schema.arguments):
        if number < len(args):
            given[argument.name] = args[number]
        else:
            given[argument.name] = kwargs.get(argument.name, argument.default_value)
    return given


def is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def place(frames):
    """Return file and line of the first of `frames`, innermost first, that is neither torch's nor this check's."""
    found = ((Path(frame.f_code.co_filename), line) for frame, line in frames)
    path, line = next(
        ((path, line) for path, line in found if path not in OWN and TORCH not in path.parents), (ROOT, 0)
    )
    return f"{path.relative_to(ROOT) if ROOT in path.parents else path}:{line}"
