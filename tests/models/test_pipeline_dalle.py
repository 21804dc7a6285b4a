"""The IPU's annotations: where modules go, what stays as it was (results, names in files), what is refused."""

import copy

import pytest
import torch
from torch import nn

from models import pipeline_dalle
from models.pipeline_dalle import SerializedEmbedding, WrappedDALLE, check_serialization, placement, stages
from models.transformer import attend, pattern_mask
from tests.builders import one_line, small_dalle

dalle = pytest.fixture(lambda tiny_vae: small_dalle(tiny_vae, depth=4, attn_types=("full", "axial_row")))


def some_batch(pixels=False):
    text = torch.randint(1, 58, (2, 6), generator=torch.Generator().manual_seed(1))
    text[1, 3:] = 0
    shape = (2, 3, 32, 32) if pixels else (2, 16)
    return text, torch.rand(shape) if pixels else torch.randint(0, 32, shape)


def test_stages_follow_the_order_of_a_step():
    places = placement(3, layers_per_ipu=[1, 0, 2], embedding_ipu_id=1, cls_ipu_id=0, pixels=True)
    assert stages(places) == [
        (0, ["vae"]),
        (1, ["text_emb", "image_emb"]),
        (0, ["transformer.layers.0"]),
        (2, ["transformer.layers.1", "transformer.layers.2"]),
        (0, ["to_logits"]),
    ]
    assert len(stages(placement(4, layers_per_ipu=[4]))) == 1
    assert placement(4, layers_per_ipu=[2, 2])[-1] == ("to_logits", 1)  # the last where nothing is said
    assert "vae" not in dict(placement(4, layers_per_ipu=[4]))  # codes never enter it
    places = dict(placement(16, layers_per_ipu=[0, 6, 6, 4], embedding_ipu_id=0, cls_ipu_id=3, pixels=True))  # L16
    assert places["vae"] == places["text_emb"] == places["image_emb"] == 0 and places["to_logits"] == 3
    assert [places[f"transformer.layers.{layer}"] for layer in range(16)] == [1] * 6 + [2] * 6 + [3] * 4


@pytest.mark.parametrize("pixels", [False, True], ids=["codes", "pixels"])
@pytest.mark.parametrize("serialization", [1, 4])
def test_results_and_names_stay(poptorch_standin, dalle, serialization, pixels):
    plain, batch = copy.deepcopy(dalle), some_batch(pixels)
    places = placement(4, layers_per_ipu=[1, 3], pixels=pixels)
    wrapped = WrappedDALLE(dalle, places, serialization)
    expected = plain(*batch, return_loss=True)
    found = wrapped(*batch)
    assert type(found) is tuple  # PopTorch takes a NamedTuple apart and cannot put it together again
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found[0].backward()
    expected.total.backward()
    gradient = torch.cat([piece.grad for piece in dalle.text_emb.parameters()])
    torch.testing.assert_close(gradient, plain.text_emb.weight.grad, atol=1e-7, rtol=1e-5)

    state = wrapped.state_dict()
    named = {f"model.{name}": tensor for name, tensor in plain.state_dict().items()}
    assert list(state) == list(named)
    torch.testing.assert_close(dict(state), named, rtol=0, atol=0)
    torch.manual_seed(1)
    other = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    wrapped.load_state_dict(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in wrapped.state_dict().items())


def test_every_annotated_module_is_entered_on_its_ipu(poptorch_standin, dalle):
    places = placement(4, layers_per_ipu=[0, 3, 1], embedding_ipu_id=0, cls_ipu_id=0, pixels=True)
    options = poptorch_standin.Options()
    options.setExecutionStrategy(poptorch_standin.PipelinedExecution(poptorch_standin.AutoStage.AutoIncrement))
    options.deviceIterations(4).autoRoundNumIPUs(True)
    wrapped = WrappedDALLE(dalle, places, serialization=4).eval()
    executor = poptorch_standin.inferenceModel(wrapped, options)
    executor.compile(*(part.repeat(4, *[1] * (part.dim() - 1)) for part in some_batch(pixels=True)))
    trace = executor.trace
    for module, ipu in places:
        parts = [name for name in trace.ipu_of if f"{name}.".startswith(f"model.{module}.")]
        assert parts and {trace.ipu_of[name] for name in parts} == {ipu}, module
    assert {len(ipus) for ipus in trace.parameter_ipus.values()} == {1}  # a weight lies on one IPU
    assert len(trace.parameter_ipus) == len(list(wrapped.parameters()))
    assert list(trace.stages) == ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert len(trace.checkpoints) == 4  # a layer's output each
    products = [(mode, factor, right[1]) for mode, factor, (_, right) in trace.serialized]
    assert [(factor, columns) for _, factor, columns in products] == [(4, 64), (4, 32)]  # text and image vocabulary
    assert {getattr(mode, "name", mode) for mode, _, _ in products} == {"OutputChannels"}


def test_a_serialized_embedding_is_an_embedding():
    plain = nn.Embedding(12, 5)
    pieces = SerializedEmbedding(plain.weight, 3)
    ids = torch.tensor([[0, 3, 4, 7], [8, 11, 0, 5]])
    assert torch.equal(pieces(ids), plain(ids))
    assert list(pieces.state_dict()) == ["weight"] and torch.equal(pieces.state_dict()["weight"], plain.weight)
    variables = pieces.state_dict(keep_vars=True)  # the parameters themselves, which PopTorch moves
    assert [id(variable) for variable in variables.values()] == [id(piece) for piece in pieces.parameters()]
    assert pieces.load_state_dict({}, strict=False).missing_keys
    with pytest.raises(RuntimeError):
        pieces.load_state_dict({"weight": torch.zeros(8, 5)})


def test_numbers_that_do_not_fit_are_refused(dalle):
    with pytest.raises(ValueError, match=r"--layers-per-ipu 1,2 adds up to 3 layers, the model has 4"):
        placement(4, layers_per_ipu=[1, 2])
    check_serialization(dalle, 16)
    with one_line("--embedding-serialization-factor 6 does not divide the 64 text tokens.*4 does"):
        check_serialization(dalle, 6)
    with pytest.raises(ValueError, match="the 32 image tokens"):
        check_serialization(dalle, 64)


@pytest.mark.parametrize("text_len, side", [(7, 4), (3, 8), (81, 16)])
@pytest.mark.parametrize("columns", [False, True], ids=["axial_row", "axial_col"])
def test_axial_attention_is_the_dense_one(columns, text_len, side):
    mask = pattern_mask("axial_col" if columns else "axial_row", text_len, side)
    sparse = pipeline_dalle.axial_attention(mask, text_len, side)
    assert sparse.columns == columns
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, len(mask), 8, generator=random, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 3, len(mask), 8, generator=random)
    found, expected = sparse(*inputs, mask), attend(*inputs, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
