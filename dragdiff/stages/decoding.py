"""From latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dragdiff.job import Job
from dragdiff.modules.images import to_uint8
from dragdiff.modules.points import Size


def decode(job: Job, latents: Tensor) -> list[np.ndarray]:
    """The picture (H, W, 3) uint8 of each edit, of its sample's size.

    Args:
        latents: clean, (E, C, h, w).
    """
    pictures: list[np.ndarray] = []
    with job.stage("decode", len(job.edits)) as advance:
        for edit, clean in zip(job.edits, latents.split(1), strict=True):
            pictures.append(to_picture(job, clean, edit.sample.image.shape[:2]))
            advance(len(pictures), "")
    return pictures


def to_picture(job: Job, latent: Tensor, size: Size | Sequence[int]) -> np.ndarray:
    """Decode one latent.

    Args:
        latent: clean, (1, C, h, w).
        size: (height, width) that the picture is to have, px.

    Returns:
        (H, W, 3) uint8.
    """
    with torch.no_grad():
        image = (job.model.decode(latent) / 2 + 0.5).clamp(0, 1)
    if tuple(image.shape[2:]) != tuple(size):
        image = F.interpolate(image, tuple(size), mode="bilinear")
    return to_uint8(image)
