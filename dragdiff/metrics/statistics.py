"""Means with intervals: the image is the unit that is drawn again, also where the mean is over its pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of every interval
RESAMPLES = 9999


@dataclass(frozen=True)
class Mean:
    """A mean and its bootstrap interval; NaN ends where there are fewer than two images, or infinite values."""

    value: float
    low: float
    high: float
    images: int
    pairs: int


def mean_over_images(values: Sequence[np.ndarray]) -> Mean:
    """Mean of the images' means.

    Args:
        values: of each image those of its pairs, (pairs,), or one for the whole image, (1,).
    """
    means = np.array([np.mean(pairs) for pairs in values])
    return _mean(means, np.ones(len(means)), sum(len(pairs) for pairs in values))


def mean_over_pairs(values: Sequence[np.ndarray]) -> Mean:
    """Mean over all pairs of all images. The images are resampled: the pairs of one are not independent.

    Args:
        values: as in `mean_over_images`.
    """
    counts = np.array([len(pairs) for pairs in values])
    return _mean(np.array([np.sum(pairs) for pairs in values]), counts, int(counts.sum()))


def paired_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Mean:
    """Mean over images of ours - theirs, image by image.

    Args:
        ours, theirs: as in `mean_over_images`, of the same images in the same order.
    """
    with np.errstate(invalid="ignore"):  # of two infinite values
        differences = [np.atleast_1d(np.mean(a) - np.mean(b)) for a, b in zip(ours, theirs, strict=True)]
    return mean_over_images(differences)


def _mean(sums: np.ndarray, counts: np.ndarray, pairs: int) -> Mean:
    """sum(sums) / sum(counts), with the percentile interval of its bootstrap over images (scipy)."""
    from scipy.stats import bootstrap

    if len(sums) == 0:
        return Mean(np.nan, np.nan, np.nan, 0, 0)

    def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    low = high = np.nan
    if len(sums) > 1 and np.isfinite(sums).all():  # an unchanged picture has an infinite PSNR
        interval = bootstrap(
            (sums, counts),
            ratio,
            paired=True,
            vectorized=True,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Mean(float(sums.sum() / counts.sum()), low, high, len(sums), pairs)
