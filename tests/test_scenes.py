"""Procedural scenes: seeded, with exact truth, and measured by re-rendering alone."""

from __future__ import annotations

import numpy as np
import pytest
from torchmetrics.functional.image import peak_signal_noise_ratio

from dragdiff.data.scenes import KINDS, RENDERERS, caption, make_scene, moved, render, sample_parameters
from dragdiff.metrics.truth import measured_displacement, psnr, score, ssim

ALL = [(kind, seed) for kind in KINDS for seed in (0, 1, 2)]


@pytest.mark.parametrize(("kind", "seed"), ALL)
def test_the_same_seed_gives_the_same_scene_and_another_seed_another(kind: str, seed: int) -> None:
    first, again, other = make_scene(kind, seed), make_scene(kind, seed), make_scene(kind, seed + 100)
    assert np.array_equal(first.sample.image, again.sample.image)
    assert np.array_equal(first.sample.points, again.sample.points)
    assert not np.array_equal(first.sample.image, other.sample.image)


@pytest.mark.parametrize(("kind", "seed"), ALL)
def test_only_the_mask_changes_and_the_points_carry_the_displacement(kind: str, seed: int) -> None:
    scene = make_scene(kind, seed)
    changed = (scene.sample.image != scene.truth).any(axis=2)
    assert changed.sum() > 50
    halo = 0.03 if kind == "sun" else 0.0  # a sun's glow fades out beyond the mask's margin
    assert (changed & ~np.array(scene.sample.mask)).mean() <= halo
    assert np.allclose(scene.sample.targets - scene.sample.handles, scene.displacement, atol=1e-4)
    low, high = KINDS[kind].length
    assert low <= np.linalg.norm(scene.displacement) <= high


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_under_the_handle_is_under_the_target_afterwards(kind: str) -> None:
    """Points and pictures agree: the colour at the handle in the source is the colour at the target in the truth."""
    for seed in range(10):
        scene = make_scene(kind, seed)
        (x0, y0), (x1, y1) = scene.sample.points[0]
        before = scene.sample.image[int(y0), int(x0)].astype(int)
        after = scene.truth[int(y1), int(x1)].astype(int)
        assert np.abs(before - after).max() < 60, (kind, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_scale(kind: str) -> None:
    small, large = make_scene(kind, 3), make_scene(kind, 3, size=128)
    assert large.sample.image.shape == (128, 128, 3)
    assert np.allclose(large.sample.points, 2 * small.sample.points, atol=1e-3)
    averaged = large.truth.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small.truth).mean() < 4


@pytest.mark.parametrize("family", RENDERERS)
def test_rendering_many_scenes_at_once_equals_one_by_one(family: str) -> None:
    parameters = sample_parameters(family, np.random.default_rng(0), 5)
    together = render(family, parameters)
    for index in range(5):
        alone = render(family, {name: values[index : index + 1] for name, values in parameters.items()})
        assert np.array_equal(together[index], alone[0])
        assert caption(family, parameters, index).startswith("a")


@pytest.mark.parametrize(("kind", "seed"), ALL)
def test_the_measurement_finds_the_true_edit_and_no_edit(kind: str, seed: int) -> None:
    scene = make_scene(kind, seed)
    done, nothing = score(scene, scene.truth), score(scene, scene.sample.image)
    assert done.distance_after < 0.25  # the search's step
    assert nothing.distance_after == pytest.approx(nothing.distance_before, abs=0.25)
    assert done.psnr_inside == float("inf")
    assert done.ssim_inside > 0.999 > nothing.ssim_inside


@pytest.mark.parametrize("kind", KINDS)
def test_the_measurement_finds_half_an_edit_under_noise(kind: str) -> None:
    scene = make_scene(kind, 5)
    half = render(KINDS[kind].family, moved(kind, scene.parameters, scene.displacement / 2))[0]
    noise = np.random.default_rng(0).normal(0, 12, half.shape)
    found = measured_displacement(scene, np.clip(half + noise, 0, 255).astype(np.uint8))
    assert found is not None
    assert np.linalg.norm(found - scene.displacement / 2) < 0.4


def test_psnr_and_ssim_against_torchmetrics_and_their_definition() -> None:
    import torch

    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(2))
    everywhere = np.ones((40, 40), bool)
    as_tensors = [torch.from_numpy(x.astype(np.float32)) for x in (first, second)]
    expected = peak_signal_noise_ratio(*as_tensors, data_range=255.0)
    assert psnr(first, second, everywhere) == pytest.approx(float(expected), abs=1e-4)
    half = np.zeros((40, 40), bool)
    half[:20] = True
    assert psnr(first, second, half) == pytest.approx(psnr(first[:20], second[:20], everywhere[:20]))
    assert ssim(first, first, half) == pytest.approx(1.0)
    patched = second.copy()
    patched[:20] = first[:20]
    assert ssim(first, patched, half) > ssim(first, patched, ~half)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_gone_counts_as_not_moved(kind: str) -> None:
    scene = make_scene(kind, 4)
    without = render(KINDS[kind].family, moved(kind, scene.parameters, np.array([1000.0, 1000.0])))[0]
    result = score(scene, without)
    assert result.displacement is None
    assert result.distance_after == result.distance_before
