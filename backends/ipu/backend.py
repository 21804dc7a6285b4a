"""Graphcore IPUs through PopTorch: options, loader, optimizer, training and inference models, and PopRun's instances.

PopTorch does accumulation, replication and the update inside one call. Where the parts of the model go is
models/pipeline_dalle.py's. Not run on hardware so far: held by a strict stand-in for PopTorch (tests/poptorch_standin)
and by checks of the operators in use.
"""

import contextlib
import copy
import importlib.util
import logging
import os

import torch

from backends.base import SamplesLost
from backends.ipu.inference import Decoder, Losses, OrderedSamples, RowByRow, Sampler, upper_rows
from backends.native.resilient_loader import MEMORY, leave_interrupts_to_the_parent, of_killed_worker, without_traceback
from backends.native.trainer import ADAM_EPS
from models.pipeline_dalle import WrappedDALLE, placement, stages, unshare_masks
from utils import interrupts
from utils.files import check_writable
from utils.optimization import load_keeping_flags, parameter_groups

LOG = logging.getLogger("minidalle")
SHARE = 256  # samples that a worker loads at once
FP32_WEIGHTS = 300e6  # bytes of weights up to which an IPU, with some 900 MB, draws pictures in fp32


def is_enabled():
    """Whether the Poplar SDK is enabled in this shell, with PopTorch in it."""
    return bool(os.environ.get("POPLAR_SDK_ENABLED")) and importlib.util.find_spec("poptorch") is not None


def has_optimizer(settings):
    """Whether PopTorch has the optimizer of train.py's namespace; others want none."""
    return getattr(settings, "optimizer", "Adam") in ("Adam", "AdamW")


def require_poptorch():
    if importlib.util.find_spec("poptorch") is None:
        enabled = "" if os.environ.get("POPLAR_SDK_ENABLED") else "run `. enable.sh` in the Poplar SDK's folders and "
        raise ValueError(f"--device ipu: there is no PopTorch here; {enabled}pip install the SDK's poptorch wheel")


class Instances:
    """This process among those that PopRun started; alone where it started none."""

    def __init__(self, replicas):
        """replicas: those of all instances together, where PopRun does not say."""
        self.rank, self.size, self.replicas, self.all_replicas = 0, 1, replicas, replicas
        self.popdist = self.horovod = None
        if importlib.util.find_spec("popdist") is None:
            return
        import popdist

        if not popdist.isPopdistEnvSet():
            return
        import horovod.torch
        import popdist.poptorch

        horovod.torch.init()
        self.popdist, self.horovod = popdist, horovod.torch
        self.rank, self.size = popdist.getInstanceIndex(), popdist.getNumInstances()
        self.replicas, self.all_replicas = popdist.getNumLocalReplicas(), popdist.getNumTotalReplicas()
        if self.all_replicas != replicas and not self.rank:
            LOG.info("PopRun has %d replicas, which --replication-factor %d gives way to", self.all_replicas, replicas)

    def options(self, ipus_per_replica):
        import poptorch

        if self.popdist:
            return self.popdist.poptorch.Options(ipus_per_replica=ipus_per_replica)
        return poptorch.Options().replicationFactor(self.replicas)

    def mean(self, values):
        """Floats of this instance → their means over all instances."""
        if not self.horovod:
            return values
        return self.horovod.allreduce(torch.tensor(values), op=self.horovod.Average).tolist()

    def of_rank_zero(self, number):
        """rank 0's whole number, whatever this instance has."""
        if not self.horovod:
            return number
        return int(self.horovod.broadcast(torch.tensor([number]), root_rank=0))


class IpuBackend:
    gather = None

    def __init__(self, settings):
        """settings: train.py's or generate.py's namespace. ValueError for what no IPU can run."""
        require_poptorch()
        if settings.precision == "bf16":
            raise ValueError("--precision bf16: IPUs have no bfloat16; use fp16 or fp32")
        self.settings = settings
        self.compile_only = getattr(settings, "compile_only", False)
        self.instances = Instances(getattr(settings, "replication_factor", 1))
        self.rank, self.world_size = self.instances.rank, self.instances.size
        self.encoder = None
        self.samples_per_step = settings.batch_size
        if hasattr(settings, "gradient_accumulation"):
            self.prepare_training(settings)

    def prepare_training(self, settings):
        if settings.ema_decay:
            raise ValueError("--ema-decay: weights stay on the IPU and are not averaged; leave it out")
        settings.random_seed = self.instances.of_rank_zero(settings.random_seed)
        if not has_optimizer(settings):
            raise ValueError(f"--optimizer {settings.optimizer}: PopTorch has none; use Adam or AdamW")
        self.half = settings.precision == "fp16" or (settings.precision == "auto" and settings.fp16 is True)
        depth, ipus = settings.num_hidden_layers, settings.ipus_per_replica
        evenly = [depth * (ipu + 1) // ipus - depth * ipu // ipus for ipu in range(ipus)]
        self.places = placement(
            depth,
            layers_per_ipu=settings.layers_per_ipu or evenly,
            embedding_ipu_id=settings.embedding_ipu_id,
            cls_ipu_id=settings.cls_ipu_id,
            pixels=settings.no_codes_cache,
        )
        pipeline = stages(self.places)
        if settings.gradient_accumulation < 2 * len(pipeline) - 1:
            raise ValueError(
                f"--gradient-accumulation {settings.gradient_accumulation}: a pipeline of {len(pipeline)} stages needs "
                f"{2 * len(pipeline) - 1} micro-batches or more to one update"
            )
        for flag in ("executable_cache_dir", "profile_dir"):
            if getattr(settings, flag):
                check_writable(getattr(settings, flag), "--" + flag.replace("_", "-"))
        self.micro_batches = settings.gradient_accumulation * self.instances.replicas * settings.device_iterations
        self.samples_per_step = settings.batch_size * self.micro_batches

    @contextlib.contextmanager
    def making_codes(self):
        """Rank 0 first, on one IPU."""
        if self.rank:
            self.instances.of_rank_zero(0)  # a broadcast, so all have come
        try:
            yield
        finally:
            if not self.rank:
                self.instances.of_rank_zero(0)

    def agreed(self, wish):
        return self.instances.mean([float(wish)])[0] > 0

    def options(self, training=True):
        """Those of a model that trains, or of one that evaluates as many samples a call."""
        import poptorch

        settings = self.settings
        options = self.instances.options(settings.ipus_per_replica)
        options.autoRoundNumIPUs(True)
        accumulation = settings.gradient_accumulation if training else 1
        options.Training.gradientAccumulation(accumulation)
        options.deviceIterations(settings.device_iterations * settings.gradient_accumulation // accumulation)
        options.randomSeed(settings.random_seed)
        # The default, Final, would return the losses of the last micro-batch out of thousands.
        options.outputMode(poptorch.OutputMode.Sum)
        options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
        proportions = settings.matmul_proportion
        if len(proportions) == 1:
            proportions = proportions * settings.ipus_per_replica
        options.setAvailableMemoryProportion({f"IPU{ipu}": share for ipu, share in enumerate(proportions)})
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
        if settings.enable_als and training:
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

    def loader(self, dataset, order):
        """Batches of samples_per_step rows, text and image; a batch is overwritten when later ones are asked for."""
        import poptorch

        workers = min(self.settings.dataloader_workers, os.cpu_count() or 1)  # more would be in their own way
        modes = poptorch.DataLoaderMode
        mode, rebatching = modes.Async if self.settings.async_dataloader else modes.Sync, {}
        if mode == modes.Async and self.samples_per_step > 1:  # share the thousands of samples to a step among workers
            mode, rebatching = modes.AsyncRebatched, {"rebatched_worker_size": min(SHARE, self.samples_per_step)}
        batches = poptorch.DataLoader(
            self.options(),
            OrderedSamples(dataset, order, self.samples_per_step),
            batch_size=self.settings.batch_size,
            shuffle=False,
            num_workers=workers,
            drop_last=True,
            auto_distributed_partitioning=False,  # the order holds this instance's share already
            mode=mode,
            worker_init_fn=leave_interrupts_to_the_parent,
            **rebatching,
        )
        try:
            for batch in batches:
                with interrupts.children_held():
                    yield batch
        except (RuntimeError, ConnectionError) as error:
            raise SamplesLost(of_killed_worker(error, dataset)[0] + MEMORY) from None
        except (ValueError, OSError) as error:
            raise SamplesLost(without_traceback(error)) from None
        except AssertionError as error:  # what PopTorch makes of a fault in its loader's process, which has told it
            raise SamplesLost(f"samples could not be read ({error})") from None
        finally:
            batches.terminate()

    def inference(self, module, device_iterations=1):
        """A module as a function of tensors of fixed shapes, on one IPU."""
        import poptorch

        return poptorch.inferenceModel(module.eval(), poptorch.Options().deviceIterations(device_iterations))

    def trainer(self, model):
        LOG.info("training on IPUs in %s", "fp16" if self.half else "fp32")
        for number, (ipu, modules) in enumerate(stages(self.places)):
            held = [modules[0], "…", modules[-1]] if len(modules) > 3 else modules
            LOG.info("stage %d on IPU %d: %s", number, ipu, " ".join(held))
        return IpuTrainer(model, self)

    def evaluator(self, model):
        """On one IPU, row by row, so that no batch has to be filled up."""
        module = RowByRow(Losses(self.for_inference(model)), self.inference)

        def evaluate(batches):
            if self.encoder is not None:
                self.encoder.destroy()  # its IPU is wanted
            rows = torch.cat([module(torch.cat((text, codes), dim=1)) for text, codes in batches])
            module.destroy()  # others want its IPU
            return dict(zip(("total", "text", "image"), rows.mean(dim=0).tolist()))

        return evaluate

    def for_inference(self, model):
        """A copy of a DALLE as it runs on one IPU: without its VQGAN, in fp16 where asked for or large."""
        weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vae."))
        wanted = self.settings.precision
        half = wanted == "fp16" or (wanted == "auto" and 4 * weights > FP32_WEIGHTS)
        LOG.info("running on an IPU in %s", "fp16" if half else "fp32")
        model = copy.deepcopy(model, {id(model.vae): None}).eval()  # without its VQGAN, which decode() has
        unshare_masks(model)
        return model.half() if half else model

    def encode(self, vae):
        """In fp32, so that codes are those of other machines."""
        self.encoder = RowByRow(vae, self.inference)
        return lambda pixels: self.encoder(pixels).long()

    def decode(self, vae):
        return upper_rows(RowByRow(Decoder(vae), self.inference))

    def sampler(self, model, whole_pictures=True):
        """whole_pictures: one call of the device a batch; otherwise, or where that does not compile, one a code."""
        import poptorch

        on_device = {"loop": poptorch.for_loop, "update": poptorch.dynamic_update} if whole_pictures else None
        return Sampler(self.for_inference(model), self.settings.batch_size, self.inference, on_device)


class IpuTrainer:
    def __init__(self, model, backend):
        import poptorch

        settings = backend.settings
        self.backend = backend
        self.vqgan = {f"vae.{name}": tensor for name, tensor in model.vae.state_dict().items()}
        self.on_device = settings.no_codes_cache  # whether the VQGAN is
        model = copy.deepcopy(model, {} if self.on_device else {id(model.vae): None}).train()
        self.wrapped = WrappedDALLE(model, backend.places, settings.embedding_serialization_factor)
        if backend.half:
            self.wrapped.half()
        self.optimizer = build_optimizer(self.wrapped, settings, backend.half)
        self.executor = poptorch.trainingModel(self.wrapped, options=backend.options(), optimizer=self.optimizer)
        self.evaluator = None
        self.lr = settings.learning_rate

    def compile(self, batch):
        rows, wanted = len(batch[0]), self.backend.samples_per_step
        if rows != wanted:
            raise ValueError(
                f"a batch of {rows} samples; --batch-size × --gradient-accumulation × --replication-factor × "
                f"--device-iterations are {wanted}"
            )
        if self.backend.encoder is not None:
            self.backend.encoder.destroy()  # its IPU is wanted
        self.executor.setOptimizer(self.optimizer)
        self.executor.compile(*batch)

    def step(self, batch):
        return self.means(self.executor(*batch))

    def evaluate(self, batches):
        import poptorch

        training = self.executor.isAttachedToDevice()
        if training:  # the same IPUs are wanted, and the weights that are there now
            self.executor.detachFromDevice()
        if self.evaluator is not None:
            self.evaluator.attachToDevice()
        losses = []
        for batch in batches:
            if self.evaluator is None:
                self.evaluator = poptorch.inferenceModel(self.wrapped.eval(), self.backend.options(training=False))
                self.evaluator.compile(*batch)
                self.wrapped.train()
            losses.append(self.means(self.evaluator(*batch)))
        self.evaluator.detachFromDevice()
        if training:
            self.executor.attachToDevice()
        return {name: sum(found[name] for found in losses) / len(losses) for name in losses[0]}

    def means(self, sums):
        """Losses summed over the micro-batches of a call, a row a replica → their means over all instances."""
        names = ("total", "text", "image")
        if self.backend.settings.synthetic_data:  # nothing is read back from the device
            return dict.fromkeys(names, 0.0)
        means = [float(part.float().sum()) / self.backend.micro_batches for part in sums]
        return dict(zip(names, self.backend.instances.mean(means)))

    def sampler(self):
        """None: the IPUs hold the training program."""

    def set_lr(self, lr):
        if lr == self.lr:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.executor.setOptimizer(self.optimizer)  # the device would go on with the old one
        self.lr = lr

    def state_dict(self):
        trained = {name.partition(".")[2]: tensor for name, tensor in self.executor.state_dict().items()}
        trained = {name: tensor.detach().float().cpu() for name, tensor in trained.items()}
        opt_state = {**self.optimizer.state_dict(), "parameters": self.parameters()}
        return {"weights": {**trained, **self.vqgan}, "opt_state": [opt_state]}

    def parameters(self):
        """What the optimizer's state belongs to: its names are those of this model's pieces on the device."""
        return [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in self.wrapped.named_parameters() if p.requires_grad]

    def load_state_dict(self, state):
        kept = {
            f"model.{name}": tensor
            for name, tensor in state["weights"].items()
            if self.on_device or not name.startswith("vae.")
        }
        self.executor.load_state_dict(kept)
        opt_state = state.get("opt_state")
        if opt_state is None:
            return
        try:
            (saved,) = opt_state
            if not saved.get("ipu_state") or saved.get("parameters") != self.parameters():
                raise ValueError
            load_keeping_flags(self.optimizer, {name: saved[name] for name in saved if name != "parameters"})
            self.executor.setOptimizer(self.optimizer)
        except (ValueError, LookupError, TypeError, AttributeError):
            LOG.warning("the checkpoint's optimizer state is no IPU's, or another optimizer's; it starts afresh")


def build_optimizer(model, settings, half):
    """PopTorch's Adam or AdamW. What is not passed here becomes a constant of the compiled program."""
    import poptorch

    given = {"lr": settings.learning_rate, "betas": tuple(settings.adam_betas), "eps": ADAM_EPS}
    if settings.loss_scaling != 1:
        given["loss_scaling"] = settings.loss_scaling
    if half:
        given["accum_type"] = torch.float16
    if settings.enable_half_first_order_momentum:
        given["first_order_momentum_accum_type"] = torch.float16
    if settings.max_grad_norm is not None:
        given["max_grad_norm"] = settings.max_grad_norm
    return getattr(poptorch.optim, settings.optimizer)(parameter_groups(model, settings.weight_decay), **given)
