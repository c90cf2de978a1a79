"""`PointTracking`: moves the handles to where their content is, and stops when all have arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch

from dragdiff.callbacks.base import DragCallback
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.motion import distances
from dragdiff.modules.tracking import Tracker

if TYPE_CHECKING:
    from dragdiff.models.drag import Drag


class PointTracking(DragCallback):
    """Relocates the handles from the second step on; stops when all are nearer than `stop_distance`, or on target."""

    def __init__(self, tracker: Tracker, *, radius: int) -> None:
        self.tracker, self.radius = tracker, radius

    def reads(self, drag: Drag) -> bool:
        return False

    @torch.no_grad()
    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        if drag.steps_done > 0:
            moved = self.tracker(features, templates=drag.templates, handles=drag.handles, radius=self.radius)
            drag.handles = torch.where(drag.ended, drag.handles, moved)
        left = distances(drag.handles, drag.targets)
        drag.stop("reached", when=((left < drag.stop_distance) | (left == 0)).all())
