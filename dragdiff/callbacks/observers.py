"""Callbacks that only watch: the trajectory, intermediate frames, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch import Tensor

from dragdiff.callbacks.base import DragCallback
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.motion import distances
from dragdiff.output import written

if TYPE_CHECKING:
    from dragdiff.models.drag import Drag


# a drag step, the handles (N, 2) as (x, y) in px of the image, the preview (h, w, 3) uint8 if there is one of this step
Watch = Callable[[int, np.ndarray, np.ndarray | None], None]


class Trajectory(DragCallback):
    """Records and logs where each handle is at each step."""

    def __init__(self) -> None:
        self._drag: Drag | None = None
        self._positions: list[Tensor] = []

    @property
    def positions(self) -> list[Tensor]:
        """One (N, 2) tensor for each step, (row, col) in grid px, after tracking."""
        return self._positions[: self._drag.seen] if self._drag else []

    def reads(self, drag: Drag) -> bool:
        return False

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        self._drag = drag
        self._positions.append(drag.handles.clone())
        left = distances(drag.handles, drag.targets)
        for i, value in enumerate(left.unbind()):
            drag.log(f"drag/distance_{i}", value)
        drag.log("drag/distance", left.mean())


class Frames(DragCallback):
    """A cheap preview of the current latent every N steps: kept; with the points, written to disk and sent to W&B.

    Attributes:
        frames: (step, preview (h, w, 3) uint8, handles (N, 2) as (row, col) in grid px).
    """

    def __init__(
        self,
        preview: Callable[[Tensor], np.ndarray],
        *,
        draw: Callable[[np.ndarray], Image.Image],
        every: int,
        folder: Path | None = None,
        logger: Logger | None = None,
    ) -> None:
        """
        Args:
            preview: (h, w, 3) uint8 of a latent.
            draw: lays the points over a preview.
            logger: W&B's gets the pictures, others don't.
        """
        self.preview, self.draw, self.every, self.folder, self.logger = preview, draw, every, folder, logger
        self.frames: list[tuple[int, np.ndarray, Tensor]] = []
        self._picture: np.ndarray | None = None

    def reads(self, drag: Drag) -> bool:
        return drag.steps_done % self.every == 0

    @torch.no_grad()
    def on_latent(self, trainer: L.Trainer, drag: Drag) -> None:
        # here, and not where the features are: then all that the backward needs would be in memory, too
        if self.reads(drag):
            self._picture = self.preview(drag.latent.detach())

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        step, picture = drag.steps_done, self._picture
        self._picture = None
        if picture is None:
            return
        self.frames.append((step, picture, drag.handles.clone()))
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written(self.folder / f"{step:04d}.png") as file:
                self.draw(picture).save(file)
        if log_image := getattr(self.logger, "log_image", None):
            log_image("drag/frame", [self.draw(picture)], caption=[f"step {step}"])


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
        step, frames = drag.steps_done, self.frames.frames
        preview = frames[-1][1] if frames and frames[-1][0] == step else None
        self.watch(step, self.to_px(self.trajectory.positions)[-1], preview)


class Progress(L.Callback):
    """Reports the finished steps of a Trainer to a progress bar, with the distance left in image px, or the loss; of
    drags only when the host looks.
    """

    def __init__(
        self, advance: Callable[[int, str], None], *, px_per_grid: Sequence[float] = (), look_every: int = 1
    ) -> None:
        """
        Args:
            px_per_grid: image px per grid px of each drag.
            look_every: steps from one reading of a loss to the next: a device waits for it.
        """
        self.advance, self.px_per_grid, self.look_every = advance, px_per_grid, look_every
        self._loss = ""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        done, note = trainer.global_step, ""
        if drags := getattr(module, "drags", None):
            if not module.looking:
                return
            done = max(drag.steps_done for drag in drags)
            left = [distances(d.handles, d.targets).mean() * px for d, px in zip(drags, self.px_per_grid, strict=True)]
            running = sum(not drag.stop_reason for drag in drags)
            note = f"{float(torch.stack(left).mean()):.1f} px left"
            note += f", {running} of {len(drags)} under way" if len(drags) > 1 else ""
        else:
            if done % self.look_every == 0 or done == trainer.max_steps:
                losses = [value for name, value in trainer.callback_metrics.items() if name.endswith("lora/loss")]
                self._loss = f"loss {float(torch.stack(losses).mean()):.3f}"
            note = self._loss
        self.advance(done, note)
