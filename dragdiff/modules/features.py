"""UNet features: captured in one forward, read as if resized to the feature grid, but only where they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dragdiff.modules.points import Size


class _Enough(Exception):
    """Raised from a hook when everything asked for has been captured."""


def forward_with_features(
    forward: Callable[[], Tensor], blocks: Sequence[nn.Module], *, need_output: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Run a forward and keep the outputs of some blocks, gradients included.

    Args:
        forward: runs the network that the blocks belong to.
        blocks: modules whose output is a tensor, or a tuple that begins with one.
        need_output: False stops the forward at the last block asked for.

    Returns:
        (the forward's output, or None when it was stopped; one (B, C_i, h_i, w_i) tensor for each block).
    """
    captured: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            features = output if isinstance(output, Tensor) else output[0]
            captured[index] = features.clone()  # later blocks may change it in place (FreeU)
            if not need_output and len(captured) == len(blocks):
                raise _Enough

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    try:
        output = forward()
    except _Enough:
        output = None
    finally:
        for handle in handles:
            handle.remove()
    return output, [captured[index] for index in range(len(blocks))]


@contextmanager
def replaced(block: nn.Module, values: Tensor) -> Iterator[None]:
    """While it lasts, the output of a block is replaced: the network is computed as if it had given these values.

    Args:
        values: (B, C, h, w), a row for each of the batch's (with guidance: for each of a branch's).
    """

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return values.to(output.dtype).repeat(len(output) // len(values), 1, 1, 1)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def combine_guidance(features: Tensor, guidance: float) -> Tensor:
    """The two guidance branches' features side by side, weighted as the reference does.

    Args:
        features: (2B, C, h, w), negative branch first.
        guidance: classifier-free guidance scale g > 1.

    Returns:
        (B, 2C, h, w): (1 - c) F_negative and c F_positive with c = g / (2g - 1).
    """
    share = guidance / (2 * guidance - 1)
    negative, positive = features.chunk(2)
    return torch.cat([(1 - share) * negative, share * positive], dim=1)


@dataclass(frozen=True)
class FeatureMap:
    """Features of one latent, seen on a common grid.

    Reading a window gives the values that bilinear resizing of the whole map to the grid (align_corners False) would
    give there, at a fraction of its memory and time.

    Attributes:
        maps: one (1, C_i, h_i, w_i) tensor for each block; channels are concatenated when read.
        grid: (rows, cols).
    """

    maps: Sequence[Tensor]
    grid: Size

    def detach(self) -> FeatureMap:
        """The same values without gradient."""
        return FeatureMap([features.detach() for features in self.maps], self.grid)

    def window(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Values at every combination of whole grid rows (n,) and cols (m,), (C, n, m) float32; borders replicated."""
        rows, cols = (
            positions.to(self.maps[0].device).clamp(0, size - 1)
            for positions, size in zip((rows, cols), self.grid, strict=True)
        )
        return torch.cat([_read(features[0], rows, cols, self.grid) for features in self.maps])

    def at(self, positions: Tensor) -> Tensor:
        """Values at whole grid positions (N, 2) as (row, col): (N, C)."""
        return torch.stack([self.window(row[None], col[None])[:, 0, 0] for row, col in positions.long()])


def _read(features: Tensor, rows: Tensor, cols: Tensor, grid: Size) -> Tensor:
    """Bilinear resizing of (C, h, w) to `grid`, evaluated at rows x cols only: (C, n, m)."""
    top, bottom, down = _neighbours(rows, features.shape[1], grid[0])
    left, right, across = _neighbours(cols, features.shape[2], grid[1])
    across, down = across[None, None, :], down[None, :, None]

    def along_columns(index: Tensor) -> Tensor:
        line = features.index_select(1, index)
        return (1 - across) * line.index_select(2, left).float() + across * line.index_select(2, right).float()

    return (1 - down) * along_columns(top) + down * along_columns(bottom)


def _neighbours(positions: Tensor, size: int, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """For grid positions along one axis: the two source positions, and the weight of the second."""
    source = ((positions.float() + 0.5) * (size / grid) - 0.5).clamp(min=0)
    first = source.floor().long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), source - first
