"""Point tracking: moves the handles to where their content is, and stops when all have arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch

from dragdiff.callbacks.base import DragCallback

if TYPE_CHECKING:
    from dragdiff.models.point_drag import Drag
    from dragdiff.modules.features import FeatureMap
    from dragdiff.modules.tracking import Tracker


class PointTracking(DragCallback):
    """Relocates the handles from the second step on, before each loss (DragDiffusion, section 3.4); stops when all are
    nearer than `stop_distance`, or on target."""

    def __init__(self, tracker: Tracker, *, radius: int) -> None:
        """
        Args:
            radius: r2, half side of the search window, grid px.
        """
        self.tracker, self.radius = tracker, radius

    @torch.no_grad()
    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        if self.is_due(drag):
            self.track(drag, features)
        if drag.points.arrived(drag.stop_distance).all():
            drag.stop("reached")

    def is_due(self, drag: Drag) -> bool:
        """Whether the handles are looked for before this step's loss."""
        return drag.steps_done > 0

    def track(self, drag: Drag, features: FeatureMap) -> bool:
        """Relocate the handles; whether one of them has moved."""
        before = drag.points.handles
        drag.points.handles = self.tracker(
            features, templates=drag.templates, handles=drag.points.handles, radius=self.radius
        )
        return not torch.equal(before, drag.points.handles)


class PeriodicTracking(PointTracking):
    """Relocates the handles at the first step of each level, and after every J-th update on the features before it
    (GoodDrag, section 3.3); also stops where they have not moved for so many times."""

    def __init__(self, tracker: Tracker, *, radius: int, every: int, patience: int) -> None:
        """
        Args:
            every: J, updates.
            patience: trackings after updates, in a row and over all levels, that move no handle.
        """
        super().__init__(tracker, radius=radius)
        self.every, self.patience, self.unmoved = every, patience, 0

    def is_due(self, drag: Drag) -> bool:
        """At the first step of a level, which is not counted."""
        return drag.steps_done == 0

    @torch.no_grad()
    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        super().on_features(trainer, drag, features)
        if not drag.stop_reason and self.unmoved >= self.patience:
            drag.stop(f"no handle moved in {self.patience} trackings")

    @torch.no_grad()
    def on_update(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        if drag.steps_done % self.every == 0:
            self.unmoved = 0 if self.track(drag, features) else self.unmoved + 1
