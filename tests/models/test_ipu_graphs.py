"""Every graph of ours that an IPU compiles: PopTorch 3.4 could lower it, as far as tests/ipu_operators can tell."""

import sys

import pytest
import torch
import yaml

from backends.ipu.inference import DeviceLosses
from models.pipeline_dalle import AxialAttention, WrappedDALLE, placement
from models.sampling import Sampling
from models.static_sampling import FullPass, StaticSampler, settings_row
from models.transformer import PATTERNS
from tests.conftest import ROOT
from tests.ipu_operators import graphs
from tests.ipu_operators.check import check
from tests.ipu_operators.standins import standins

ENTRIES = yaml.safe_load((ROOT / "configs.yaml").read_text(encoding="utf-8"))
NAMES = [name for name, entry in ENTRIES.items() if "num_hidden_layers" in entry]
PRECISION = pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
VQGANS = pytest.mark.parametrize("gumbel", [False, True], ids=["VQModel", "GumbelVQ"])


@pytest.fixture
def poptorch(monkeypatch):
    stand_in = standins()
    monkeypatch.setitem(sys.modules, "poptorch", stand_in)
    return stand_in


@pytest.fixture
def accepted():
    """accepted(module, inputs, training=False): check() refuses nothing → the report."""

    def run(module, inputs, training=False):
        report = check(module, inputs, training=training)
        assert report.refused == {}
        assert report.losses == (["poptorch::identity_loss"] if training else [])
        return report

    return run


@PRECISION
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_trains_from_codes(poptorch, accepted, name, half):
    settings = graphs.configuration(name)
    model = graphs.dalle(graphs.codes_only(graphs.GRIDS.get(name, 16)), settings)
    text, codes = graphs.text(model), graphs.codes(model)
    places = placement(
        settings.num_hidden_layers,
        layers_per_ipu=settings.layers_per_ipu or [settings.num_hidden_layers],
        embedding_ipu_id=settings.embedding_ipu_id,
        cls_ipu_id=settings.cls_ipu_id,
    )
    wrapped = WrappedDALLE(model, places, settings.embedding_serialization_factor)
    report = accepted(wrapped.half() if half else wrapped, (text, codes), training=True)
    assert report.operators["poptorch::recomputation_checkpoint"] == settings.num_hidden_layers
    axial = sum(isinstance(layer[0].fn.fn.attend, AxialAttention) for layer in model.transformer.layers)
    assert report.operators["_softmax"] == settings.num_hidden_layers + axial  # over text and over codes


@PRECISION
@pytest.mark.parametrize("dropout, sandwich_norm", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_trains(accepted, pattern, sandwich_norm, dropout, half):
    changes = dict(sandwich_norm=sandwich_norm, attn_dropout=dropout, ff_dropout=dropout)
    model = graphs.small_dalle(graphs.codes_only(8), attn_types=(pattern,), depth=2, **changes)
    step = graphs.annotated_loss(model.half() if half else model)
    report = accepted(step, (graphs.text(model), graphs.codes(model)), training=True)
    assert report.operators["dropout"] == (6 if dropout else 4)  # nn.Dropout is there whatever its share
    assert "tril" not in report.folded  # masks are made beforehand


@PRECISION
@pytest.mark.parametrize("patch_size, dtype", [(1, torch.uint8), (2, torch.float32)], ids=["bytes", "floats"])
@VQGANS
def test_pixels_train(poptorch, accepted, gumbel, patch_size, dtype, half):
    vae = graphs.vqgan(gumbel, patch_size)
    model = graphs.small_dalle(vae)
    inputs = graphs.text(model), graphs.pixels(vae, dtype)
    wrapped = WrappedDALLE(model, placement(4, layers_per_ipu=[1, 3], pixels=True), 8)
    report = accepted(wrapped.half() if half else wrapped, inputs, training=True)
    assert report.operators["argmax" if gumbel else "argmin"] == 1
    assert report.operators["convolution"] > 10


@PRECISION
@VQGANS
def test_a_vqgan_decodes(accepted, gumbel, half):
    vae = graphs.vqgan(gumbel, 2)
    vae = vae.half() if half else vae
    accepted(graphs.decoder(vae), (torch.zeros(2, vae.image_seq_len, dtype=torch.int32),))
    accepted(vae, (graphs.pixels(vae),))


@PRECISION
def test_a_full_pass_gives_logits(accepted, half):
    model = graphs.small_dalle(graphs.codes_only(8)).eval()
    model = model.half() if half else model
    for count in (0, 10):
        inputs = graphs.text(model), graphs.codes(model, count) if count else None
        accepted(model, inputs)
    accepted(graphs.image_logits(model), (graphs.text(model), graphs.codes(model, 10)))
    accepted(FullPass(model), (*sampling_inputs(model), torch.tensor([10])))


def sampling_inputs(model):
    noise = torch.zeros(graphs.BATCH, model.image_seq_len, model.num_image_tokens)
    settings = settings_row(Sampling(0.5, 0.9, 0.7, 1.5), 10, model).expand(graphs.BATCH, -1)
    return graphs.text(model), noise, graphs.codes(model), settings


@PRECISION
def test_an_image_is_sampled_in_one_call(poptorch, accepted, half):
    model = graphs.small_dalle(graphs.codes_only(8)).eval()
    model = model.half() if half else model
    report = accepted(StaticSampler(model, poptorch.for_loop, poptorch.dynamic_update), sampling_inputs(model))
    assert report.operators["poptorch::dynamic_update"] == 2 * 4 + 1
    assert report.operators["argmax"] == report.operators["sort"] == 2  # before the loop and in it


def test_what_no_ipu_can_do_is_noticed():
    model = graphs.small_dalle(graphs.codes_only(2)).eval()
    assert set(check(StaticSampler(model), sampling_inputs(model)).refused) == {"index_copy"}
    assert set(check(graphs.plain_losses(model), (graphs.text(model), graphs.codes(model)), training=True).refused) == {
        "loss"
    }


@PRECISION
@pytest.mark.parametrize("pattern", PATTERNS)
def test_losses_are_computed_row_by_row(pattern, half):
    model = graphs.small_dalle(graphs.codes_only(8), attn_types=(pattern,), depth=2)
    module = DeviceLosses(model.half() if half else model).eval()
    report = check(module, (torch.cat((graphs.text(model), graphs.codes(model)), dim=1)[:1],))
    assert report.refused == {} and report.losses == ["nll_loss_forward"] * 2  # nothing is trained by them
