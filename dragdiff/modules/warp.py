"""One warp of the latent instead of an optimisation (FastDrag, Zhao et al. 2024, arXiv 2405.15769).

A region of the latent is stretched from the handles towards the targets, its content relocated, and what that leaves
empty filled. All positions are (row, col) in latent px, and the pixels of a region come in row-major order.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dragdiff.errors import UserError
from dragdiff.modules.points import Size

BLENDS = ("average", "nearest")
FILLS = ("neighbours", "noise", "keep")


def region_of(mask: NDArray[np.bool_] | None, *, grid: Size, latent_size: Size) -> Tensor:
    """The editable area at the latent's size, by way of the feature grid as the published code has it.

    Other than by `points.mask_to_latent`, a latent pixel belongs to it as soon as one of the grid positions does that
    bilinear resizing (not antialiased) reads for it.

    Args:
        mask: (H, W) bool, True = may change; None = all of it.
        grid: (rows, cols) of the feature grid.
        latent_size: (h, w).

    Returns:
        (h, w) bool, with at least one True.

    Raises:
        UserError: nothing of the area is left.
    """
    if mask is None:
        return torch.ones(latent_size, dtype=torch.bool)
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32))
    on_grid = F.interpolate(pixels[None, None], grid, mode="nearest")
    region = F.interpolate(on_grid, latent_size, mode="bilinear")[0, 0] > 0
    if not region.any():
        height, width = latent_size
        raise UserError(f"the mask's editable area is empty at the latent's size {width}x{height}: paint a larger area")
    return region


def stretch(handles: Tensor, targets: Tensor, region: Tensor, *, blend: str) -> Tensor:
    """How far each pixel of the region moves: the latent warpage function of FastDrag.

    Each pair moves a pixel by a share of the pair's own way: all of it at the handle, nothing on the circle round the
    region's bounding rectangle, and between them falling linearly along the ray from the handle to the circle.

    Args:
        handles: (N, 2), (row, col) in latent px, fractions included, N >= 1.
        targets: (N, 2), likewise.
        region: (h, w) bool with at least one True.
        blend: what becomes of several pairs: "average" weighs them by the inverse distance of the pixel to the
            handle; "nearest" follows the nearest handle alone, the first of several (LazyDrag, arXiv 2509.12203), so
            that opposite drags don't cancel out.

    Returns:
        (n, 2) float32: the displacement of each of the region's n pixels, on the region's device.
    """
    pixels = region.nonzero()
    handles, targets = (points.to(region.device, torch.float32) for points in (handles, targets))
    first, last = pixels.amin(dim=0), pixels.amax(dim=0)
    centre = (first + last) / 2
    radius = (centre - first + 1e-6).norm()

    away = (pixels - handles[:, None]).norm(dim=-1)  # (N, n), as all that follows
    rays = (pixels - handles[:, None]) / away[..., None]  # not a number where a handle lies on the pixel
    off_centre = handles - centre
    along = (rays * off_centre[:, None]).sum(dim=-1)
    half_chord = (radius**2 - off_centre.square().sum(dim=-1)[:, None] + along**2).clamp(min=0).sqrt()
    to_circle = (half_chord - along).clamp(min=1e-6)
    share = (away - to_circle).abs() / to_circle
    # the handle's own pixel, which the published code loses, and rounding where a handle is a hair off the circle
    share = share.masked_fill(away == 0, 1).clamp(max=1)

    if blend == "average":
        weights = 1 / (away + 1e-4)
        weights = weights / weights.sum(dim=0)
    elif blend == "nearest":
        weights = F.one_hot(away.argmin(dim=0), len(handles)).T.float()
    else:
        raise ValueError(f"blend {blend!r} is none of {', '.join(BLENDS)}")
    return ((weights * share)[..., None] * (targets - handles)[:, None]).sum(dim=0)


def relocate(latent: Tensor, region: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Move the region's content, each pixel to the nearest whole position.

    The first pixel in row-major order that claims a destination keeps it. Destinations outside of the latent are
    clamped to its border, and those outside of the region are overwritten too.

    Args:
        latent: (C, h, w).
        region: (h, w) bool, on the latent's device.
        displacement: (n, 2), (row, col) in latent px, for each of the region's n pixels.

    Returns:
        (the latent with the content moved, and 0 where nothing came; (h, w) bool, True there).
    """
    height, width = region.shape
    pixels = region.nonzero()
    # in float32, where half a pixel is a tie that goes to the even position, as in the published code
    rows, cols = (pixels + displacement.to(pixels.device, torch.float32)).round().long().unbind(dim=1)
    destinations = rows.clamp(0, height - 1) * width + cols.clamp(0, width - 1)
    nobody = len(pixels)
    owner = torch.full((height * width,), nobody, device=pixels.device).scatter_reduce(
        0, destinations, torch.arange(nobody, device=pixels.device), "amin"
    )
    claimed = owner < nobody
    from_rows, from_cols = pixels[owner[claimed]].unbind(dim=1)
    moved = latent.masked_fill(region, 0).flatten(1)
    moved[:, claimed] = latent[:, from_rows, from_cols]
    return moved.view_as(latent), region & ~claimed.view(height, width)


def fill(latent: Tensor, holes: Tensor, *, mode: str, original: Tensor, generator: torch.Generator) -> Tensor:
    """Give the holes of a relocated latent a content.

    Args:
        latent: (C, h, w).
        holes: (h, w) bool, True where the latent has no content, on its device.
        mode: "neighbours" interpolates between the nearest contents to the left, right, above and below, weighted by
            the inverse distance (bilateral nearest neighbour interpolation). Holes are filled in row-major order,
            and one that has been filled is a neighbour of those that follow; without any neighbour it stays 0.
            "noise" takes standard normal noise, "keep" what `original` has there.
        original: (C, h, w), the latent before it was relocated, or another one of its noise level.
        generator: on the CPU; "noise" draws (C, h, w) numbers from it, however many holes there are.

    Returns:
        (C, h, w), of the latent's type and on its device.
    """
    if mode == "neighbours":
        return _from_neighbours(latent, holes)
    if mode == "noise":
        return torch.where(holes, torch.randn(latent.shape, generator=generator).to(latent), latent)
    if mode == "keep":
        return torch.where(holes, original, latent)
    raise ValueError(f"mode {mode!r} is none of {', '.join(FILLS)}")


def _from_neighbours(latent: Tensor, holes: Tensor) -> Tensor:
    known: list[list[bool]] = (~holes).tolist()
    height, width = holes.shape
    # each hole waits for those before it: thousands of tiny steps, in which tensors would cost ten times as much
    filled = latent.masked_fill(holes, 0).to("cpu", torch.float32).numpy(force=True)
    for row, col in holes.nonzero().tolist():
        total, values = 0.0, np.zeros(len(filled), np.float32)
        for down, across in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            distance, r, c = 1, row + down, col + across
            while 0 <= r < height and 0 <= c < width and not known[r][c]:
                distance, r, c = distance + 1, r + down, c + across
            if 0 <= r < height and 0 <= c < width:
                total += 1 / distance
                values += filled[:, r, c] / distance
        if total:
            filled[:, row, col] = values / total
            known[row][col] = True
    return torch.from_numpy(filled).to(latent)
