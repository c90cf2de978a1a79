"""What a drag can optimise, and how the forward uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dragdiff.modules.features import replaced


class Variable(nn.Module, ABC):
    """Parameters of several edits that share forwards.

    Attributes:
        values: one (1, ...) for each edit.
        limit: a value beyond it has diverged.
    """

    limit = float("inf")

    def __init__(self, values: Tensor) -> None:
        """
        Args:
            values: (E, ...), where E edits start.
        """
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in values.split(1))

    def rows(self, edits: Sequence[int]) -> Tensor:
        """The values of some edits, (B, ...)."""
        return torch.cat([self.values[edit] for edit in edits])

    @abstractmethod
    def only(self, edits: Sequence[int]) -> Variable:
        """The same of some edits, from where they are."""

    @abstractmethod
    def latents(self, edits: Sequence[int]) -> Tensor:
        """(B, C, h, w) that enter the forward of some edits."""

    def applied(self, edits: Sequence[int]) -> AbstractContextManager[None]:
        """The network as the values of some edits change it."""
        return nullcontext()


class Latent(Variable):
    """The noisy latent itself (DragDiffusion)."""

    limit = 1000.0  # latents have entries of some units, with strong guidance of some tens

    def only(self, edits: Sequence[int]) -> Variable:
        return Latent(self.rows(edits))

    def latents(self, edits: Sequence[int]) -> Tensor:
        """The values themselves."""
        return self.rows(edits)


class Bottleneck(Variable):
    """The output of a block in the place of what it computes, for latents that stay (DragNoise)."""

    def __init__(self, values: Tensor, latents: Tensor, block: nn.Module) -> None:
        """
        Args:
            values: (E, C', h', w'), the block's output.
            latents: (E, C, h, w).
        """
        super().__init__(values)
        self.fixed, self.blocks = latents.split(1), (block,)  # in a tuple: no submodule

    def only(self, edits: Sequence[int]) -> Variable:
        return Bottleneck(self.rows(edits), self.latents(edits), self.blocks[0])

    def latents(self, edits: Sequence[int]) -> Tensor:
        """Those that stay."""
        return torch.cat([self.fixed[edit] for edit in edits])

    def applied(self, edits: Sequence[int]) -> AbstractContextManager[None]:
        """The network with the block's output replaced."""
        return replaced(self.blocks[0], self.rows(edits))
