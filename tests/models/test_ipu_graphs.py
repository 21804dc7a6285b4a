"""Graphs that an IPU compiles, on the stand-in for PopTorch: all operators have a handler there."""

import pytest
import torch

from backends.ipu.inference import DeviceLosses, VqganDecoder
from models.pipeline_dalle import WrappedDALLE, placement, unshare_masks
from models.sampling import Sampling
from models.static_sampling import FullPass, StaticSampler, settings_row
from models.transformer import PATTERNS
from models.vae import VQGanVAE
from tests.builders import small_dalle

PRECISION = pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])


def vqgan(gumbel):
    """Build a VQGAN of three levels with attention in one: 64 x 64 pixels in 8 x 8 codes of 64."""
    ddconfig = {"double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 12, "out_ch": 12}
    ddconfig.update(ch=32, ch_mult=[1, 1, 2], num_res_blocks=1, attn_resolutions=[8], dropout=0.0)
    torch.manual_seed(0)
    return VQGanVAE({"ddconfig": ddconfig, "embed_dim": 16, "n_embed": 64, "patch_size": 2}, gumbel)


def train(poptorch, model, serialization, *inputs):
    depth = len(model.transformer.layers)
    places = placement(depth, layers_per_ipu=[depth], pixels=inputs[-1].dim() == 4)
    wrapped = WrappedDALLE(model, places, serialization)
    optimizer = poptorch.optim.Adam([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-3)
    poptorch.trainingModel(wrapped, optimizer=optimizer).compile(*inputs)


def text_of(model, rows=1):
    return torch.zeros(rows, model.text_seq_len, dtype=torch.long)


@PRECISION
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_trains_and_is_evaluated(poptorch_standin, tiny_vae, pattern, half):
    model = small_dalle(tiny_vae, attn_types=(pattern,), sandwich_norm=True, attn_dropout=0.1, ff_dropout=0.1)
    model = model.half() if half else model
    row = torch.zeros(1, 6 + 16, dtype=torch.long)
    unshare_masks(model)
    poptorch_standin.inferenceModel(DeviceLosses(model).eval()).compile(row)
    train(poptorch_standin, model.train(), 1, text_of(model), row[:, 6:])


@PRECISION
@pytest.mark.parametrize("gumbel", [False, True], ids=["VQModel", "GumbelVQ"])
def test_pixels_train_and_codes_are_decoded(poptorch_standin, gumbel, half):
    vae = vqgan(gumbel)
    bytes_of_images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    poptorch_standin.inferenceModel(VqganDecoder(vae)).compile(torch.zeros(1, 64, dtype=torch.int32))
    poptorch_standin.inferenceModel(vae).compile(bytes_of_images.float())
    model = small_dalle(vae)
    train(poptorch_standin, model.half() if half else model, 2, text_of(model), bytes_of_images)


@PRECISION
def test_images_are_sampled(poptorch_standin, tiny_vae, half):
    model = small_dalle(tiny_vae, depth=4, attn_types=PATTERNS[:4]).eval()
    model = model.half() if half else model
    settings = settings_row(Sampling(0.5, 0.9, 0.7, 1.5), 10, model).expand(2, -1)
    inputs = text_of(model, 2), torch.zeros(2, 16, 32), torch.zeros(2, 16, dtype=torch.long), settings
    sampler = StaticSampler(model, poptorch_standin.for_loop, poptorch_standin.dynamic_update)
    poptorch_standin.inferenceModel(sampler).compile(*inputs)
    poptorch_standin.inferenceModel(FullPass(model)).compile(*inputs, torch.tensor([10]))
