"""Motion supervision: the loss whose gradient pulls the content under each handle towards its target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dragdiff.modules.features import FeatureMap
from dragdiff.modules.points import Size
from dragdiff.modules.tracking import around

Supervision = Callable[..., Tensor]


def shifted_patch(features: FeatureMap, rows: Tensor, cols: Tensor, shift: Tensor) -> Tensor:
    """The patch at rows + shift[0], cols + shift[1], bilinear between grid positions, borders replicated.

    Args:
        rows: (n,) whole positions, one after the other.
        cols: (m,) likewise.
        shift: (2,), (row, col) in grid px.

    Returns:
        (C, n, m).
    """
    whole = shift.floor()
    down, across = (shift - whole).unbind()
    first_row, first_col = whole.long().unbind()
    window = features.window(
        torch.arange(len(rows) + 1, device=rows.device) + rows[0] + first_row,
        torch.arange(len(cols) + 1, device=cols.device) + cols[0] + first_col,
    )
    upper = (1 - across) * window[:, :-1, :-1] + across * window[:, :-1, 1:]
    lower = (1 - across) * window[:, 1:, :-1] + across * window[:, 1:, 1:]
    return (1 - down) * upper + down * lower


def one_step(
    features: FeatureMap,
    *,
    handles: Tensor,
    targets: Tensor,
    radius: int,
    stop_distance: float,
    reference: FeatureMap | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """Pull each handle's patch one grid px towards its target (DragDiffusion, eq. 3).

    Args:
        features: of the current latent, with gradient.
        handles: (N, 2), (row, col) in grid px.
        targets: (N, 2), likewise.
        radius: r1, half side of the patch in grid px.
        stop_distance: handles nearer than this to their target are left alone.
        reference, initial: not read; supervisions are all called alike, and others compare with the unedited latent.

    Returns:
        Scalar: over the handles, (2 r1 + 1)^2 times the mean absolute difference between the detached patch and the
        patch one step on; the mean is over channels and the patch as clipped by the border.
    """
    _, directions, arrived = _ways(handles, targets, stop_distance)
    loss = torch.zeros((), device=handles.device)
    for handle, direction, leave in zip(handles, directions, arrived, strict=True):
        rows, cols = around(handle[0], radius), around(handle[1], radius)
        here = features.window(rows, cols).detach()
        ahead = shifted_patch(features, rows, cols, direction)
        inside = _inside(rows, cols, features.grid)
        loss = loss + (2 * radius + 1) ** 2 * _mean_difference(ahead, here, inside & ~leave, inside)
    return loss


def to_initial(
    features: FeatureMap,
    *,
    reference: FeatureMap,
    handles: Tensor,
    initial: Tensor,
    targets: Tensor,
    radius: int,
    stop_distance: float,
    reach: float,
) -> Tensor:
    """Pull what was at the initial handles to the place a few grid px ahead (GoodDrag, arXiv 2404.07206).

    The patch that is compared with is the unedited latent's, so that errors don't add up from step to step.

    Args:
        features: of the current latent, with gradient.
        reference: of the unedited latent at the same noise level, without gradient.
        handles: (N, 2), (row, col) in grid px.
        initial: (N, 2), likewise: the handles at the start.
        targets: (N, 2), likewise.
        radius: r1 >= 1, half side of the patch in grid px.
        stop_distance: handles nearer than this to their target are left alone.
        reach: beta, how many grid px the patch lies ahead of the handle, or at the target where that is nearer.

    Returns:
        Scalar: over the handles, (2 r1)^2 (not (2 r1 + 1)^2) times the mean absolute difference between the initial
        patch and the one ahead. The mean is over channels and those positions of the patch that lie on the grid
        round the initial handle and round the present one; what lies ahead beyond the border replicates it.
    """
    left, directions, arrived = _ways(handles, targets, stop_distance)
    shifts = directions * left.clamp(max=reach)[:, None]
    loss = torch.zeros((), device=handles.device)
    for start, handle, shift, leave in zip(initial, handles, shifts, arrived, strict=True):
        first_rows, first_cols = around(start[0], radius), around(start[1], radius)
        rows, cols = around(handle[0], radius), around(handle[1], radius)
        template = reference.window(first_rows, first_cols).detach()
        ahead = shifted_patch(features, rows, cols, shift)
        inside = _inside(rows, cols, features.grid) & _inside(first_rows, first_cols, reference.grid)
        loss = loss + (2 * radius) ** 2 * _mean_difference(ahead, template, inside & ~leave, inside)
    return loss


def _ways(handles: Tensor, targets: Tensor, stop_distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """What lies between handles and targets: distances (N,), unit directions (N, 2), and who has arrived (N,) bool."""
    left = (targets - handles).norm(dim=-1)
    arrived = (left < stop_distance) | (left == 0)
    return left, (targets - handles) / left.masked_fill(left == 0, 1)[:, None], arrived


def _inside(rows: Tensor, cols: Tensor, grid: Size) -> Tensor:
    """(n, m) bool: which combinations of whole rows (n,) and cols (m,) lie on the grid."""
    on_rows, on_cols = ((line >= 0) & (line < size) for line, size in zip((rows, cols), grid, strict=True))
    return on_rows[:, None] & on_cols


def _mean_difference(one: Tensor, other: Tensor, counted: Tensor, inside: Tensor) -> Tensor:
    """Sum of absolute differences of two patches (C, n, m) where `counted`, over the number of values `inside`."""
    difference = (one - other).abs().masked_fill(~counted, 0)
    return difference.sum() / (len(difference) * inside.sum())


def mask_term(previous: Tensor, initial: Tensor, *, keep: Tensor) -> Tensor:
    """How much the latent one step down has changed where it should not (DragDiffusion, eq. 3, second term).

    Args:
        previous: z_{t-1} of the current latent, (1, C, h, w).
        initial: z_{t-1} of the latent before the drag.
        keep: (1, 1, h, w), 1 where nothing may change.

    Returns:
        Scalar: the sum (not the mean) of absolute differences.
    """
    return ((previous - initial) * keep).abs().sum()


SUPERVISIONS: dict[str, Supervision] = {"one_step": one_step}
