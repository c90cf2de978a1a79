"""The edits under way, what goes into one, and what comes out."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from dragdiff import cache
from dragdiff.aliases import Report
from dragdiff.callbacks import Frames, Trajectory, Watch
from dragdiff.errors import NothingLeft, UserError
from dragdiff.modules.points import to_image

if TYPE_CHECKING:
    from dragdiff.backbones.diffusion import Condition, Diffusion
    from dragdiff.config import Config
    from dragdiff.data.sample import EditSample
    from dragdiff.modules.denoiser import Denoiser
    from dragdiff.modules.points import Points


@dataclass(frozen=True, repr=False)
class EditResult:
    """An edit and how it came about.

    Attributes:
        sample: what was asked for.
        image: the edited picture, (H, W, 3) uint8, of the sample's size.
        trajectory: (K, N, 2) float32, (x, y) in image px: each handle as tracked before each of K steps; None where the
            method tracks none.
        steps: updates done.
        stop_reason: "reached", "steps", or a sentence; "" where nothing is optimised.
        frames: (step, preview (h, w, 3) uint8, handles (N, 2) as (x, y) in image px).
        seconds: wall time of each stage; of a batch, its edits' share.
        peak_memory_mb: of the process (CPU) or of the device's allocator (CUDA).
        config: the resolved settings.
    """

    sample: EditSample
    image: np.ndarray
    trajectory: np.ndarray | None
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
    def distance_after(self) -> np.ndarray | None:
        """(N,) px from each handle, as tracked at the end, to its target; None where nothing was tracked."""
        if self.trajectory is None:
            return None
        return np.linalg.norm(self.sample.targets - self.trajectory[-1], axis=1)

    def __repr__(self) -> str:
        before, after = self.distance_before, self.distance_after
        way = "" if after is None else f", {_px(before)} px left -> {_px(after)}"
        ended = f", {self.steps} steps ({self.stop_reason})" if self.stop_reason else ""
        seconds = sum(self.seconds.values())
        return f"<EditResult {self.sample.name!r} by {self.config.method}{way}{ended}, {seconds:.1f} s>"

    def save(self, folder: str | Path) -> list[Path]:
        """Write all files that the command writes.

        Args:
            folder: made where there is none; what is in it of another edit is overwritten.

        Returns:
            Where they are.
        """
        from dragdiff import output

        Path(folder).mkdir(parents=True, exist_ok=True)
        return output.save(self, Path(folder))

    def show(self) -> None:
        """Open source and result side by side in the system's viewer (Pillow)."""
        from dragdiff import output

        output.comparison(self).show()

    def _repr_png_(self) -> bytes:
        """What a notebook shows: source and result side by side."""
        from dragdiff import output

        buffer = io.BytesIO()
        output.comparison(self).save(buffer, "PNG")
        return buffer.getvalue()


def _px(distances: np.ndarray) -> str:
    return ", ".join(f"{distance:.1f}" for distance in distances)


@dataclass(frozen=True)
class Request:
    """One edit of a batch; all but `config` as for `Editor.edit`.

    Attributes:
        config: in place of the editor's, with which it shares all but what is a sample's or an edit's own (`own` at the
            option); None = the editor's.
        callbacks: their Trainer serves the whole batch; where several edits run, its metrics ("0:drag/loss") begin
            with the edit's place among them.
    """

    sample: EditSample
    config: Config | None = None
    folder: Path | None = None
    logger: Logger | None = None
    callbacks: Sequence[L.Callback] = ()
    watch: Watch | None = None


@dataclass(eq=False)
class Edit:
    """One edit of a job.

    Attributes:
        number: of its request.
        picture: number of its source picture, which other edits of the job may share.
        config: its settings.
        sample, working: as asked for, and at the size that is worked on.
        points: on the feature grid; the method moves the handles.
        keep: (1, 1, h, w), 1 where the latent may not change; None without a mask.
        random: the edit's own numbers, the same whatever is beside it and wherever it runs.
        observers: callbacks of its drags.
        steps, stop_reason: as of its result.
    """

    number: int
    picture: int
    request: Request
    config: Config
    sample: EditSample
    working: EditSample
    points: Points
    keep: Tensor | None
    random: torch.Generator
    trajectory: Trajectory = field(default_factory=Trajectory)
    frames: Frames = field(init=False)
    observers: list[L.Callback] = field(default_factory=list)
    steps: int = 0
    stop_reason: str = ""

    @property
    def through(self) -> bool:
        """Whether its drag is over for good; else it has only done all updates of a level, and may go on at another."""
        return self.stop_reason not in ("", "steps")

    def to_px(self, positions: Sequence[Tensor]) -> np.ndarray:
        """Handles on the grid, one (N, 2) for each of K steps, as (K, N, 2), (x, y) in px of the sample."""
        size = self.sample.image.shape[:2]
        way = to_image(torch.stack(list(positions)), image_size=size, grid=self.points.grid).numpy()
        way[0] = self.sample.handles  # where the person clicked, not its rounding to the grid
        return way


@dataclass(eq=False)
class Job:
    """One edit, or several whose latents have one size and that share forwards.

    Attributes:
        config: the settings that they share.
        edits: those under way.
        pictures: their different source pictures, at the working size.
        caches: of stages between runs, by the stage's name.
        kept: what the editor keeps in memory for the next job.
        autocast: mixed precision of what is optimised: "none", "fp16" or "bf16".
        report: called after each step of each stage.
        seconds: wall time of each stage.
        failed: why an edit ended, by its number.
        denoiser: the guided network for rows of pictures; there while `stages.adapted` lasts.
        adapters: what the cache must know of each picture's network; likewise.
    """

    config: Config
    model: Diffusion
    edits: list[Edit]
    pictures: list[EditSample]
    caches: Mapping[str, cache.StageCache]
    kept: dict[str, dict[str, object]]
    autocast: str
    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[int, UserError] = field(default_factory=dict)
    denoiser: Denoiser = field(init=False)
    adapters: list[dict[str, object]] = field(init=False)

    def drop(self, edit: Edit, reason: UserError) -> None:
        """End an edit.

        Raises:
            NothingLeft: it was the last.
        """
        self.failed[edit.number] = UserError(str(reason))  # without what its traceback holds
        self.edits.remove(edit)
        if not self.edits:
            raise NothingLeft

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Times a stage and reports its steps.

        Args:
            total: steps at most.

        Yields:
            What is told the steps done, and a note.
        """
        start = time.perf_counter()
        self.report(name, 0, total, "")
        try:
            yield lambda done, note: self.report(name, done, total, note)
            if self.model.device.type == "cuda":  # what a GPU still has to do is this stage's
                torch.cuda.synchronize(self.model.device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def model_inputs(self) -> dict[str, object]:
        """Everything about the model as it is now that its outputs depend on, as plain values."""
        model = self.model
        return {
            "model": cache.digest(
                weights=cache.fingerprint(*model.modules, state=model.state),
                prediction=model.prediction_type,
                padding=model.tokenize([""]).tolist(),  # of prompts
                noise=model.scheduler(1).alphas_cumprod.numpy(),
            ),
            "precision": self.precision,
        }

    @property
    def precision(self) -> str:
        """What rounding depends on."""
        return f"{self.config.model.dtype}, autocast {self.autocast}, {self.model.device.type}"

    def condition(self, prompts: Sequence[str]) -> Condition:
        """What prompts tell the network, computed or from the cache.

        Returns:
            A row for each prompt, on the model's device.
        """
        tokens = self.model.tokenize(prompts)
        with torch.no_grad():
            if not self.config.cache.enabled:
                return self.model.condition(prompts)
            weights = cache.fingerprint(*self.model.conditioners, state=self.model.state)
            found: Condition = self.caches["prompt"].get(
                cache.digest(weights=weights, tokens=tokens.tolist(), precision=self.precision, named=True),
                make=lambda: self.model.condition(prompts),
                save=cache.save_tensors,
                load=cache.load_tensors,
            )
        return {name: value.to(self.model.device) for name, value in found.items()}

    @property
    def not_finite(self) -> UserError:
        """What is said of a picture whose latent, or LoRA, is not finite."""
        return UserError(
            "the picture's latent, or its LoRA's loss, is not finite: with model.dtype="
            f"{self.config.model.dtype} and autocast {self.autocast} the model overflows; "
            "use model.dtype=fp32 model.autocast=none"
        )
