"""The network's guided output for the pictures of a batch: each has its prompt and may have its LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dragdiff.modules.backbone import Backbone
from dragdiff.modules.features import combine_guidance, forward_with_features
from dragdiff.modules.lora import Rows


class Denoiser:
    """
    Attributes:
        embeddings: (G, P, tokens, D) of P pictures; G is 1, or 2 with guidance: negative, positive.
    """

    def __init__(
        self, backbone: Backbone, embeddings: Tensor, *, guidance: float = 1.0, adapters: Rows | None = None
    ) -> None:
        """
        Args:
            guidance: classifier-free guidance scale; 1 = none.
            adapters: the LoRAs that are beside the network (`modules.lora.beside`), if each picture has its own.
        """
        self.backbone, self.embeddings, self.guidance, self.adapters = backbone, embeddings, guidance, adapters

    def __call__(self, latents: Tensor, t: Tensor, pictures: Sequence[int] | None = None) -> Tensor:
        """The guided output (B, C, h, w).

        Args:
            latents: (B, C, h, w).
            pictures: whose prompt and LoRA each row has; None: those of all pictures, in their order.
        """
        output = self._rows(latents, t, pictures)
        return output if self.guidance == 1 else guide(output, self.guidance)

    def with_features(
        self, latents: Tensor, t: Tensor, pictures: Sequence[int], *, blocks: Sequence[str], need_output: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As `__call__`, with the features of some blocks, (B, C_i, h_i, w_i) each; see `forward_with_features`."""
        modules = [self.backbone.feature_block(name) for name in blocks]
        output, maps = forward_with_features(lambda: self._rows(latents, t, pictures), modules, need_output=need_output)
        if self.guidance == 1:
            return output, maps
        return (
            None if output is None else guide(output, self.guidance),
            [combine_guidance(features, self.guidance) for features in maps],
        )

    def _rows(self, latents: Tensor, t: Tensor, pictures: Sequence[int] | None) -> Tensor:
        """The output of all rows: (G B, C, h, w)."""
        everyone = list(range(self.embeddings.shape[1]))
        chosen = everyone if pictures is None else list(pictures)
        if self.adapters is not None:
            self.adapters.active = chosen
        embeddings = self.embeddings
        if chosen != everyone:  # a list as index would have to be copied to the device first, which waits for that
            embeddings = torch.stack([embeddings[:, picture] for picture in chosen], dim=1)
        return self.backbone.predict(torch.cat([latents] * len(embeddings)), t, embeddings.flatten(0, 1))


def guide(output: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): (2B, ...) negative then positive -> (B, ...)."""
    negative, positive = output.chunk(2)
    return negative + guidance * (positive - negative)
