"""CLIP score and FID with random weights against the same computed otherwise, and what is said where a part is missing.

Skips without the packages of requirements-metrics.txt.
"""

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


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """(open_clip, a file of random weights, the model that has them)."""
    open_clip = importable("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, load_weights=False).eval()
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(model.state_dict(), path)
    return open_clip, path, model


def test_clip_scores_are_cosines(clip_file, pictures, caplog):
    open_clip, path, model = clip_file
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


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of random weights of FID's network."""
    importable("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            torch.manual_seed(0)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.kaiming_normal_(parameter)

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    torch.save(Untrained("untrained", ["2048"], str(folder / "none.pth")).state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.mark.slow
def test_fid_is_that_of_torchmetrics(inception_file, pictures):
    fid = pytest.importorskip("torchmetrics.image.fid")
    ours = image_scores.InceptionDistance(inception_file, torch.device("cpu"))
    theirs = fid.FrechetInceptionDistance(feature_extractor_weights_path=str(inception_file), antialias=False)
    same = image_scores.InceptionDistance(inception_file, torch.device("cpu"))
    real, drawn = torch.from_numpy(pictures[:6]), torch.from_numpy(pictures[6:]) // 2
    for which, batch in (("real", real), ("generated", drawn[:4]), ("generated", drawn[4:])):
        ours.add(which, batch)
        same.add(which, real)
        theirs.update(batch, real=which == "real")
    assert ours.distance() == pytest.approx(float(theirs.compute()), rel=1e-3) and ours.distance() > 1
    assert abs(same.distance()) < 1e-2 * ours.distance()
