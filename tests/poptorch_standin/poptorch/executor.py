"""trainingModel and inferenceModel: a model compiled once for one shape of batch and then called.

The executor works on copies of the weights. The host's go stale with every training call and are refreshed when they
are read from the wrapped model, or by copyWeightsToHost(); copyWeightsToDevice() sends what was written to them.
"""

import copy
import os
from pathlib import Path

import torch

from . import optim, transfer
from .device import DeviceRandom, Run
from .machine import MACHINE, Error, count_ipus
from .options import Options
from .trace import Trace
from .transfer import Weights, leaks, watch_reads

MOMENTS = ("Accl1", "Accl2", "Step")


def trainingModel(model, options=None, optimizer=None):
    return Executor(model, options, True, optimizer)


def inferenceModel(model, options=None):
    return Executor(model, options, False, None)


class Executor:
    def __init__(self, model, options, training, optimizer):
        options = Options() if options is None else options
        if training and hasattr(type(model), "_poptorch_executor"):
            raise Error("the model is wrapped for training already; destroy() that executor first")
        if training and options.Distributed.numProcesses > 1 and options._instances == 1:
            raise Error("training in several processes needs popdist.poptorch.Options, which exchange gradients")
        options._freeze()
        self._options, self._training = options, training
        self._user_model = model
        self.model = copy.copy(model)  # shallow: the modules inside are shared, the flag `training` is not
        self.trace = None
        self._weights = self._specification = self._returns = self._path = None
        self._stale = False  # whether the host's weights are older than the device's
        self._version = self._seen = 0  # of a trainer's weights, and the one that inference has copied
        self._attached = False
        self._calls = 0
        self._optimizer, self._settings, self._constants, self._state = None, None, None, {}
        seed = options._values.get("randomSeed", 0) + options.Distributed.processId
        self._rng = torch.Generator().manual_seed(seed).get_state()
        if training:
            self.setOptimizer(optimizer)
            self._original_class = watch_reads(model, self)

    # ---- compilation

    def compile(self, *batch):
        if self._specification is not None:
            raise Error("the model is compiled already; destroy() it first")
        options = self._options
        if not self._training and options.Training.gradient_accumulation != 1:
            raise Error("an inference model needs gradientAccumulation 1")
        transfer.check_inputs(batch, options)
        self._fetch_from_trainer()
        weights = Weights(self.model)
        micro_batch = transfer.micro_batches([self._first_rows(tensor) for tensor in batch], Options())[0]
        trace = Trace(self.model, options._values["setExecutionStrategy"])
        with trace.recording(), DeviceRandom(self._rng):
            run, outputs = self._pass(weights, micro_batch)
            transfer.flatten(outputs)
            if self._training:
                run.final_loss()
        trace.finish(self._training, options)
        leaked = list(leaks(self.model))
        if leaked:
            raise Error(f"forward left IPU tensors in {', '.join(leaked)}: they have no value outside of it")
        if not self._offline:
            MACHINE.acquire(self, count_ipus(trace.ipus, options))
        MACHINE.compiled.append(type(self._user_model).__name__)
        weights.upload()  # the pass may have written to buffers
        self._returns, self._path = type(outputs), run.path
        self.trace, self._weights, self._specification = trace, weights, transfer.specification(batch)
        if self._training:
            self._take_state()
        self._write_executable()
        self._attached = not self._offline

    def _first_rows(self, tensor):
        parts = self._options._micro_batches
        return tensor[: len(tensor) // parts] if parts > 1 else tensor

    def _pass(self, weights, inputs):
        with weights.on_device(), torch.set_grad_enabled(self._training), Run(self._training) as run:
            return run, run.call(self.model, inputs)

    @property
    def _offline(self):
        return "offline" in self._options._values

    def _write_executable(self):
        folder = self._options._values.get("enableExecutableCaching")
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            Path(folder, f"{type(self._user_model).__name__}.popef").touch()

    # ---- running

    def __call__(self, *batch):
        transfer.check_inputs(batch, self._options)
        given = transfer.specification(batch)
        if given != self._specification:
            raise Error(f"inputs {given} instead of {self._specification}: shapes and dtypes are fixed at compile time")
        if self._offline:
            raise Error("Trying to run a model on an offline device")
        if self._training and self._optimizer._loaded is not None:
            raise Error("an optimizer state was loaded and setOptimizer() not called: the device does not have it")
        self._fetch_from_trainer()
        MACHINE.exchange()
        MACHINE.calls.append(type(self._user_model).__name__)
        results = self._run(batch)
        self._calls += 1
        if self._training:
            self._stale = True
            self._version += 1
        return self._returns(results) if self._returns in (list, tuple) else results[0]

    def _run(self, batch):
        options = self._options
        queue = iter(transfer.micro_batches(batch, options))
        collector = transfer.Collector(options, self._training)
        with DeviceRandom(self._rng) as random:
            for _ in range(options.device_iterations):
                gradients = optim.Gradients(options, self._optimizer.accum_type) if self._training else None
                for step in range(options.Training.gradient_accumulation):
                    replicas = range(options.replication_factor)
                    collector.add([self._micro_batch(next(queue), gradients, replica, step) for replica in replicas])
                if self._training:
                    self._update(gradients)
        self._rng = random.after
        results = collector.results()
        if options._values.get("enableSyntheticData"):
            return [torch.full_like(x, float("nan")) if x.is_floating_point() else torch.zeros_like(x) for x in results]
        return results

    def _micro_batch(self, inputs, gradients, replica, step):
        run, outputs = self._pass(self._weights, inputs)
        if run.path != self._path:
            now, then = next((pair for pair in zip(run.path, self._path) if pair[0] != pair[1]), ("its end", "its end"))
            raise Error(f"forward went another way than in the fixed graph: {now} instead of {then}")
        if self._training:
            trained = self._weights.trained()
            loss = run.final_loss() * self._settings[0]["loss_scaling"]
            found = torch.autograd.grad(loss, list(trained.values()))
            gradients.add(replica, step, dict(zip(trained, found)))
        return transfer.flatten(outputs)

    def _update(self, gradients):
        reduced = gradients.reduce(self._settings[0]["loss_scaling"])
        optim.clip_norm(reduced, self._settings[0]["max_grad_norm"])
        groups = self._groups()
        for name, gradient in reduced.items():
            settings = self._settings[groups[name]]
            weight, state = self._weights.device[name], self._state[name]
            optim.update_weight(weight, gradient, state, settings, self._optimizer.decoupled)

    def _groups(self):
        """Return {parameter name: number of its group}."""
        groups = enumerate(self._optimizer.param_groups)
        numbers = {id(tensor): number for number, group in groups for tensor in group["params"]}
        return {name: numbers.get(id(tensor)) for name, tensor in self._weights.parameters.items()}

    # ---- the optimizer

    def setOptimizer(self, optimizer):
        settings = optimizer._snapshot()
        constants = self._constants_of(optimizer, settings)
        if self._specification is not None and constants != self._constants:
            changed = [f"{a} instead of {b}" for a, b in zip(constants, self._constants) if a != b]
            raise Error(f"attributes not given to the optimizer's constructor cannot change: {'; '.join(changed)}")
        self._constants = constants
        self._optimizer, self._settings = optimizer, settings
        optimizer._attach(self)
        if self._specification is not None:
            self._take_state()

    def _constants_of(self, optimizer, settings):
        """Return what is part of the graph: dtypes, which attributes are variable, and the values of the others."""
        fixed = [{name: one[name] for name in one if name not in optimizer.explicit} for one in settings]
        return [{name: getattr(optimizer, name) for name in optim.DTYPES}, sorted(optimizer.explicit), *fixed]

    def _take_state(self):
        """Take the moments of a load_state_dict, and zeros for parameters that have none yet."""
        for name, weight in self._weights.trained().items():
            self._state.setdefault(name, optim.new_state(weight, self._optimizer))
        loaded, self._optimizer._loaded = self._optimizer._loaded, None
        if loaded is None:
            return
        names = {f"{moment}___{name}": (name, moment) for name in self._state for moment in MOMENTS}
        for key, (name, moment) in names.items():
            self._state[name][moment].copy_(loaded["ipu_state"][key])
        self._calls = max(self._calls, 1)

    def _optimizer_state(self):
        if self._calls == 0:
            return {}
        state = {f"{m}___{name}": own[m].clone() for name, own in self._state.items() for m in MOMENTS}
        flat = {}
        for number, group in enumerate(self._settings):
            flat.update((f"{key}___group{number}", torch.tensor(value)) for key, value in group.items())
        return {"ipu_state": state, "ipu_param": flat}

    # ---- weights

    def _fetch_weights(self):
        if self._stale:
            MACHINE.exchange()
            self._stale = False
            self._weights.download()

    def _fetch_from_trainer(self):
        """Copy the weights of a model that another executor trains to the inference model that wraps it, too."""
        trainer = getattr(type(self._user_model), "_poptorch_executor", None)
        if self._training or trainer is None or trainer._version == self._seen:
            return
        trainer._fetch_weights()
        self._seen = trainer._version
        if self._weights is not None:
            self._weights.upload()

    def copyWeightsToDevice(self):
        self._stale = False
        self._weights.upload()
        self._version += 1

    def state_dict(self):
        if self._training:
            self._fetch_weights()
        return self._user_model.state_dict()

    def load_state_dict(self, state_dict, strict=True):
        result = self._user_model.load_state_dict(state_dict, strict=strict)
        if self._weights is not None:
            self.copyWeightsToDevice()
        return result

    # ---- the device

    def isAttachedToDevice(self):
        return self._attached

    def attachToDevice(self):
        if self._specification is None or self._attached or self._offline:
            raise Error("attachToDevice: not compiled, attached already, or the target is offline")
        MACHINE.acquire(self, count_ipus(self.trace.ipus, self._options))
        self._attached = True
        self.copyWeightsToDevice()

    def detachFromDevice(self):
        if not self._attached:
            raise Error("detachFromDevice: not attached")
        MACHINE.exchange()  # PopTorch reads the state of random numbers
        if self._training:
            self._fetch_weights()
        MACHINE.give_up(self)
        self._attached = False

    def destroy(self):
        """Release the device and give the wrapped model its own class again."""
        if self._training and hasattr(type(self._user_model), "_poptorch_executor"):
            self._fetch_weights()
            self._user_model.__class__ = self._original_class
        MACHINE.give_up(self)
        self._weights = self._specification = None
        self._attached = False
