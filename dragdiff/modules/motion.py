"""Motion supervision: the loss whose gradient pulls the content under each handle towards its target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dragdiff.modules.features import FeatureMap
from dragdiff.modules.tracking import around

Supervision = Callable[..., Tensor]


def distances(handles: Tensor, targets: Tensor) -> Tensor:
    """Euclidean distance of each handle to its target, (N,), in the unit of the (N, 2) inputs."""
    return (targets - handles).norm(dim=-1)


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
    reference: object = None,
    initial: object = None,
) -> Tensor:
    """Pull each handle's patch one grid px towards its target (DragDiffusion, eq. 3).

    Args:
        features: of the current latent, with gradient.
        handles: (N, 2), (row, col) in grid px.
        targets: (N, 2), likewise.
        radius: r1, half side of the patch in grid px.
        stop_distance: handles nearer than this to their target are left alone.

    Returns:
        Scalar: over the handles, (2 r1 + 1)^2 times the mean absolute difference between the detached patch and the
        patch one step on; the mean is over channels and the patch as clipped by the border.
    """
    left = distances(handles, targets)
    arrived = (left < stop_distance) | (left == 0)
    directions = (targets - handles) / left.masked_fill(left == 0, 1)[:, None]
    loss = torch.zeros((), device=handles.device)
    for handle, direction, leave in zip(handles, directions, arrived, strict=True):
        rows, cols = around(handle[0], radius), around(handle[1], radius)
        here = features.window(rows, cols).detach()
        ahead = shifted_patch(features, rows, cols, direction)
        inside = _inside(rows, features.grid[0])[:, None] & _inside(cols, features.grid[1])
        difference = (ahead - here).abs().masked_fill(~inside | leave, 0)
        loss = loss + (2 * radius + 1) ** 2 * (difference.sum() / (len(difference) * inside.sum()))
    return loss


def _inside(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)


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
