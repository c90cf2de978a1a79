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
    from dragdiff.models.drag import LatentDrag


class PointTracking(DragCallback):
    """Relocates the handles from the second step on; stops when all are nearer than `stop_distance`, or on target."""

    def __init__(self, tracker: Tracker, *, radius: int) -> None:
        self.tracker, self.radius = tracker, radius

    @torch.no_grad()
    def on_features(self, trainer: L.Trainer, module: LatentDrag, features: FeatureMap) -> None:
        if module.steps_done > 0:
            module.handles = self.tracker(
                features, templates=module.templates, handles=module.handles, radius=self.radius
            )
        left = distances(module.handles, module.targets)
        if bool(((left < module.stop_distance) | (left == 0)).all()):
            module.stop("reached")
