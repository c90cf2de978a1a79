"""Edits that need no model; every table shows what they score."""

from __future__ import annotations

import numpy as np

from dragdiff.data.sample import EditSample
from dragdiff.metrics.accuracy import paired_windows

PATCH = 0.05  # half side of the pasted patch, as a share of the picture's shorter side


def identity(sample: EditSample) -> np.ndarray:
    """No edit at all.

    Returns:
        (H, W, 3) uint8, a copy.
    """
    return np.array(sample.image)


def copy_patch(sample: EditSample) -> np.ndarray:
    """The patch around each handle pasted at its target, in the pairs' order.

    Where patch or place leave the picture both are cut. Every patch is taken from the source.

    Returns:
        (H, W, 3) uint8.
    """
    edited = np.array(sample.image)
    radius = max(1, round(PATCH * min(sample.height, sample.width)))
    for pair in sample.points:
        here, there = paired_windows(pair, (sample.height, sample.width), radius)
        edited[there] = sample.image[here]
    return edited
