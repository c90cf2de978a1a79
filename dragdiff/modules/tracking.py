"""Point tracking: where the content under each handle is now."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dragdiff.modules.features import FeatureMap

Tracker = Callable[..., Tensor]


def around(centre: Tensor, radius: int) -> Tensor:
    """The (2 radius + 1,) whole positions within `radius` of a scalar one along an axis, also those off the grid."""
    return centre.long() + torch.arange(-radius, radius + 1, device=centre.device)


def nearest(features: FeatureMap, *, templates: Tensor, handles: Tensor, radius: int) -> Tensor:
    """Nearest neighbour in feature space (DragDiffusion, section 3.4; DragGAN, section 3.3).

    Args:
        features: of the current latent.
        templates: (N, C), the initial features at the initial handles.
        handles: (N, 2), (row, col) in grid px, on the features' device.
        radius: r2, half side of the search window in grid px.

    Returns:
        (N, 2) float32: the whole position in each handle's window whose feature has the smallest L1 distance to the
        template; the first in row-major order where several do. A handle stays where features are not numbers.
    """
    height, width = features.grid
    moved = []
    for template, handle in zip(templates, handles, strict=True):
        # a window at the border has the border's positions several times: that changes no minimum
        rows, cols = around(handle[0], radius).clamp(0, height - 1), around(handle[1], radius).clamp(0, width - 1)
        distance = (features.window(rows, cols) - template[:, None, None]).abs().sum(dim=0)
        place = rows[:, None] * width + cols
        # argmin would leave the order of ties open, and would take what is not a number
        first = place.masked_fill(distance != distance.min(), height * width).min()
        found = torch.stack([first // width, first % width]).to(torch.float32)
        moved.append(torch.where(first < height * width, found, handle.to(torch.float32)))
    return torch.stack(moved)


TRACKERS: dict[str, Tracker] = {"nearest": nearest}
