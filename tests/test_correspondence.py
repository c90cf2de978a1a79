"""Mean distance by diffusion features, against plain computations of the same thing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dragdiff import EditSample
from dragdiff.errors import UserError
from dragdiff.metrics import correspondence
from dragdiff.metrics.correspondence import MeanDistance
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.images import to_tensor

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 255, (48, 72, 3)).astype(np.uint8)
MASK = np.zeros((48, 72), np.uint8)
MASK[8:40, 16:60] = 1
SAMPLE = EditSample(PICTURE, "a cat", [[[10, 20], [30, 24]], [[64, 40], [64, 40]], [[20, 9], [50, 33]]], MASK, "one")


@pytest.fixture(scope="module")
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 24, 12, 18, generator=generator) for _ in range(2))


def naive(source, edited, sample, allowed) -> list[tuple[int, int]]:
    """Both maps whole at the picture's size, one cosine similarity after the other."""
    large = [F.interpolate(features, (sample.height, sample.width), mode="bilinear") for features in (source, edited)]
    found = []
    for (x, y), mask in zip(sample.handles.astype(int), allowed, strict=True):
        similarity = F.cosine_similarity(large[0][:, :, y, x][:, :, None, None], large[1], dim=1)[0].numpy()
        similarity[~mask] = -2
        row, col = np.unravel_index(similarity.argmax(), similarity.shape)
        found.append((col, row))
    return found


@pytest.mark.parametrize("variant", ["image", "mask", "discs"])
@pytest.mark.parametrize("tile", [100, 1000, 10**6])
def test_matches_are_those_of_whole_maps(maps, variant, tile, monkeypatch):
    monkeypatch.setattr(correspondence, "TILE", tile)
    allowed = correspondence.search_areas(SAMPLE, variant)
    grids = [FeatureMap([features], (48, 72)) for features in maps]
    found = correspondence.matches(*grids, SAMPLE.handles, allowed)
    np.testing.assert_array_equal(found, naive(*maps, SAMPLE, allowed))
    assert all(mask[y, x] for mask, (x, y) in zip(allowed, found, strict=True))


def test_what_has_not_changed_is_found_where_it_was(maps):
    grid = FeatureMap([maps[0]], (48, 72))
    found = correspondence.matches(grid, grid, SAMPLE.handles, correspondence.search_areas(SAMPLE, "image"))
    np.testing.assert_array_equal(found, SAMPLE.handles)
    drags = np.linalg.norm(SAMPLE.handles - SAMPLE.targets, axis=1)
    np.testing.assert_allclose(correspondence.distances(SAMPLE, found, "image"), drags)


def test_the_first_of_equal_positions_counts():
    flat = FeatureMap([torch.ones(1, 3, 12, 18)], (48, 72))
    found = correspondence.matches(flat, flat, SAMPLE.handles, correspondence.search_areas(SAMPLE, "mask"))
    np.testing.assert_array_equal(found, [[16, 8]] * 3)


def test_search_areas():
    assert all(area.all() for area in correspondence.search_areas(SAMPLE, "image"))
    np.testing.assert_array_equal(correspondence.search_areas(SAMPLE, "mask")[1], MASK > 0)
    without = EditSample(PICTURE, "", SAMPLE.points, None)
    assert all(area.all() for area in correspondence.search_areas(without, "mask"))
    far, anchor, _ = correspondence.search_areas(SAMPLE, "discs")
    inside = [
        (x, y)
        for y in range(48)
        for x in range(72)
        if min((x - 10) ** 2 + (y - 20) ** 2, (x - 30) ** 2 + (y - 24) ** 2) <= (20**2 + 4**2) / 2
    ]
    assert [(x, y) for y, x in np.argwhere(far)] == inside
    assert anchor.sum() == 81 and anchor[40, 69] and not anchor[40, 70]  # radius 5
    with pytest.raises(ValueError, match="discs"):
        correspondence.search_areas(SAMPLE, "disks")


def test_distances():
    found = np.array([[33, 28], [64, 40], [50, 33]])
    np.testing.assert_allclose(correspondence.distances(SAMPLE, found, "mask"), [5, 0, 0])
    shares = [np.hypot(3 / 72, 4 / 48) * 100, 0, 0]
    np.testing.assert_allclose(correspondence.distances(SAMPLE, found, "discs"), shares, rtol=1e-6)


def test_features_are_the_means_of_noised_forwards(backbone):
    def features(block, ensemble=3):
        return correspondence.diffusion_features(
            backbone,
            PICTURE,
            "a cat",
            t=261,
            block=block,
            ensemble=ensemble,
            generator=torch.Generator().manual_seed(5),
        )

    actual = features("up_blocks.1")
    assert actual.grid == (48, 72)
    unet, kept = backbone.pipeline.unet, []
    hook = unet.up_blocks[1].register_forward_hook(lambda *args: kept.append(args[2]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        posterior = backbone.pipeline.vae.encode(to_tensor(PICTURE)).latent_dist
        draws, noise = (torch.randn(3, 4, 6, 9, generator=generator) for _ in range(2))
        scale = backbone.pipeline.vae.config.scaling_factor
        for draw, one in zip(draws, noise, strict=True):
            latent = (posterior.mean + posterior.std * draw) * scale
            noisy = backbone.pipeline.scheduler.add_noise(latent, one[None], torch.tensor([261]))
            unet(noisy, torch.tensor(261), **backbone.condition(["a cat"]))
    hook.remove()
    torch.testing.assert_close(actual.maps[0], torch.stack(kept).mean(dim=0), rtol=0, atol=1e-4)


def test_a_samples_seed_is_its_own():
    seed = correspondence.sample_seed(42, SAMPLE)
    assert 0 <= seed < 2**63
    renamed = EditSample(PICTURE, "a cat", SAMPLE.points, MASK, "two")
    assert correspondence.sample_seed(42, renamed) == seed
    others = [
        EditSample(255 - PICTURE, "a cat", SAMPLE.points, MASK),
        EditSample(PICTURE, "a dog", SAMPLE.points, MASK),
        EditSample(PICTURE, "a cat", SAMPLE.points[:1], MASK),
    ]
    assert (
        len({seed, correspondence.sample_seed(43, SAMPLE), *(correspondence.sample_seed(42, s) for s in others)}) == 5
    )


SETTINGS = {"t": 261, "block": "up_blocks.1", "ensemble": 2, "variant": "image", "seed": 42, "ordered": False}
OTHER = EditSample(np.roll(PICTURE, 9, axis=1), "a dog", [[[30, 20], [12, 24]]], None, "two")


@pytest.mark.parametrize("ordered", [False, True])
def test_order_matters_only_where_asked_for(backbone, ordered):
    def run(*samples) -> tuple[float, dict]:
        metric = MeanDistance(backbone, **SETTINGS | {"ordered": ordered})
        seen = {}
        for sample in samples:
            maps = spied(metric, sample)
            seen[sample.name] = maps
        return float(metric.compute()), seen

    def spied(metric, sample):
        features, original = [], correspondence.diffusion_features
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                correspondence,
                "diffusion_features",
                lambda *args, **kwargs: features.append(original(*args, **kwargs)) or features[-1],
            )
            metric.update(sample, 255 - sample.image)
        return [grid.maps[0] for grid in features]

    (value, maps), (again, turned) = run(SAMPLE, OTHER), run(OTHER, SAMPLE)
    same = all(torch.equal(a, b) for name in maps for a, b in zip(maps[name], turned[name], strict=True))
    assert same is not ordered
    if not ordered:
        assert value == pytest.approx(again, rel=1e-12)


def test_no_edit_scores_the_length_of_the_drags(backbone):
    metric = MeanDistance(backbone, **SETTINGS)
    for sample in (SAMPLE, OTHER):
        metric.update(sample, np.asarray(sample.image))
    lengths = np.concatenate([np.linalg.norm(s.handles - s.targets, axis=1) for s in (SAMPLE, OTHER)])
    assert float(metric.compute()) == pytest.approx(lengths.mean())


def test_a_block_that_the_model_lacks(backbone):
    with pytest.raises(UserError, match=r"up_blocks\.3"):
        MeanDistance(backbone, **SETTINGS | {"block": "up_blocks.7"})
