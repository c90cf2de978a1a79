"""Means and intervals against closed forms and a plain bootstrap; scores and edits that need no model."""

import re

import numpy as np
import pytest
from conftest import METHODS

from dragdiff import EditSample
from dragdiff.metrics import accuracy, baselines, statistics

GOODDRAG = np.load(METHODS / "gooddrag.npz")
RNG = np.random.default_rng(1)
VALUES = [RNG.exponential(10, RNG.integers(1, 5)) for _ in range(40)]


def test_means():
    over_pairs, over_images = statistics.mean_over_pairs(VALUES), statistics.mean_over_images(VALUES)
    assert over_pairs.value == pytest.approx(np.concatenate(VALUES).mean())
    assert over_images.value == pytest.approx(np.mean([pairs.mean() for pairs in VALUES]))
    assert over_pairs.value != pytest.approx(over_images.value)
    assert {(m.images, m.pairs) for m in (over_pairs, over_images)} == {(40, sum(map(len, VALUES)))}


def test_the_interval_is_that_of_images_drawn_again():
    rng = np.random.default_rng(7)
    means = []
    for _ in range(4000):
        drawn = [VALUES[i] for i in rng.integers(0, len(VALUES), len(VALUES))]
        means.append(np.concatenate(drawn).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    mean = statistics.mean_over_pairs(VALUES)
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=0.03 * (high - low) + 0.1)
    assert mean == statistics.mean_over_pairs(VALUES)  # the same each time


def test_the_interval_of_many_images_is_the_normal_one():
    values = [np.array([x]) for x in np.random.default_rng(2).normal(5, 3, 900)]
    mean = statistics.mean_over_images(values)
    half = 1.96 * np.std(np.concatenate(values)) / 30
    assert (mean.value - mean.low, mean.high - mean.value) == pytest.approx((half, half), rel=0.06)


def test_a_paired_difference_does_not_see_what_the_images_share():
    easy_and_hard = RNG.normal(50, 30, 60)
    ours = [np.array([level - 2 + RNG.normal(0, 0.5)]) for level in easy_and_hard]
    theirs = [np.array([level]) for level in easy_and_hard]
    difference = statistics.paired_difference(ours, theirs)
    assert -2.3 < difference.low < difference.value < difference.high < -1.7
    assert statistics.mean_over_images(ours).high - statistics.mean_over_images(ours).low > 10
    with pytest.raises(ValueError):
        statistics.paired_difference(ours, theirs[1:])


def test_too_few_images_for_an_interval():
    one, none = statistics.mean_over_pairs([np.array([1.0, 3.0])]), statistics.mean_over_images([])
    assert one.value == 2 and np.isnan(one.low) and np.isnan(one.high)
    assert np.isnan(none.value) and none.images == 0


def test_baselines():
    picture = RNG.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    sample = EditSample(picture, "", [[[10, 12], [30, 20]], [[0, 39], [59, 0]], [[5, 5], [5, 5]]])
    np.testing.assert_array_equal(baselines.identity(sample), picture)
    edited = baselines.copy_patch(sample)
    expected = picture.copy()
    expected[18:23, 28:33] = picture[10:15, 8:13]  # 5 % of 40 px to each side
    expected[0, 59] = picture[39, 0]  # from one corner to the opposite one a single px has place
    np.testing.assert_array_equal(edited, expected)
    np.testing.assert_array_equal(sample.image, picture)


def published_accuracy(source, edited, pairs, radius) -> float:
    """GoodDrag's formula, for pairs whose patches lie wholly inside."""
    total = 0.0
    for (x, y), (tx, ty) in pairs:
        for down in range(-radius, radius + 1):
            for across in range(-radius, radius + 1):
                here, there = source[y + down, x + across] / 255, edited[ty + down, tx + across] / 255
                total += ((here - there) ** 2).sum()
    return total / len(pairs) / (1 + 2 * radius) ** 2


def test_dragging_accuracy():
    source, edited = RNG.integers(0, 255, (2, 60, 80, 3)).astype(np.uint8)
    pairs = [[[25, 22], [50, 30]], [[30, 38], [22, 21]]]
    sample = EditSample(source, "", pairs)
    for radius in accuracy.RADII:
        ours = accuracy.dragging_accuracy(sample, edited, radius)
        assert ours.shape == (2,)
        assert ours.mean() == pytest.approx(published_accuracy(source, edited, pairs, radius))
    corner = EditSample(source, "", [[[0, 59], [79, 0]]])  # one px is common to both patches
    expected = np.square((source[59, 0].astype(float) - edited[0, 79]) / 255).sum()
    assert accuracy.dragging_accuracy(corner, edited, 5) == pytest.approx([expected])
    perfect = accuracy.dragging_accuracy(
        EditSample(source, "", pairs[:1]), baselines.copy_patch(EditSample(source, "", pairs[:1])), 1
    )
    assert perfect == [0]


RECORDED = [found.groups() for key in GOODDRAG if (found := re.fullmatch(r"dai:(\w+):g(\d+)", key))]


@pytest.mark.parametrize(("case", "radius"), RECORDED, ids=[f"gooddrag:dai:{case}:g{g}" for case, g in RECORDED])
def test_recorded_accuracy_index_of_gooddrag(case, radius):
    """Its script divides the sum over the pairs by their number twice."""
    pairs, published = GOODDRAG[f"dai:{case}:points_xy"], GOODDRAG[f"dai:{case}:g{radius}"]
    values = accuracy.patch_differences(GOODDRAG["dai:source"], GOODDRAG["dai:result"], pairs=pairs, radius=int(radius))
    assert values.sum() / len(pairs) ** 2 == pytest.approx(float(published), rel=2e-5)
