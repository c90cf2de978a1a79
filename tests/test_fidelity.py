"""Scores that need networks: what goes into them, and what is said where they are missing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.image.lpip
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from dragdiff.errors import UserError
from dragdiff.metrics import fidelity
from dragdiff.modules.images import to_tensor

RNG = np.random.default_rng(0)
SOURCE, EDITED = RNG.integers(0, 255, (2, 48, 72, 3)).astype(np.uint8)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


@pytest.fixture
def torchvision(monkeypatch):
    """Stands for the package, of which only the weights behind LPIPS are used."""
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())


def test_image_fidelity_is_of_pictures_of_224_px_between_minus_1_and_1(torchvision, monkeypatch):
    seen = []

    class Lpips:
        def __init__(self, net_type):
            assert net_type == "alex"

        def eval(self):
            return self

        def reset(self):
            seen.clear()

        def __call__(self, *pictures):
            seen.extend(pictures)
            return torch.tensor(0.25)

    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", Lpips)
    score = fidelity.image_fidelity()
    assert [score(SOURCE, EDITED) for _ in range(2)] == [0.75, 0.75]
    for actual, image in zip(seen, (SOURCE, EDITED), strict=True):
        assert torch.equal(actual, F.interpolate(to_tensor(image), (224, 224), mode="bilinear"))
        assert actual.shape == (1, 3, 224, 224) and -1 <= actual.min() < -0.5 < 0.5 < actual.max() <= 1


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"pip install 'dragdiff\[metrics\]'"):
        fidelity.image_fidelity()


def test_without_alexnets_weights(torchvision, monkeypatch):
    def fail(net_type):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", fail)
    with pytest.raises(UserError, match=r"AlexNet.*no network.*once with network"):
        fidelity.image_fidelity()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=8,
        )
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


def test_clip_similarity_is_the_cosine_of_the_embeddings(clip):
    score = fidelity.clip_similarity(str(clip), "")
    square = SOURCE[:32, :32], EDITED[:32, :32]  # nothing to resize or to crop
    network = CLIPVisionModelWithProjection.from_pretrained(clip)
    vectors = []
    for picture in square:
        values = (picture / 255 - MEAN) / STD
        with torch.no_grad():
            vectors.append(network(torch.tensor(values).permute(2, 0, 1)[None].float()).image_embeds[0].numpy())
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    assert score(*square) == pytest.approx(cosine, abs=1e-5)
    assert score(SOURCE, SOURCE) == pytest.approx(1)
    assert score(SOURCE, EDITED) < 1


def test_a_clip_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="hf download") as caught:
        fidelity.clip_similarity(str(tmp_path / "none"), "")
    assert "\n" not in str(caught.value)
