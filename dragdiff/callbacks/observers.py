"""Callbacks that only watch: the trajectory, intermediate frames, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from torch import Tensor

from dragdiff.callbacks.base import DragCallback

if TYPE_CHECKING:
    from dragdiff.models.point_drag import Drag
    from dragdiff.modules.features import FeatureMap

# a drag step, the handles (N, 2) as (x, y) in px of the image, the preview (h, w, 3) uint8 if there is one of this step
Watch = Callable[[int, np.ndarray, np.ndarray | None], None]


class Trajectory(DragCallback):
    """Records and logs where each handle is at each step.

    Attributes:
        positions: one (N, 2) tensor for each step, (row, col) in grid px, after tracking.
    """

    def __init__(self) -> None:
        self.positions: list[Tensor] = []

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        self.positions.append(drag.points.handles.clone())
        left = drag.points.left
        for i, value in enumerate(left.unbind()):
            drag.log(f"drag/distance_{i}", value)
        drag.log("drag/distance", left.mean())


class Frames(DragCallback):
    """Shows each step, every N steps with a cheap preview of the current latent, which is kept.

    Attributes:
        preview: (h, w, 3) uint8 of a latent (1, C, h, w), or None; each drag has its own.
        frames: (step, preview (h, w, 3) uint8, handles (N, 2) as (row, col) in grid px).
    """

    preview: Callable[[Tensor], np.ndarray | None]

    def __init__(self, show: Callable[[int, np.ndarray | None], None], *, every: int) -> None:
        """
        Args:
            show: given each step, and its preview (h, w, 3) uint8 if it has one.
            every: steps; 0 = no previews.
        """
        self.show, self.every = show, every
        self.frames: list[tuple[int, np.ndarray, Tensor]] = []
        self._picture: np.ndarray | None = None

    @torch.no_grad()
    def on_latent(self, trainer: L.Trainer, drag: Drag, latent: Tensor) -> None:
        # here, and not where the features are: then all that the backward needs would be in memory, too
        if self.every and drag.step % self.every == 0:
            self._picture = self.preview(latent)

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        picture, self._picture = self._picture, None
        if picture is not None:
            self.frames.append((drag.step, picture, drag.points.handles.clone()))
        self.show(drag.step, picture)


class LoRAProgress(L.Callback):
    """Reports the finished steps of a LoRA's training, with the loss, to `advance`."""

    def __init__(self, advance: Callable[[int, str], None]) -> None:
        self.advance = advance

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        losses = [value for name, value in trainer.callback_metrics.items() if name.endswith("lora/loss")]
        self.advance(trainer.global_step, f"loss {float(torch.stack(losses).mean()):.3f}")


class DragProgress(L.Callback):
    """Reports the finished steps of drags, with the mean distance left in image px."""

    def __init__(
        self, advance: Callable[[int, str], None], drags: Sequence[Drag], px_per_grid: Sequence[float]
    ) -> None:
        """
        Args:
            px_per_grid: image px per grid px of each drag.
        """
        self.advance, self.drags, self.px_per_grid = advance, drags, px_per_grid

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        drags = list(zip(self.drags, self.px_per_grid, strict=True))
        left = sum(float(drag.points.left.mean()) * px for drag, px in drags) / len(drags)
        running = sum(not drag.stop_reason for drag, _ in drags)
        note = f"{left:.1f} px left" + (f", {running} of {len(drags)} under way" if len(drags) > 1 else "")
        self.advance(max(drag.step for drag, _ in drags), note)
