"""The hook that drag editing adds to Lightning's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L

from dragdiff.modules.features import FeatureMap

if TYPE_CHECKING:
    from dragdiff.models.drag import Drag


class DragCallback(L.Callback):
    """A callback that also sees each step's features, between the forward and the loss.

    Only `PointTracking` acts on what it sees; the others observe, so that removing one never changes the picture.
    """

    def reads(self, drag: Drag) -> bool:
        """Whether the host must know the drag's state at its next step: a GPU then waits for it.

        False for a callback that keeps tensors where they are. It may then see some steps after a drag's end, before
        the host knows of that: those from `drag.seen` on are to be forgotten.
        """
        return True

    def on_latent(self, trainer: L.Trainer, drag: Drag) -> None:
        """Called before the forward of each step, when nothing is kept for a backward yet."""

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        """Called once a step of a drag, with the features of its latent before the update."""
