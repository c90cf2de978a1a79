"""Callbacks that only watch: the trajectory, intermediate frames, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dragdiff.callbacks.base import DragCallback
from dragdiff.modules.features import FeatureMap
from dragdiff.output import written

if TYPE_CHECKING:
    from dragdiff.models.point_drag import Drag


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
    """A cheap preview of the current latent every N steps: kept; with the points, written to disk and sent to loggers
    that take pictures.

    Attributes:
        preview: (h, w, 3) uint8 of a latent (1, C, h, w); each drag has its own.
        frames: (step, preview (h, w, 3) uint8, handles (N, 2) as (row, col) in grid px).
    """

    preview: Callable[[Tensor], np.ndarray]

    def __init__(
        self,
        *,
        draw: Callable[[np.ndarray], Image.Image],
        every: int,
        folder: Path | None = None,
        send: Callable[[Image.Image, int], None] = lambda picture, step: None,
    ) -> None:
        """
        Args:
            draw: lays the points over a preview.
            every: steps; 0 = none.
            folder: where they are written.
            send: given each with its points, and its step.
        """
        self.draw, self.every, self.folder, self.send = draw, every, folder, send
        self.frames: list[tuple[int, np.ndarray, Tensor]] = []
        self._picture: np.ndarray | None = None

    @torch.no_grad()
    def on_latent(self, trainer: L.Trainer, drag: Drag, latent: Tensor) -> None:
        # here, and not where the features are: then all that the backward needs would be in memory, too
        if self.every and drag.step % self.every == 0:
            self._picture = self.preview(latent)

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        step, picture = drag.step, self._picture
        self._picture = None
        if picture is None:
            return
        self.frames.append((step, picture, drag.points.handles.clone()))
        drawn = self.draw(picture)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written(self.folder / f"{step:04d}.png") as file:
                drawn.save(file)
        self.send(drawn, step)


class Spectator(DragCallback):
    """Tells somebody outside of each step where the handles are, with the preview if there is one of this step."""

    def __init__(
        self,
        watch: Watch,
        trajectory: Trajectory,
        frames: Frames,
        *,
        to_px: Callable[[Sequence[Tensor]], np.ndarray],
    ) -> None:
        """
        Args:
            watch: told.
            trajectory, frames: observers that come before this one.
            to_px: handles on the grid, one (N, 2) for each step, as (K, N, 2), (x, y) in px of the image.
        """
        self.watch, self.trajectory, self.frames, self.to_px = watch, trajectory, frames, to_px

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        frames = self.frames.frames
        preview = frames[-1][1] if frames and frames[-1][0] == drag.step else None
        self.watch(drag.step, self.to_px(self.trajectory.positions)[-1], preview)


class LoRAProgress(L.Callback):
    """Reports the finished steps of a LoRA's training, with the loss."""

    def __init__(self, advance: Callable[[int, str], None]) -> None:
        """
        Args:
            advance: told steps done, and a note.
        """
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
            advance: told steps done, and a note.
            px_per_grid: image px per grid px of each drag.
        """
        self.advance, self.drags, self.px_per_grid = advance, drags, px_per_grid

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        drags = list(zip(self.drags, self.px_per_grid, strict=True))
        left = sum(float(drag.points.left.mean()) * px for drag, px in drags) / len(drags)
        running = sum(not drag.stop_reason for drag, _ in drags)
        note = f"{left:.1f} px left" + (f", {running} of {len(drags)} under way" if len(drags) > 1 else "")
        self.advance(max(drag.step for drag, _ in drags), note)
