"""Point tracking: where the content under each handle is now."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dragdiff.modules.features import FeatureMap

Tracker = Callable[..., Tensor]


def window_range(centre: float, radius: int, size: int) -> tuple[int, int]:
    """First and one past the last whole position within `radius` of `centre`, clipped to 0 .. size - 1."""
    return max(0, int(centre) - radius), min(size, int(centre) + radius + 1)


def nearest(features: FeatureMap, *, templates: Tensor, handles: Tensor, radius: int) -> Tensor:
    """Nearest neighbour in feature space (DragDiffusion, section 3.4; DragGAN, section 3.3).

    Args:
        features: of the current latent.
        templates: (N, C), the initial features at the initial handles.
        handles: (N, 2), (row, col) in grid px.
        radius: r2, half side of the search window in grid px.

    Returns:
        (N, 2) float32: the whole position in each handle's window whose feature has the smallest L1 distance to the
        template; the first in row-major order where several do.
    """
    moved = []
    for template, (row, col) in zip(templates, handles.tolist(), strict=True):
        top, bottom = window_range(row, radius, features.grid[0])
        left, right = window_range(col, radius, features.grid[1])
        window = features.window(torch.arange(top, bottom), torch.arange(left, right))
        distance = (window - template[:, None, None]).abs().sum(dim=0)
        # argmin leaves the order of ties open, nonzero does not
        best = (distance == distance.min()).nonzero()[:1]
        moved.append(torch.tensor([row, col]) if len(best) == 0 else best[0].cpu() + torch.tensor([top, left]))
    return torch.stack(moved).to(torch.float32)


TRACKERS: dict[str, Tracker] = {"nearest": nearest}
