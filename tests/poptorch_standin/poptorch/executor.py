"""trainingModel and inferenceModel: a model compiled once for one shape of batch and then called.

The executor works on copies of the weights. The host's go stale with every training call and are refreshed when they
are read from the wrapped model, or by copyWeightsToHost(); what is written to them arrives by copyWeightsToDevice().
"""

import copy
import inspect
import os
import time

import torch
from torch import nn

from . import batches, files, update
from .device import DeviceRandom, Run
from .enums import ConnectionType
from .half import half_arithmetic
from .optim import DTYPES, DeviceOptimizer
from .options import Options
from .trace import Trace
from .weights import Weights, leaks, watch_reads

MOMENTS = ("Accl1", "Accl2", "Step")


def trainingModel(model, options=None, optimizer=None):
    return Executor(model, options, True, optimizer)


def inferenceModel(model, options=None):
    return Executor(model, options, False, None)


def _steps_as_given(optimizer):
    """torch wraps the step of every optimizer's class, hence unwrap."""
    return inspect.unwrap(type(optimizer).step) is inspect.unwrap(DeviceOptimizer.step)


class Executor:
    def __init__(self, model, options, training, optimizer):
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be an nn.Module, not {model!r}")
        options = Options() if options is None else options
        if not isinstance(options, Options):
            raise TypeError(f"options must be poptorch.Options, not {options!r}")
        if training and hasattr(type(model), "_poptorch_executor"):
            raise RuntimeError("the model is wrapped for training already; destroy() that executor first")
        if training and options.Distributed.numProcesses > 1 and options._instances == 1:
            raise RuntimeError("training in several processes takes popdist.poptorch.Options, which exchange gradients")
        if training and optimizer is None:
            raise ValueError("a training model needs an optimizer")
        options._freeze()
        self._options, self._training = options, training
        self._user_model = model
        self.model = copy.copy(model)  # shallow: the modules inside are shared, the flag `training` is not
        self.trace = None
        self._weights = self._specification = self._structure = self._path = None
        self._stale = False  # the host's weights are older than the device's
        self._version = self._seen = 0  # of the weights on a training device, and the one that inference has taken
        self._attached = False
        self._latencies, self._calls = [], 0
        self._optimizer, self._settings, self._constants, self._state = None, None, None, {}
        self._rng = self._first_rng()
        if training:
            self.setOptimizer(optimizer)
            self._original_class = watch_reads(model, self)

    def _first_rng(self):
        seed = self._options._values["random_seed"]
        if seed is None:
            seed = int.from_bytes(os.urandom(7), "little")
        return torch.Generator().manual_seed(seed + self._options.Distributed.processId).get_state()

    # ---- compilation

    def compile(self, *batch):
        if self._specification is not None:
            raise RuntimeError("the model is compiled already; destroy() it first")
        options = self._options
        if not self._training and options.Training.gradient_accumulation != 1:
            raise RuntimeError("an inference model needs gradientAccumulation 1")
        batches.check_inputs(batch, options)
        batches.Collector(options, self._training)  # refuses a period that does not fit
        self._fetch_from_trainer()
        weights = Weights(self.model)
        if self._training:
            self._check_parameters(weights)
        micro_batch = batches.micro_batches([self._first_rows(tensor) for tensor in batch], Options())[0]
        trace = Trace(self.model, options._values["strategy"])
        with trace.recording(), half_arithmetic(), DeviceRandom(self._rng):
            run, outputs = self._pass(weights, micro_batch)
            batches.flatten(outputs)
            if self._training:
                run.final_loss()
        trace.finish(self._training, options)
        leaked = list(leaks(self.model))
        if leaked:
            raise RuntimeError(f"forward left IPU tensors in {', '.join(leaked)}: they have no value outside of it")
        weights.upload()  # the pass may have written to buffers
        self._structure, self._path = batches.structure(outputs), run.path
        self.trace, self._weights, self._specification = trace, weights, batches.specification(batch)
        if self._training:
            self._take_state()
        self.trace.cache_hit = files.after_compiling(self)
        self._attached = self._connection is ConnectionType.Always and not self._offline

    def _first_rows(self, tensor):
        parts = self._options._micro_batches
        return tensor[: len(tensor) // parts] if parts > 1 else tensor

    def _pass(self, weights, inputs):
        with weights.on_device(), torch.set_grad_enabled(self._training), Run(self._training) as run:
            return run, run.call(self.model, inputs)

    def _check_parameters(self, weights):
        """The optimizer must have exactly what is to be trained."""
        groups = [{id(tensor) for tensor in group["params"]} for group in self._optimizer.param_groups]
        trained = {name: tensor for name, tensor in weights.parameters.items() if tensor.requires_grad}
        lacking = [name for name, tensor in trained.items() if not any(id(tensor) in group for group in groups)]
        if lacking:
            raise RuntimeError(f"the optimizer lacks parameters with a gradient: {', '.join(lacking)}")
        foreign = set().union(*groups) - {id(tensor) for tensor in weights.parameters.values()}
        if foreign:
            raise RuntimeError(f"the optimizer has {len(foreign)} parameters that are not the model's")

    @property
    def _offline(self):
        return self._options._values["offline"] or self._connection is ConnectionType.Never

    @property
    def _connection(self):
        return self._options._values["connection"]

    # ---- running

    def __call__(self, *batch):
        if self._specification is None:
            self.compile(*batch)
        batches.check_inputs(batch, self._options)
        if batches.specification(batch) != self._specification:
            raise RuntimeError(
                f"compiled for inputs {self._specification}, called with {batches.specification(batch)}: shapes and "
                "dtypes are fixed at compile time"
            )
        if self._offline:
            raise RuntimeError("Trying to run a model on an offline device")
        if not self._attached:
            self.attachToDevice()
        if self._training and self._optimizer._loaded is not None:
            raise RuntimeError("an optimizer state was loaded and setOptimizer() not called: the device has not got it")
        self._fetch_from_trainer()
        began = time.perf_counter()
        results = self._run(batch)
        self._latencies.append(time.perf_counter() - began)
        self._calls += 1
        if self._training:
            self._stale = True
            self._version += 1
        return batches.rebuild(self._structure, iter(results))

    def _run(self, batch):
        options = self._options
        queue = iter(batches.micro_batches(batch, options))
        collector = batches.Collector(options, self._training)
        with half_arithmetic(), DeviceRandom(self._rng) as random:
            for _ in range(options.device_iterations):
                gradients = update.Gradients(options, self._optimizer.accum_type) if self._training else None
                for step in range(options.Training.gradient_accumulation):
                    replicas = range(options.replication_factor)
                    collector.add([self._micro_batch(next(queue), gradients, replica, step) for replica in replicas])
                if self._training:
                    self._update(gradients)
        self._rng = random.after
        results = collector.results()
        if options._values["synthetic"]:
            return [torch.full_like(x, float("nan")) if x.is_floating_point() else torch.zeros_like(x) for x in results]
        return results

    def _micro_batch(self, inputs, gradients, replica, step):
        run, outputs = self._pass(self._weights, inputs)
        if run.path != self._path:
            now, then = next((pair for pair in zip(run.path, self._path) if pair[0] != pair[1]), ("its end", "its end"))
            raise RuntimeError(
                f"forward went another way than when it was compiled: {now} instead of {then}; the graph is "
                "fixed, and a changed number would have been ignored"
            )
        if self._training:
            trained = self._weights.trained()
            loss = run.final_loss() * self._settings[0]["loss_scaling"]
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            gradients.add(replica, step, dict(zip(trained, found)))
        return batches.flatten(outputs)

    def _update(self, gradients):
        reduced = gradients.reduced(self._settings[0]["loss_scaling"])
        update.clip(reduced, self._settings[0]["max_grad_norm"])
        groups = self._groups()
        for name, gradient in reduced.items():
            settings = self._settings[groups[name]]
            update.adam(self._weights.device[name], gradient, self._state[name], settings, self._optimizer.decoupled)

    def _groups(self):
        """{parameter name: number of its group}."""
        groups = enumerate(self._optimizer.param_groups)
        numbers = {id(tensor): number for number, group in groups for tensor in group["params"]}
        return {name: numbers.get(id(tensor)) for name, tensor in self._weights.parameters.items()}

    @property
    def rng_state(self):
        return [self._rng.clone()]

    @rng_state.setter
    def rng_state(self, state):
        (self._rng,) = state

    # ---- the optimizer

    def setOptimizer(self, optimizer):
        if not self._training:
            raise RuntimeError("an inference model has no optimizer")
        if not isinstance(optimizer, DeviceOptimizer) or not _steps_as_given(optimizer):
            raise TypeError(
                f"the stand-in takes poptorch.optim.Adam and AdamW as they are, not {type(optimizer).__name__}"
            )
        settings = optimizer._snapshot(self._options._values["relaxed"])
        constants = self._constants_of(optimizer, settings)
        if self._specification is not None:
            if type(optimizer) is not type(self._optimizer):
                raise RuntimeError("the optimizer's class is compiled into the graph and cannot change")
            if constants != self._constants:
                changed = [f"{a} instead of {b}" for a, b in zip(constants, self._constants) if a != b]
                raise RuntimeError(
                    "attributes that were not given to the optimizer's constructor are constants and cannot change: "
                    + "; ".join(changed)
                )
            old, self._optimizer = self._optimizer, optimizer
            try:
                self._check_parameters(self._weights)
            except RuntimeError:
                self._optimizer = old
                raise
        self._constants = constants
        self._optimizer, self._settings = optimizer, settings
        optimizer._attach(self)
        if self._specification is not None:
            self._take_state()

    def _constants_of(self, optimizer, settings):
        """What is part of the graph: dtypes, which attributes are variable, and the values of the others."""
        fixed = [{name: one[name] for name in one if name not in optimizer.explicit} for one in settings]
        return [{name: getattr(optimizer, name) for name in DTYPES}, sorted(optimizer.explicit), *fixed]

    def _take_state(self):
        """Moments as a load_state_dict left them, zeros where there are none yet."""
        first, second = (
            self._optimizer.first_order_momentum_accum_type,
            self._optimizer.second_order_momentum_accum_type,
        )
        for name, weight in self._weights.trained().items():
            self._state.setdefault(name, update.new_state(weight, first, second))
        loaded, self._optimizer._loaded = self._optimizer._loaded, None
        if loaded is None:
            return
        names = {f"{moment}___{name}": (name, moment) for name in self._state for moment in MOMENTS}
        if set(loaded["ipu_state"]) != set(names):
            odd = sorted(set(loaded["ipu_state"]) ^ set(names))
            raise RuntimeError(f"the loaded optimizer state and the model differ in {', '.join(odd[:6])}")
        for key, (name, moment) in names.items():
            self._state[name][moment].copy_(loaded["ipu_state"][key])
        self._calls = max(self._calls, 1)

    def _optimizer_state(self):
        if self._calls == 0:
            return {}
        state = {f"{m}___{name}": held[m].clone() for name, held in self._state.items() for m in MOMENTS}
        flat = {}
        for number, group in enumerate(self._settings):
            flat.update((f"{key}___group{number}", torch.tensor(value)) for key, value in group.items())
        return {"ipu_state": state, "ipu_param": flat}

    # ---- weights

    def _bring_home(self):
        if self._stale:
            self._stale = False
            self._weights.download()

    def _fetch_from_trainer(self):
        """A model that is trained elsewhere gives its weights to the inference model that wraps it too."""
        trainer = getattr(type(self._user_model), "_poptorch_executor", None)
        if self._training or trainer is None or trainer._version == self._seen:
            return
        trainer._bring_home()
        self._seen = trainer._version
        if self._weights is not None:
            self._weights.upload()

    def copyWeightsToHost(self):
        self._need_compiled("copyWeightsToHost")
        self._stale = False
        self._weights.download()

    def copyWeightsToDevice(self):
        self._need_compiled("copyWeightsToDevice")
        self._stale = False
        self._weights.upload()
        self._version += 1

    def copyNamedBuffersToDevice(self):
        self._need_compiled("copyNamedBuffersToDevice")
        self._weights.upload(self._options._values["updatable_buffers"])

    def state_dict(self):
        if self._training:
            self._bring_home()
        return self._user_model.state_dict()

    def load_state_dict(self, state_dict, strict=True):
        result = self._user_model.load_state_dict(state_dict, strict=strict)
        if self._weights is not None:
            self.copyWeightsToDevice()
        return result

    # ---- the device

    def _need_compiled(self, name):
        if self._specification is None:
            raise RuntimeError(f"{name}: the model is not compiled")

    def isAttachedToDevice(self):
        return self._attached

    def attachToDevice(self):
        self._need_compiled("attachToDevice")
        if self._attached or self._offline:
            raise RuntimeError("attachToDevice: attached already, or the target is offline")
        self._attached = True
        self.copyWeightsToDevice()

    def detachFromDevice(self):
        if not self._attached:
            raise RuntimeError("detachFromDevice: not attached")
        if self._training:
            self._bring_home()
        self._attached = False

    def destroy(self):
        """Gives the device back and the wrapped model its own class."""
        if self._training and hasattr(type(self._user_model), "_poptorch_executor"):
            self._bring_home()
            self._user_model.__class__ = self._original_class
        self._weights = self._specification = None
        self._attached = False

    def cycleCount(self):
        if self._calls == 0:
            raise RuntimeError("cycleCount: the model has not run")
        return int(self._latencies[-1] * 1.85e9)

    def getLatency(self):
        """(least, most, mean) seconds of a call."""
        if not self._latencies:
            raise RuntimeError("getLatency: the model has not run")
        return min(self._latencies), max(self._latencies), sum(self._latencies) / len(self._latencies)

    def save(self, filename):
        self._need_compiled("save")
        files.write(self, filename)

    def compileAndExport(self, filename, *batch):
        self.compile(*batch)
        self.save(filename)

    def loadExecutable(self, filename):
        """As compile(), for the shapes that the file was made for; refuses a file of another model."""
        key, inputs = files.read(filename)
        self.compile(*inputs)
        if files.key(self) != key:
            self.destroy()
            raise RuntimeError(f"{filename} is the executable of another model")
        self.trace.cache_hit = True
