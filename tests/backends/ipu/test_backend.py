"""The IPU backend on the stand-in for PopTorch: its choice, refusals, options and loader; estimates."""

from argparse import Namespace

import pytest
import torch

import backends
from backends.ipu import backend as ipu
from backends.ipu import estimates
from backends.native import backend as native
from data.loader import EpochOrder, GeneratedDataset, RunOrder
from models.pipeline_dalle import placement
from tests.backends.ipu.ipu_runs import settings
from tests.builders import ROOT, one_line, samples, small_dalle


def test_auto_is_an_ipu_where_the_sdk_is_enabled(poptorch_standin, monkeypatch):
    assert isinstance(backends.for_training(settings(device="auto")), ipu.IpuTrainingBackend)
    assert isinstance(backends.for_training(settings(device="cpu")), native.NativeBackend)
    assert isinstance(backends.for_training(settings("--optimizer Muon", device="auto")), native.NativeBackend)
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    monkeypatch.setattr(native, "fast_in_bf16", lambda device: False)
    assert isinstance(backends.for_training(settings(device="auto")), native.NativeBackend)
    monkeypatch.undo()


def test_without_an_sdk_one_line_says_how_to_enable_it(monkeypatch):
    monkeypatch.delenv("POPLAR_SDK_ENABLED", raising=False)
    if ipu.importlib.util.find_spec("poptorch"):
        pytest.skip("PopTorch is installed")
    assert isinstance(backends.for_training(settings(device="auto")), native.NativeBackend)
    with one_line(r"--device ipu: .*enable\.sh.*pip install .*poptorch wheel"):
        backends.for_training(settings())
    monkeypatch.setenv("POPLAR_SDK_ENABLED", "/opt/poplar")
    assert isinstance(backends.for_training(settings(device="auto")), native.NativeBackend)
    with pytest.raises(ValueError, match="no PopTorch here; pip install"):
        backends.for_training(settings())


def test_a_batch_of_another_size_is_refused(poptorch_standin, tiny_vae):
    trainer = backends.for_training(settings()).trainer(small_dalle(tiny_vae))
    with pytest.raises(ValueError, match="a batch of 4 samples; .* are 3"):
        trainer.compile(samples(4))


def options_by(*flags):
    """Return what these flags set: PopTorch's setters of options and of parts of them, with their values."""
    options = backends.for_training(settings(*flags)).options()
    found = dict(options._values)
    for part in (options.Training, options.Precision, options._Popart):
        found.update(part._values)
    found.update(options.TensorLocations._values["setOptimizerLocation"]._values)
    return found


def test_each_flag_reaches_its_option(poptorch_standin, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plain = options_by()
    assert isinstance(plain["setExecutionStrategy"], poptorch_standin.PipelinedExecution)
    assert plain["outputMode"] is poptorch_standin.OutputMode.Sum and plain["autoRoundNumIPUs"] is True
    expected = {"setAvailableMemoryProportion": {"IPU0": 0.6, "IPU1": 0.6}, "randomSeed": 42, "replicationFactor": 1}
    expected.update(enableStochasticRounding=False, setPartialsType=torch.float32, useOnChipStorage=True)
    expected.update(useReplicatedTensorSharding=False, gradientAccumulation=3)
    expected["accumulationAndReplicationReductionType"] = poptorch_standin.ReductionType.Mean
    assert {name: plain[name] for name in expected} == expected
    optional = {"enableExecutableCaching", "enableProfiling", "enableSyntheticData", "offline"}
    assert not plain.keys() & {*optional, "setAutomaticLossScaling"}
    given = options_by(
        "--matmul-proportion 0.2,0.3 --random-seed 7 --stochastic-rounding --enable-half-partials --enable-als",
        "--optimizer-state-offchip --enable-rts --replication-factor 2 --executable-cache-dir cache",
        "--profile-dir profile --synthetic-data --compile-only",
    )
    expected = {"setAvailableMemoryProportion": {"IPU0": 0.2, "IPU1": 0.3}, "randomSeed": 7, "replicationFactor": 2}
    expected.update(enableStochasticRounding=True, setPartialsType=torch.float16, useOnChipStorage=False)
    expected.update(useReplicatedTensorSharding=True, setAutomaticLossScaling=True, enableExecutableCaching="cache")
    expected.update(enableProfiling="profile", enableSyntheticData=True, offline=2)
    assert {name: given[name] for name in expected} == expected
    assert options_by("--enable-rts")["useReplicatedTensorSharding"] is False  # nothing to shard over


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["--no-async-dataloader", "--async-dataloader"])
@pytest.mark.parametrize("shape", ["--gradient-accumulation 5", "--gradient-accumulation 1 --ipus-per-replica 1"])
def test_batches_are_the_orders(poptorch_standin, mode, workers, shape, monkeypatch):
    monkeypatch.setattr(ipu, "SHARE", 2)  # rebatching from shares that do not divide a batch
    layers = " --layers-per-ipu 2" if "ipus" in shape else ""
    backend = backends.for_training(settings(mode, shape + layers, f"--dataloader-workers {workers}"))
    per_step = backend.samples_per_step
    sizes = {"text_seq_len": 6, "num_text_tokens": 58, "num_image_codes": 32, "image_seq_len": 16}
    dataset = GeneratedDataset(4 * per_step + 1, **sizes)
    order = RunOrder(EpochOrder(len(dataset), per_step, seed=3), 2, 7)  # from within an epoch into the next
    found = [[part.clone() for part in batch] for batch in backend.loader(dataset, order)]
    assert len(found) == 5
    for (text, codes), keys in zip(found, order):
        assert torch.equal(text, torch.stack([dataset[key][0] for key in keys]))
        assert torch.equal(codes, torch.stack([dataset[key][1] for key in keys]))


@pytest.fixture
def l16(tiny_vae):
    """Graphcore's L16, with 1,024 codes for 256 x 256 pixels."""
    tiny_vae.image_size, tiny_vae.num_layers, tiny_vae.num_tokens = 256, 4, 1024
    patterns = ["axial_row", "axial_row", "axial_col", "axial_row"] * 2
    patterns += ["axial_row", "axial_row", "axial_col", "full"] * 2
    sizes = {"dim": 512, "num_text_tokens": 8192, "text_seq_len": 80, "depth": 16, "heads": 16, "dim_head": 64}
    return small_dalle(tiny_vae, attn_types=patterns, **sizes)


def test_a_sampler_of_l16_in_fp16(poptorch_standin, l16):
    memory = estimates.sampler_memory(l16, 4, 2)
    assert memory["weights"] == 2 * 93_604_432
    assert memory["keys and values"] == 4 * 16 * 2 * 336 * 1024 * 2
    assert memory["noise"] == 4 * 256 * 1024 * 4
    assert 2 * sum(memory.values()) == pytest.approx(542e6, rel=0.05)  # a loop that copies what it reads
    backend = backends.for_inference("ipu")
    assert backend.images_at_once(l16) == 16
    assert sum(estimates.sampler_memory(l16, 16, 2).values()) <= estimates.SAMPLER_SHARE * estimates.MEMORY
    assert sum(estimates.sampler_memory(l16, 32, 2).values()) > estimates.SAMPLER_SHARE * estimates.MEMORY
    assert backends.for_inference("ipu", "fp32").images_at_once(l16) == 4


L16 = estimates.Training(size=2, moments=6, batch_size=2)


def balanced(costs, ipus=4):
    flags = {"num_hidden_layers": 16, "ipus_per_replica": ipus, "cls_ipu_id": None, "embedding_ipu_id": 0}
    return estimates.balanced_layers(costs, L16, Namespace(**flags))


def test_the_stages_of_l16(l16):
    costs = estimates.module_costs(l16, L16, pixels=False)
    stages = estimates.estimate_stages(placement(16, layers_per_ipu=[0, 6, 6, 4]), costs, L16)
    parameters = [4_817_408, 31_506_432, 31_506_432, 25_774_160]
    assert [stage.memory["weights"] // 2 for stage in stages] == parameters
    assert [stage.memory["optimizer"] // 6 for stage in stages] == parameters
    page = (ROOT / "docs" / "ipu.md").read_text(encoding="utf-8")
    assert all(f"{count:,}" in page for count in parameters)
    layer = 2 * 336 * 512 * 2  # bytes of its output for two samples
    assert [stage.memory["stash"] / layer for stage in stages] == [2 * 7, 6 * 5, 6 * 3, 4 * 1]
    scores = 3 * 2 * 16 * 2 * 31393  # an axial layer's three tensors in fp16, two samples, 16 heads
    assert scores == pytest.approx(6e6, rel=0.01)
    axial, full = costs["transformer.layers.0"], costs["transformer.layers.15"]
    assert full.operations - axial.operations == 4 * 4 * 2 * 16 * (112896 - 31393) * 64
    assert all(sum(stage.memory.values()) < stage.capacity for stage in stages)


def test_layers_are_balanced_and_a_vqgan_and_a_full_ipu_get_fewer(l16, monkeypatch):
    monkeypatch.setattr(estimates, "encoder_cost", lambda vae: estimates.Cost(0, 29_600_000, 138e9))
    costs = estimates.module_costs(l16, L16, pixels=True)
    assert balanced(costs) == [0, 5, 6, 5]
    costs = estimates.module_costs(l16, L16, pixels=False)
    assert [balanced(costs, ipus) for ipus in (1, 2, 4)] == [[16], [8, 8], [4, 4, 4, 4]]
    monkeypatch.setattr(estimates, "MEMORY", 330e6)
    found = balanced(costs)
    stages = estimates.estimate_stages(placement(16, layers_per_ipu=found), costs, L16)
    assert all(sum(stage.memory.values()) < 0.9 * 330e6 for stage in stages) and found[0] < 4
