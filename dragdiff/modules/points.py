"""The one place where (x, y) in image px becomes (row, col) on the feature grid, and where masks change size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dragdiff.errors import UserError

Size = tuple[int, int]  # (height, width)


@dataclass(eq=False)
class Points:
    """The points of one edit on the feature grid, (N, 2) float32 each, (row, col) in grid px.

    Attributes:
        initial: where the handles began.
        handles: where they are now; tracking moves them, from drag to drag.
        targets: where they should go.
        grid: (rows, cols).
    """

    initial: Tensor
    handles: Tensor
    targets: Tensor
    grid: Size

    @property
    def left(self) -> Tensor:
        """(N,) distance of each handle to its target, grid px."""
        return (self.targets - self.handles).norm(dim=-1)

    def arrived(self, stop_distance: float) -> Tensor:
        """Which handles are at their targets.

        Args:
            stop_distance: nearer than this is, grid px; on the target always is.

        Returns:
            (N,) bool.
        """
        return (self.left < stop_distance) | (self.left == 0)


def grid_size(image_size: Size, scale: float) -> Size:
    """(rows, cols) of the feature grid: the image's (height, width) times `scale`, rounded down, at least 1."""
    return max(1, int(image_size[0] * scale)), max(1, int(image_size[1] * scale))


def to_grid(points: Tensor, *, image_size: Size, grid: Size) -> Tensor:
    """Image px to the nearest grid position.

    Args:
        points: (..., 2), (x, y) in px.
        image_size: (height, width) in px.
        grid: (rows, cols).

    Returns:
        (..., 2) float32 of whole numbers, (row, col), rounded half to even and clamped to the grid.
    """
    scaled = points.to(torch.float64).flip(-1) / torch.tensor(image_size) * torch.tensor(grid)
    last = torch.tensor(grid, dtype=torch.float32) - 1
    return scaled.to(torch.float32).round().clamp(min=torch.zeros(2), max=last)


def to_image(positions: Tensor, *, image_size: Size, grid: Size) -> Tensor:
    """Grid positions to image px.

    Args:
        positions: (..., 2), (row, col) in grid px.

    Returns:
        (..., 2) float32, (x, y) in px.
    """
    scale = torch.tensor(image_size, dtype=torch.float32) / torch.tensor(grid, dtype=torch.float32)
    return (positions.cpu() * scale).flip(-1)


def mask_to_latent(mask: Tensor, *, grid: Size, latent_size: Size) -> Tensor:
    """The editable area at the latent's size, by nearest neighbour through the feature grid as the reference does.

    Args:
        mask: (H, W) bool, True = may change, with at least one True.
        grid: (rows, cols) of the feature grid.
        latent_size: (h, w).

    Returns:
        (1, 1, h, w) float32 of 0 and 1.

    Raises:
        UserError: the area is so small that nothing of it is left (the reference then silently ignores the mask).
    """
    small = F.interpolate(F.interpolate(mask[None, None].float(), grid, mode="nearest"), latent_size, mode="nearest")
    if not small.any():
        height, width = latent_size
        raise UserError(
            f"the mask's editable area vanishes at the latent's size {width}x{height}: paint a larger area, "
            "or leave the mask out"
        )
    return small
