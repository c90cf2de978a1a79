"""From latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dragdiff.errors import UserError
from dragdiff.job import Job
from dragdiff.modules.images import to_uint8
from dragdiff.modules.points import Size


def decode(job: Job, latents: Tensor) -> list[np.ndarray]:
    """The picture (H, W, 3) uint8 of each edit, of its sample's size; one that is not finite drops its edit.

    Args:
        latents: clean, (E, C, h, w).
    """
    pictures: list[np.ndarray] = []
    with job.stage("decode", len(job.edits)) as advance:
        for number, (edit, clean) in enumerate(zip(list(job.edits), latents.split(1), strict=True), 1):
            try:
                pictures.append(to_picture(job, clean, edit.sample.image.shape[:2]))
            except UserError as error:
                job.drop(edit, error)
            advance(number, "")
    return pictures


def to_picture(job: Job, latent: Tensor, size: Size | Sequence[int]) -> np.ndarray:
    """Decode one latent.

    Args:
        latent: clean, (1, C, h, w).
        size: (height, width) that the picture is to have, px.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the latent, or what the autoencoder makes of it, is not finite.
    """
    if not torch.isfinite(latent).all():
        raise job.not_finite
    with torch.no_grad():
        image = (job.model.decode(latent) / 2 + 0.5).clamp(0, 1)
    if tuple(image.shape[2:]) != tuple(size):
        image = F.interpolate(image, tuple(size), mode="bilinear")
    return to_uint8(image)
