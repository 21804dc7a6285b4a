"""What one pass of the model shows when it is compiled: blocks, stages, where layers stand, losses, operators.

`executor.trace` is one of these; tests read it. Blocks are checked while they are entered and after the pass.
"""

import collections
import contextlib

from torch import nn

from .enums import AutoStage
from .options import PipelinedExecution


class BlockHook:
    """BeginBlock's forward pre-hook."""

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
    """The trace of the pass that runs now; None outside of one."""
    return _active[-1] if _active else None


class Trace:
    """Lists are in the order of the pass.

    blocks: (user_id, ipu_id) at every entry of a block. stages: {user_id: stage}. ipu_of: {module name: IPU at its
    first call}. modules_by_block: {user_id: [module name]}. parameter_ipus: {parameter name: {IPU that reads it}}.
    checkpoints: the shapes given to each recomputationCheckpoint. serialized: (mode, factor, (lhs shape, rhs shape)) of
    each serializedMatMul. losses: names of all loss functions. operators: how often each torch function met a device
    tensor. loops: counts of for_loops. cache_hit: whether the executable lay in the cache folder.
    """

    def __init__(self, model, strategy):
        self.blocks, self.stages, self.modules_by_block = [], {}, {}
        self.ipu_of, self.parameter_ipus = {}, collections.defaultdict(set)
        self.checkpoints, self.serialized, self.losses, self.loops = [], [], [], []
        self.operators = collections.Counter()
        self.cache_hit = False
        self.entered_modules = set()
        self._names = {module: name for name, module in model.named_modules()}
        self._strategy = strategy
        self._begun = [name for name, module in model.named_modules() if hook_of(module)]
        self._current = None  # (user_id, ipu_id) of the open block
        self._closed = False  # a `with Block` ended and nothing was begun since
        self._outside = None  # the first operator before any block
        self._loop_depth = 0

    # ---- blocks

    def begin(self, user_id, ipu_id):
        if user_id is None:
            user_id = f"auto_{len(self.blocks)}"
        if self._outside and not self.blocks:
            raise RuntimeError(f"{self._outside} comes before the first block: all operators must belong to a block")
        known = dict(self.blocks)
        if user_id in known and ipu_id is not None and known[user_id] != ipu_id:
            raise RuntimeError(f"block {user_id!r} is on IPU {known[user_id]} and on IPU {ipu_id}")
        ipu_id = known.get(user_id, len(known)) if ipu_id is None else ipu_id
        entry = user_id, ipu_id
        if self._loop_depth and self._current is not None and self._current[1] != ipu_id:
            raise RuntimeError(f"block {user_id!r} begins inside a for_loop on another IPU than the loop's")
        self._closed = False
        if entry == self._current:
            return
        self._check_order(user_id, ipu_id)
        self.blocks.append(entry)
        self._current = entry

    def end(self):
        self._current, self._closed = None, True

    def _check_order(self, user_id, ipu_id):
        """Give the block its stage; a pipeline goes forward only."""
        stage = ipu_id if self._strategy.auto_stage is AutoStage.SameAsIpu else len(set(self.stages.values()))
        stage = self.stages.setdefault(user_id, stage)
        latest = self.stages[self.blocks[-1][0]] if self.blocks else 0
        if isinstance(self._strategy, PipelinedExecution) and stage < latest:
            raise RuntimeError(
                f"block {user_id!r} (stage {stage}) is entered after stage {latest}: a pipeline cannot go backwards"
            )

    @property
    def num_stages(self):
        return max(len(set(self.stages.values())), 1)

    @property
    def ipu(self):
        """Where an operator would stand now: 0 where no blocks are used, None before the first of them."""
        if self._current is not None:
            return self._current[1]
        return None if self._begun or self.blocks else 0

    def place(self, operator, parameters):
        """An operator on values of the device, and the names of the parameters that it reads."""
        if self._closed:
            raise RuntimeError(f"No active Block, all the ops must belong to a Block: {operator} comes after one ended")
        if self._current is None:
            if self._begun:
                raise RuntimeError(f"{operator} comes before the first block: all operators must belong to a block")
            self._outside = self._outside or operator
        for name in parameters:
            self.parameter_ipus[name].add(self.ipu)

    def note_module(self, module):
        name = self._names.get(module)
        if name is None or self.ipu is None or name in self.ipu_of:
            return
        self.ipu_of[name] = self.ipu
        if self._current is not None:
            self.modules_by_block.setdefault(self._current[0], []).append(name)

    @contextlib.contextmanager
    def loop(self, count):
        self.loops.append(count)
        self._loop_depth += 1
        try:
            yield
        finally:
            self._loop_depth -= 1

    # ---- one pass

    @contextlib.contextmanager
    def recording(self):
        def before_call(module, inputs):
            if hook_of(module) is None:  # those with a hook are noted by it, once their block is open
                self.note_module(module)

        handle = nn.modules.module.register_module_forward_pre_hook(before_call)
        _active.append(self)
        try:
            yield self
        finally:
            _active.pop()
            handle.remove()

    def finish(self, training, options):
        """What only the whole pass shows."""
        entered = {self._names.get(module) for module in self.entered_modules}
        missed = [name for name in self._begun if name not in entered]
        if missed:
            raise RuntimeError(
                f"BeginBlock without effect: {', '.join(missed)} never entered through a call of the module itself"
            )
        if not isinstance(self._strategy, PipelinedExecution):
            return
        stages = self.num_stages
        if training and stages > 1 and options.Training.gradient_accumulation < 2 * stages - 1:
            raise RuntimeError(
                f"a training pipeline of {stages} stages needs gradientAccumulation of at least {2 * stages - 1}, not "
                f"{options.Training.gradient_accumulation}"
            )
        if not training and options.device_iterations < stages:
            raise RuntimeError(
                f"an inference pipeline of {stages} stages needs deviceIterations of at least {stages}, not "
                f"{options.device_iterations}"
            )
