"""What goes into an edit, what it is on its way, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger
from torch import Tensor

from dragdiff.callbacks import Frames, Trajectory, Watch
from dragdiff.config import Config
from dragdiff.data.sample import EditSample
from dragdiff.models.drag import Drag


@dataclass(frozen=True)
class EditResult:
    """An edit and how it came about.

    Attributes:
        sample: what was asked for.
        image: the edited picture, (H, W, 3) uint8, of the sample's size.
        trajectory: (K, N, 2) float32, (x, y) in image px: each handle as tracked before each of K steps.
        steps: latent updates done.
        stop_reason: "reached", "steps", or a sentence about divergence.
        frames: (step, preview (h, w, 3) uint8, handles (N, 2) as (x, y) in image px).
        seconds: wall time of each stage; of a batch, its edits' share.
        peak_memory_mb: of the process (CPU) or of the device's allocator (CUDA).
        config: the resolved settings.
    """

    sample: EditSample
    image: np.ndarray
    trajectory: np.ndarray
    steps: int
    stop_reason: str
    frames: list[tuple[int, np.ndarray, np.ndarray]]
    seconds: dict[str, float]
    peak_memory_mb: float
    config: Config

    @property
    def distance_before(self) -> np.ndarray:
        """(N,) px from each handle to its target before the drag."""
        return np.linalg.norm(self.sample.targets - self.sample.handles, axis=1)

    @property
    def distance_after(self) -> np.ndarray:
        """(N,) px from each handle, as tracked at the end, to its target."""
        return np.linalg.norm(self.sample.targets - self.trajectory[-1], axis=1)


@dataclass(frozen=True)
class Request:
    """One edit of a batch; all but `config` as for `Editor.edit`.

    Attributes:
        config: in place of the editor's, with the same `shared_settings`; None = the editor's.
        callbacks: their Trainer serves the whole batch; where several edits run, its metrics ("0:drag/loss") begin with
            the edit's place among them.
    """

    sample: EditSample
    config: Config | None = None
    folder: Path | None = None
    logger: Logger | None = None
    callbacks: Sequence[L.Callback] = ()
    watch: Watch | None = None


@dataclass(eq=False)
class Edit:
    """An edit on its way through the stages.

    Attributes:
        number: of its request.
        picture: number of its source picture, which other edits of the batch may share.
        config: its settings.
        sample, working: as asked for, and at the size that is worked on.
        keep: (1, 1, h, w), 1 where the latent may not change; None without a mask.
    """

    number: int
    picture: int
    request: Request
    config: Config
    sample: EditSample
    working: EditSample
    keep: Tensor | None
    trajectory: Trajectory = dataclasses.field(default_factory=Trajectory)
    frames: Frames | None = None
    drag: Drag | None = None
