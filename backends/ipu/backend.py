"""Run on Graphcore IPUs through PopTorch: options, loader, training and inference models, and PopRun's instances.

PopTorch carries out accumulation, replication and the update inside one call. This has not run on hardware yet: the
tests use a strict stand-in for PopTorch and check the operators in use.
"""

import contextlib
import functools
import importlib.util
import logging
import math
import os
from argparse import Namespace
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn

from backends.base import Backend, LossValues, StageEstimate, Trainer, TrainingBackend
from backends.ipu import estimates
from backends.ipu.inference import (
    DeviceLosses,
    DeviceSampler,
    OrderedSamples,
    Program,
    RowByRow,
    VqganDecoder,
    decode_upper_rows,
    explain_loader_errors,
    inference_copy,
)
from backends.ipu.trainer import IpuTrainer
from backends.native.trainer import ADAM_EPS
from models.dalle import DALLE, parameter_groups
from models.pipeline_dalle import Placement, check_micro_batches, placement, stages
from models.vae import ImageTokenizer
from utils.files import check_writable, defer_sigchld, ignore_interrupts_in_worker

logger = logging.getLogger("minidalle")
OPTIMIZERS = ("Adam", "AdamW")  # that PopTorch has
SHARE = 256  # samples that a worker loads at once
FP32_WEIGHTS = 300e6  # bytes of weights up to which an IPU, which has about 900 MB, samples in fp32


def is_enabled() -> bool:
    """Return whether the Poplar SDK is enabled in this shell and PopTorch is installed."""
    return bool(os.environ.get("POPLAR_SDK_ENABLED")) and importlib.util.find_spec("poptorch") is not None


@contextlib.contextmanager
def device_errors(problem: str, kind: Type[ValueError] = ValueError) -> Iterator[None]:
    """Turn errors of PopTorch, and of torch while PopTorch compiles, into `kind`: the problem and its reason."""
    import poptorch

    try:
        yield
    except (poptorch.Error, RuntimeError) as error:  # poptorch.Error derives from Exception
        reason = next(iter(str(error).splitlines()), "")
        raise kind(f"IPU: {problem}: {reason}") from error


class Instances:
    """The instances that PopRun started, of which this is number `rank`; a single one without PopRun."""

    def __init__(self, replicas: Optional[int]):
        self.rank, self.size = 0, 1
        self.replicas = self.all_replicas = 1 if replicas is None else replicas  # in this instance, and in all
        self.popdist: Any = None  # PopRun's module, if PopRun runs
        self.horovod: Any = None
        try:
            import popdist
        except ImportError:
            if any(name.startswith("POPDIST_") for name in os.environ):
                raise ValueError("PopRun: there is no popdist here; pip install the SDK's popdist wheel") from None
            return
        if not popdist.isPopdistEnvSet():
            return
        try:
            import horovod.torch
        except ImportError:
            raise ValueError("PopRun: needs Horovod; pip install -r requirements-ipu.txt") from None
        import popdist.poptorch

        popdist.init()  # before anything else, or PopRun's runtime is set up and ended too late
        horovod.torch.init()
        self.popdist, self.horovod = popdist, horovod.torch
        self.rank, self.size = popdist.getInstanceIndex(), popdist.getNumInstances()
        self.replicas, self.all_replicas = popdist.getNumLocalReplicas(), popdist.getNumTotalReplicas()
        if replicas not in (None, self.all_replicas) and not self.rank:
            logger.info("PopRun's %d replicas override --replication-factor %d", self.all_replicas, replicas)

    def options(self, ipus_per_replica: int, replicas: Optional[int] = None) -> Any:
        """Return poptorch.Options for this instance's replicas, or for `replicas` where PopRun does not decide it."""
        import poptorch

        if self.popdist:
            return self.popdist.poptorch.Options(ipus_per_replica=ipus_per_replica)
        return poptorch.Options().replicationFactor(self.replicas if replicas is None else replicas)

    def mean(self, values: List[float]) -> List[float]:
        if not self.horovod:
            return values
        return self.horovod.allreduce(torch.tensor(values), op=self.horovod.Average).tolist()

    def broadcast(self, number: int) -> int:
        """Return rank 0's number in every instance."""
        if not self.horovod:
            return number
        return int(self.horovod.broadcast(torch.tensor([number]), root_rank=0))


class IpuBackend(Backend):
    """An IPU that samples and evaluates."""

    kind = "ipu"
    device = torch.device("cpu")
    can_gather = False
    device_errors = staticmethod(device_errors)

    def __init__(
        self, precision: str = "auto", executable_cache_dir: Optional[str] = None, replicas: Optional[int] = None
    ):
        if importlib.util.find_spec("poptorch") is None:
            enable = "" if os.environ.get("POPLAR_SDK_ENABLED") else "run `. enable.sh` in the SDK's folders and "
            raise ValueError(f"--device ipu: there is no PopTorch here; {enable}pip install the SDK's poptorch wheel")
        if precision == "bf16":
            raise ValueError("--precision bf16: IPUs have no bfloat16; use fp16 or fp32")
        if executable_cache_dir:
            check_writable(executable_cache_dir, "--executable-cache-dir")
        self.precision, self.executable_cache_dir = precision, executable_cache_dir
        self.instances = Instances(replicas)
        self.rank, self.world_size = self.instances.rank, self.instances.size
        self.ipus_per_replica = 1  # as PopRun's --ipus-per-replica
        self.holders: Dict[str, Program] = {}  # programs that hold IPUs

    def autocast(self) -> ContextManager[Any]:
        """Return an empty context: on the CPU, modules compute in fp32."""
        return contextlib.nullcontext()

    def gather(self, rows: Tensor) -> Tensor:
        """Refuse: instances exchange no tensors outside a training program."""
        raise NotImplementedError("IPU instances gather no tensors")

    def program(self, role: str, module: nn.Module, device_iterations: int = 1) -> Program:
        """Return a module as a function of tensors with fixed shapes, on one IPU (under PopRun, one of each replica).

        Args:
            role: encoder, decoder, sampler or evaluator. At most one of each holds an IPU; under PopRun, whose options
                name an instance's IPUs, at most one of all.
        """
        import poptorch

        def make() -> Any:
            options = self.instances.options(self.ipus_per_replica, replicas=1).deviceIterations(device_iterations)
            options._Popart.set("aliasZeroCopy", True)  # or a loop gets copies of the weights that it reads
            if self.executable_cache_dir:
                options.enableExecutableCaching(self.executable_cache_dir)
            return poptorch.inferenceModel(module.eval(), options)

        slot = "the instance's IPUs" if self.instances.popdist else role
        return Program(make, role, slot, self.holders, device_errors)

    def release(self, *roles: str) -> None:
        """Give up the IPUs of these roles, or of all; the next call takes them again."""
        for program in list(self.holders.values()):
            if not roles or program.role in roles:
                program.release()

    def evaluator(self, model: DALLE) -> Callable[[Iterable[Tuple[Tensor, Tensor]]], LossValues]:
        """Return a function from batches to mean losses, on one IPU, row by row so that no batch has to be padded."""
        losses = self._row_by_row("evaluator", DeviceLosses(inference_copy(model, self.number_size(model))))

        def evaluate(batches: Iterable[Tuple[Tensor, Tensor]]) -> LossValues:
            self.release("encoder")
            rows = torch.cat([losses(torch.cat((text, codes), dim=1)) for text, codes in batches])
            self.release("evaluator")
            return dict(zip(("total", "text", "image"), rows.mean(dim=0).tolist()))

        return evaluate

    def number_size(self, model: DALLE) -> int:
        """Return the bytes of a number in inference: 2 if it is asked for or if the model is large, else 4."""
        large = 4 * estimates.trained_parameters(model) > FP32_WEIGHTS
        half = self.precision == "fp16" or (self.precision == "auto" and large)
        return 2 if half else 4

    def encode(self, vae: ImageTokenizer) -> Callable[[Tensor], Tensor]:
        """Return a function from pixels to codes, in fp32, so that codes equal those of other machines."""
        encoder = self._row_by_row("encoder", vae)
        return lambda pixels: encoder(pixels).long()

    def decode(self, vae: ImageTokenizer) -> Callable[..., Tensor]:
        return decode_upper_rows(self._row_by_row("decoder", VqganDecoder(vae)))

    def images_at_once(self, model: DALLE) -> int:
        """Return the largest power of two for which the sampler's tensors leave room in an IPU's memory."""
        return estimates.sampler_sequences(model, self.number_size(model))

    def sampler(self, model: DALLE, batch_size: int, window: Optional[int] = None) -> Callable[..., Tensor]:
        """Return `generate_codes` as one call of the device per batch, or per code if that does not compile."""
        import poptorch

        if self.instances.popdist and self.instances.replicas > 1:
            raise ValueError("PopRun: generating needs as many --num-instances as --num-replicas")
        operators = {"loop": poptorch.for_loop, "update": poptorch.dynamic_update}
        sampler = DeviceSampler(
            inference_copy(model, self.number_size(model)),
            batch_size,
            functools.partial(self.program, "sampler"),
            operators,
        )
        logger.info(estimates.describe_sampler(model, sampler.rows, self.number_size(model)))
        return sampler

    def _row_by_row(self, role: str, module: nn.Module) -> RowByRow:
        replicas = self.instances.replicas if self.instances.popdist else 1
        return RowByRow(functools.partial(self.program, role, module), replicas)


class IpuTrainingBackend(IpuBackend, TrainingBackend):
    """One or several IPUs that train a pipeline."""

    def __init__(self, settings: Namespace):
        super().__init__(settings.precision, settings.executable_cache_dir, settings.replication_factor)
        if settings.ema_decay:
            raise ValueError("--ema-decay: weights stay on the IPU and are not averaged; leave it out")
        if settings.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer {settings.optimizer}: PopTorch has none; use Adam or AdamW")
        settings.random_seed = self.instances.broadcast(settings.random_seed)
        self.settings, self.compile_only = settings, settings.compile_only
        self.ipus_per_replica = settings.ipus_per_replica
        self.half = settings.precision == "fp16" or (settings.precision == "auto" and settings.fp16 is True)
        self.training = estimates.training_of(settings, self.half, self.instances.all_replicas)
        self.places: Placement = []
        self.costs: Dict[str, estimates.Cost] = {}
        if settings.layers_per_ipu != "auto":
            depth, ipus = settings.num_hidden_layers, settings.ipus_per_replica
            evenly = [depth * (ipu + 1) // ipus - depth * ipu // ipus for ipu in range(ipus)]
            self.place(settings.layers_per_ipu or evenly)
        if settings.profile_dir:
            check_writable(settings.profile_dir, "--profile-dir")
        self.batch_size = settings.batch_size
        self.micro_batches = settings.gradient_accumulation * self.instances.replicas * settings.device_iterations
        self.samples_per_step = self.batch_size * self.micro_batches

    def place(self, layers_per_ipu: Sequence[int]) -> None:
        """Place the modules on IPUs; ValueError if the pipeline gets too few micro-batches."""
        settings = self.settings
        self.places = placement(
            settings.num_hidden_layers,
            layers_per_ipu=layers_per_ipu,
            embedding_ipu_id=settings.embedding_ipu_id,
            cls_ipu_id=settings.cls_ipu_id,
            pixels=settings.no_codes_cache,
        )
        self.least_accumulation = check_micro_batches(self.places, settings.gradient_accumulation)

    def any_process(self, wish: bool) -> bool:
        return self.instances.mean([float(wish)])[0] > 0

    def evaluation_samples(self, count: int) -> int:
        """Return the samples of a call: as many micro-batches as the count fills, up to those of a step."""
        at_once = self.batch_size * self.instances.replicas
        needed = math.ceil(count / at_once)
        calls = math.ceil(needed / (self.samples_per_step // at_once))
        return at_once * max(math.ceil(needed / calls), len(stages(self.places)))  # a pipeline must be filled

    def options(self, evaluated: int = 0) -> Any:
        """Return poptorch.Options of a model that trains, or that evaluates this number of samples per call."""
        import poptorch

        settings = self.settings
        options = self.instances.options(settings.ipus_per_replica)
        options.autoRoundNumIPUs(True)
        options.Training.gradientAccumulation(1 if evaluated else settings.gradient_accumulation)
        iterations = evaluated // (self.batch_size * self.instances.replicas)
        options.deviceIterations(iterations or settings.device_iterations)
        options.randomSeed(settings.random_seed)
        # The default, Final, would return the losses of the last micro-batch out of thousands.
        options.outputMode(poptorch.OutputMode.Sum)
        options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
        proportions = settings.matmul_proportion
        if len(proportions) == 1:
            proportions = proportions * settings.ipus_per_replica
        options.setAvailableMemoryProportion({f"IPU{ipu}": share for ipu, share in enumerate(proportions)})
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
        if settings.enable_als and not evaluated:
            options.Training.setAutomaticLossScaling(True)
        options.Precision.enableStochasticRounding(settings.stochastic_rounding)
        options.Precision.setPartialsType(torch.float16 if settings.enable_half_partials else torch.float32)
        options.TensorLocations.setOptimizerLocation(
            poptorch.TensorLocationSettings()
            .useOnChipStorage(not settings.optimizer_state_offchip)
            .useReplicatedTensorSharding(settings.enable_rts and self.instances.all_replicas > 1)
        )
        options._Popart.set("disableGradAccumulationTensorStreams", True)
        options._Popart.set("outlineThreshold", 10.0)
        if settings.executable_cache_dir:
            options.enableExecutableCaching(settings.executable_cache_dir)
        if settings.profile_dir:
            options.enableProfiling(settings.profile_dir)
        if settings.synthetic_data:
            options.enableSyntheticData(True)
        if settings.compile_only:
            options.useOfflineIpuTarget(ipu_version=2)
        return options

    def loader(self, dataset: Any, order: Sequence[List[Any]], samples: Optional[int] = None) -> Iterator[Any]:
        """Yield batches of text and image, of `samples` or samples_per_step; PopTorch overwrites a batch later."""
        import poptorch

        rows = samples or self.samples_per_step
        workers = min(self.settings.dataloader_workers, os.cpu_count() or 1)  # more would compete for cores
        modes = poptorch.DataLoaderMode
        mode, rebatching = modes.Async if self.settings.async_dataloader else modes.Sync, {}
        if mode == modes.Async and rows > 1:  # workers share the thousands of samples of a step
            mode, rebatching = modes.AsyncRebatched, {"rebatched_worker_size": min(SHARE, rows)}
        with explain_loader_errors(dataset, poptorch.Error):
            batches = poptorch.DataLoader(
                self.options(samples or 0),
                OrderedSamples(dataset, order, rows),
                batch_size=self.batch_size,
                shuffle=False,
                num_workers=workers,
                drop_last=True,
                auto_distributed_partitioning=False,  # the order holds only this instance's samples
                mode=mode,
                worker_init_fn=ignore_interrupts_in_worker,
                **rebatching,
            )
            try:
                for batch in batches:
                    with defer_sigchld():
                        yield batch
            finally:
                batches.terminate()

    def trainer(self, model: DALLE) -> Trainer:
        logger.info("training on IPUs in %s", "fp16" if self.half else "fp32")
        settings = self.settings
        self.costs = estimates.module_costs(model, self.training, pixels=settings.no_codes_cache)
        if settings.layers_per_ipu == "auto":
            settings.layers_per_ipu = estimates.balanced_layers(self.costs, self.training, settings)
            self.place(settings.layers_per_ipu)
            logger.info("--layers-per-ipu auto: %s", ",".join(map(str, settings.layers_per_ipu)))
        for number, (ipu, modules) in enumerate(stages(self.places)):
            shown = [modules[0], "…", modules[-1]] if len(modules) > 3 else modules
            logger.info("stage %d on IPU %d: %s", number, ipu, " ".join(shown))
        return IpuTrainer(model, self)

    def stage_estimates(self) -> List[StageEstimate]:
        return estimates.estimate_stages(self.places, self.costs, self.training)

    def optimizer(self, model: nn.Module) -> Any:
        """Return PopTorch's Adam or AdamW; flags not passed to it become constants of the compiled program."""
        import poptorch

        settings = self.settings
        flags = {"lr": settings.learning_rate, "betas": tuple(settings.adam_betas), "eps": ADAM_EPS}
        if settings.loss_scaling != 1:
            flags["loss_scaling"] = settings.loss_scaling
        if self.half:
            flags["accum_type"] = torch.float16
        if settings.enable_half_first_order_momentum:
            flags["first_order_momentum_accum_type"] = torch.float16
        if settings.max_grad_norm is not None:
            flags["max_grad_norm"] = settings.max_grad_norm
        groups = parameter_groups(model, settings.weight_decay)
        return getattr(poptorch.optim, settings.optimizer)(groups, **flags)

    def training_model(self, model: nn.Module, optimizer: Any) -> Any:
        import poptorch

        return poptorch.trainingModel(model, options=self.options(), optimizer=optimizer)

    def evaluation_model(self, model: nn.Module, samples: int) -> Any:
        """Return the program that computes the losses of `samples` per call, on the IPUs that train."""
        import poptorch

        return poptorch.inferenceModel(model.eval(), self.options(samples))
