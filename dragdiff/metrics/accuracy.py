"""Dragging accuracy without a model: is what was at the handle now at the target, pixel by pixel?"""

from __future__ import annotations

import numpy as np

from dragdiff.data.sample import EditSample

RADII = (1, 5, 10, 20)  # gamma of GoodDrag's tables, px

Window = tuple[slice, slice]


def paired_windows(pair: np.ndarray, size: tuple[int, int], radius: int) -> tuple[Window, Window]:
    """The squares of half side `radius` around a handle and its target, both cut where either leaves the picture.

    Args:
        pair: (2, 2), handle and target as (x, y) in px, cut to whole ones.
        size: (height, width) in px.
    """
    (from_x, from_y), (to_x, to_y) = np.asarray(pair).astype(int).tolist()
    up, left = min(radius, from_y, to_y), min(radius, from_x, to_x)
    down = min(radius, size[0] - 1 - max(from_y, to_y))
    right = min(radius, size[1] - 1 - max(from_x, to_x))
    around = [
        (slice(y - up, y + down + 1), slice(x - left, x + right + 1)) for x, y in ((from_x, from_y), (to_x, to_y))
    ]
    return around[0], around[1]


def patch_differences(source: np.ndarray, edited: np.ndarray, *, pairs: np.ndarray, radius: int) -> np.ndarray:
    """How much the edited picture around each target differs from the source around the handle.

    Args:
        source: (H, W, 3), values in [0, 1].
        edited: likewise.
        pairs: (N, 2, 2), handles and targets as (x, y) in px, inside the picture.
        radius: gamma, half side of the patch in px.

    Returns:
        (N,): squared difference summed over channels, mean over the positions that both patches have.
    """
    values = []
    for pair in pairs:
        here, there = paired_windows(pair, source.shape[:2], radius)
        difference = source[here].astype(np.float64) - edited[there]
        values.append(np.square(difference).sum(axis=2).mean())
    return np.array(values)


def dragging_accuracy(sample: EditSample, edited: np.ndarray, radius: int) -> np.ndarray:
    """GoodDrag's dragging accuracy index for each pair (2404.07206, section 4.2); lower is better.

    Args:
        edited: (H, W, 3) uint8, of the sample's size.
        radius: gamma, px.

    Returns:
        (N,): as `patch_differences`, of values in [0, 1].
    """
    return patch_differences(sample.image / 255, edited / 255, pairs=sample.points, radius=radius)
