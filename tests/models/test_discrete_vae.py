"""OpenAI's dVAE against OpenAI's own package, from files with whole modules as OpenAI publishes them."""

import importlib.util
import os

import pytest
import torch

from models.discrete_vae import OpenAIDiscreteVAE
from models.vae import ImageTokenizer, build_tokenizer
from models.vqgan_files import load_vqgan
from tests.builders import PickledCall

TOUCH = "touch it_ran"


@pytest.fixture(scope="module")
def halves():
    """A small encoder and decoder of OpenAI's package, with random weights."""
    if importlib.util.find_spec("dall_e") is None:
        pytest.skip("OpenAI's DALL-E package is not installed")
    from dall_e import Decoder, Encoder

    torch.manual_seed(0)
    encoder = Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    return encoder, Decoder(n_init=16, n_hid=64, n_blk_per_group=1, vocab_size=512)


def save(folder, halves, zipped=True):
    for name, half in zip(("encoder.pkl", "decoder.pkl"), halves):
        torch.save(half, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_codes_and_pixels_are_openais(halves, tmp_path, zipped):
    vae = load_vqgan(str(save(tmp_path, halves, zipped)))
    assert isinstance(vae, OpenAIDiscreteVAE) and (vae.image_size, vae.fmap_size, vae.num_tokens) == (256, 32, 512)
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        expected = halves[0](0.8 * images + 0.1).argmax(1).flatten(1)
        assert torch.equal(vae(images), expected) and len(expected.unique()) > 5
        one_hot = torch.nn.functional.one_hot(expected.view(1, 32, 32), 512).permute(0, 3, 1, 2).float()
        pixels = ((halves[1](one_hot)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(vae.decode(expected), pixels, atol=1e-5, rtol=0)
    again: ImageTokenizer = build_tokenizer(vae.hparams)
    again.load_state_dict(vae.state_dict())
    assert again.fingerprint() == vae.fingerprint()


def test_a_module_that_is_something_else_is_refused_and_not_run(halves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other, message in (
        (PickledCall(os.system, TOUCH), "encoder.pkl: .*it is not a module"),
        (torch.nn.Linear(1, 1), "no enc.blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vqgan(str(save(tmp_path, (other, halves[1]))))
    assert not (tmp_path / "it_ran").exists()


def test_the_real_sizes_are_the_defaults():
    with torch.device("meta"):
        vae = OpenAIDiscreteVAE({})
    assert sum(parameter.numel() for parameter in vae.parameters()) == 97_616_006  # of OpenAI's package
    with pytest.raises(ValueError, match="'Thing' with its params is no image tokenizer"):
        build_tokenizer({"target": "Thing", "params": {}})
