"""What the compiling pass of a model shows: blocks, stages, the IPU of each layer, losses, operators.

Tests read it as `executor.trace`. Blocks are checked when they are entered and after the pass.
"""

import collections
import contextlib

from torch import nn

from .machine import Error
from .options import AutoStage


class BlockHook:
    """The forward pre-hook that BeginBlock registers."""

    def __init__(self, user_id, ipu_id):
        self.user_id, self.ipu_id = user_id, ipu_id

    def __call__(self, module, inputs):
        trace = active_trace()
        if trace is not None:
            trace.entered_modules.add(module)
            trace.begin(self.user_id, self.ipu_id)
            trace.note_module(module)


def hook_of(module):
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BlockHook)), None)


_active = []


def active_trace():
    return _active[-1] if _active else None


class Trace:
    """Lists are in the order of the pass.

    blocks: (user_id, ipu_id) at every entry of a block.
    stages: {user_id: stage}.
    ipu_of: {module name: IPU at its first call}.
    parameter_ipus: {parameter name: {IPUs that read it}}.
    checkpoints: the shapes given to each recomputationCheckpoint.
    serialized: (mode, factor, (lhs shape, rhs shape)) of each serializedMatMul.
    """

    def __init__(self, model, strategy):
        self.blocks, self.stages, self.ipu_of = [], {}, {}
        self.parameter_ipus = collections.defaultdict(set)
        self.checkpoints, self.serialized = [], []
        self.entered_modules = set()
        self._names = {module: name for name, module in model.named_modules()}
        self._strategy = strategy
        self._begun = [name for name, module in model.named_modules() if hook_of(module)]
        self._current = None  # (user_id, ipu_id) of the open block

    def begin(self, user_id, ipu_id):
        """Enter a block and give it its stage; a pipeline only goes forward."""
        known = dict(self.blocks)
        if known.get(user_id, ipu_id) != ipu_id:
            raise Error(f"block {user_id!r} is on IPU {known[user_id]} and on IPU {ipu_id}")
        if (user_id, ipu_id) == self._current:
            return
        stage = ipu_id if self._strategy.auto_stage is AutoStage.SameAsIpu else len(set(self.stages.values()))
        stage = self.stages.setdefault(user_id, stage)
        latest = self.stages[self.blocks[-1][0]] if self.blocks else 0
        if stage < latest:
            raise Error(f"block {user_id!r} of stage {stage} after stage {latest}: a pipeline cannot go backwards")
        self._current = user_id, ipu_id
        self.blocks.append(self._current)

    @property
    def ipus(self):
        return max((ipu for _, ipu in self.blocks), default=0) + 1

    @property
    def ipu(self):
        """The IPU of an operator that ran now: 0 if no blocks are used, None before the first of them."""
        if self._current is not None:
            return self._current[1]
        return None if self._begun else 0

    def place(self, operator, parameters):
        """Note an operator on values of the device, and the names of the parameters that it reads."""
        if self.ipu is None:
            raise Error(f"{operator} comes before the first block: all operators must belong to a block")
        for name in parameters:
            self.parameter_ipus[name].add(self.ipu)

    def note_module(self, module):
        name = self._names.get(module)
        if name is not None and self.ipu is not None:
            self.ipu_of.setdefault(name, self.ipu)

    @contextlib.contextmanager
    def recording(self):
        def before_call(module, inputs):
            if hook_of(module) is None:  # a hook notes its module itself, once the block is open
                self.note_module(module)

        handle = nn.modules.module.register_module_forward_pre_hook(before_call)
        _active.append(self)
        try:
            yield self
        finally:
            _active.pop()
            handle.remove()

    def finish(self, training, options):
        entered = {self._names.get(module) for module in self.entered_modules}
        missed = [name for name in self._begun if name not in entered]
        if missed:
            raise Error(f"BeginBlock without effect: {', '.join(missed)} never entered through a call of the module")
        stages, rounds = max(len(set(self.stages.values())), 1), options.Training.gradient_accumulation
        if training and stages > 1 and rounds < 2 * stages - 1:
            raise Error(f"{stages} stages need gradientAccumulation of at least {2 * stages - 1}, not {rounds}")
        if not training and options.device_iterations < stages:
            raise Error(f"{stages} stages need deviceIterations of at least {stages}, not {options.device_iterations}")
