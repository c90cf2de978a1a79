"""Edits that need no model; every table shows what they score."""

from __future__ import annotations

import numpy as np

from dragdiff.data.sample import EditSample

PATCH = 0.05  # half side of the pasted patch, as a share of the picture's shorter side


def identity(sample: EditSample) -> np.ndarray:
    """No edit at all, (H, W, 3) uint8."""
    return np.array(sample.image)


def copy_patch(sample: EditSample) -> np.ndarray:
    """The patch around each handle pasted at its target, in the pairs' order, (H, W, 3) uint8.

    Where patch or place leave the picture both are cut. Every patch is taken from the source.
    """
    edited = np.array(sample.image)
    radius = max(1, round(PATCH * min(sample.height, sample.width)))
    for (from_x, from_y), (to_x, to_y) in sample.points.astype(int):
        up, left = (min(radius, a, b) for a, b in ((from_y, to_y), (from_x, to_x)))
        down = min(radius, sample.height - 1 - max(from_y, to_y))
        right = min(radius, sample.width - 1 - max(from_x, to_x))
        patch = sample.image[from_y - up : from_y + down + 1, from_x - left : from_x + right + 1]
        edited[to_y - up : to_y + down + 1, to_x - left : to_x + right + 1] = patch
    return edited
