"""The network's guided output for rows of a batch: each has its picture's prompt and may have its LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dragdiff.backbones.diffusion import Condition, Diffusion, States, joined, rows_of
from dragdiff.modules.features import combine_guidance

if TYPE_CHECKING:
    from dragdiff.modules.lora import Rows


class Denoiser:
    """A model for the pictures of a job.

    Attributes:
        branches: the pictures' condition, a row for each; with guidance two of them: negative, positive.
        guidance: classifier-free guidance scale; 1 = none.
    """

    def __init__(
        self, model: Diffusion, branches: Sequence[Condition], *, guidance: float = 1.0, adapters: Rows | None = None
    ) -> None:
        """
        Args:
            adapters: the LoRAs that are beside the network (`modules.lora.unmerged`), if each picture has its own.
        """
        self.model, self.branches, self.guidance, self.adapters = model, branches, guidance, adapters

    def __call__(self, latents: Tensor, t: Tensor, pictures: Sequence[int]) -> Tensor:
        """The guided output (B, C, h, w).

        Args:
            latents: (B, C, h, w).
            pictures: whose prompt and LoRA each row has.
        """
        output = self._rows(latents, t, pictures, self.branches)
        return output if self.guidance == 1 else _guide(output, self.guidance)

    def with_features(
        self,
        latents: Tensor,
        t: Tensor,
        pictures: Sequence[int],
        *,
        names: Sequence[str],
        need_output: bool,
        guided: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As `__call__`, with the features of some points, (B, C_i, h_i, w_i) each; see `Diffusion.with_features`.

        Args:
            guided: False is the prompt's branch alone.
        """
        branches = self.branches if guided else self.branches[-1:]
        output, maps = self.model.with_features(
            lambda: self._rows(latents, t, pictures, branches), names, need_output=need_output
        )
        if len(branches) == 1:
            return output, maps
        return (
            None if output is None else _guide(output, self.guidance),
            [combine_guidance(features, self.guidance) for features in maps],
        )

    def shared_attention(
        self, layers: Sequence[str], states: States, *, pictures: Sequence[int], where: Sequence[bool] | None
    ) -> AbstractContextManager[None]:
        """While it lasts, rows take keys and values from their pictures' states.

        Args:
            states: with a row for each picture, in each guidance branch.
            pictures: of each row of a batch.
            where: rows that do; None = all.
        """
        count = len(next(iter(self.branches[0].values())))
        if list(pictures) != list(range(count)):
            index = torch.tensor(pictures, device=self.model.device)
            states = {
                name: value.unflatten(0, (-1, count)).index_select(1, index).flatten(0, 1)
                for name, value in states.items()
            }
        return self.model.shared_attention(layers, states, where=where)

    def _rows(self, latents: Tensor, t: Tensor, pictures: Sequence[int], branches: Sequence[Condition]) -> Tensor:
        """The output of some branches: (G B, C, h, w)."""
        if self.adapters is not None:
            self.adapters.pictures = list(pictures)
        condition = joined([rows_of(branch, pictures) for branch in branches])
        return self.model.predict(torch.cat([latents] * len(branches)), t, condition)


def _guide(output: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): (2B, ...) negative then positive -> (B, ...)."""
    negative, positive = output.chunk(2)
    return negative + guidance * (positive - negative)
