"""CLIP score and FID with random weights against the same computed otherwise."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from models import image_scores

NAME = "ViT-S-32-alt"  # the smallest
TEXTS = ["a red circle", "two blue stars above a heart", ""]


def importable(name):
    """A package that imports torchvision, also where PyPI's is beside a torch for CPUs and lacks two operators."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importable.library = library  # operators go with it
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        return pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


def test_clip_scores_are_cosines(pictures, caplog, tmp_path):
    open_clip, path = importable("open_clip"), tmp_path / "clip.pt"
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, load_weights=False).eval()
    torch.save(model.state_dict(), path)
    caplog.clear()
    drawn = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pictures[:3]]
    score = image_scores.clip_score(path, NAME, torch.device("cpu"))
    assert not caplog.records  # open_clip would warn of random weights
    pixels = np.stack([np.array(picture.resize((224, 224), Image.Resampling.BICUBIC)) for picture in drawn]) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        seen = model.encode_image(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
        said = model.encode_text(open_clip.tokenize(TEXTS))
    expected = 100 * torch.nn.functional.cosine_similarity(seen, said)
    found = score(drawn, TEXTS)
    assert found.shape == (3,) and torch.allclose(found, expected, atol=1e-3) and len(set(found.tolist())) == 3


@pytest.mark.slow
def test_fid_is_that_of_torchmetrics(pictures, tmp_path):
    importable("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            torch.manual_seed(0)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.kaiming_normal_(parameter)

    fid, path = pytest.importorskip("torchmetrics.image.fid"), tmp_path / "inception.pth"
    torch.save({}, tmp_path / "none.pth")
    torch.save(Untrained("untrained", ["2048"], str(tmp_path / "none.pth")).state_dict(), path)
    ours, same = (image_scores.InceptionDistance(path, torch.device("cpu")) for _ in range(2))
    theirs = fid.FrechetInceptionDistance(feature_extractor_weights_path=str(path), antialias=False)
    real, drawn = torch.from_numpy(pictures[:6]), torch.from_numpy(pictures[6:]) // 2
    for which, batch in (("real", real), ("generated", drawn[:4]), ("generated", drawn[4:])):
        ours.add(which, batch)
        same.add(which, real)
        theirs.update(batch, real=which == "real")
    assert ours.distance() == pytest.approx(float(theirs.compute()), rel=1e-3) and ours.distance() > 1
    assert abs(same.distance()) < 1e-2 * ours.distance()
