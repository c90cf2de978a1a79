"""The hooks that drag editing adds to Lightning's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
from torch import Tensor

if TYPE_CHECKING:
    from dragdiff.models.point_drag import Drag
    from dragdiff.modules.features import FeatureMap


class DragCallback(L.Callback):
    """A callback that also sees each step of a drag.

    Only point tracking acts on what it sees; the others observe, so that removing one never changes the picture.
    """

    def on_latent(self, trainer: L.Trainer, drag: Drag, latent: Tensor) -> None:
        """Called before the forward of each step, when nothing is kept for a backward yet; latent (1, C, h, w)."""

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        """Called between the forward of a step and its loss, with the features of the latent before the update."""

    def on_update(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        """Called after the update of a step, with the same features; not in a step that ends the drag without one."""
