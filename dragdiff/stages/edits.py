"""How an edit of a job begins, from what was asked for, and what it comes to."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from dragdiff import cache, output
from dragdiff.callbacks import Frames
from dragdiff.config import check_fit
from dragdiff.job import Edit, EditResult, Job, Request
from dragdiff.methods.method import Method
from dragdiff.modules import points

if TYPE_CHECKING:
    from dragdiff.backbones.diffusion import Diffusion
    from dragdiff.config import Config
    from dragdiff.data.sample import EditSample


def at_working_size(sample: EditSample, config: Config, model: Diffusion) -> EditSample:
    """The sample at the size that is worked on.

    Raises:
        UserError: it gets too small.
    """
    return sample.resized(config.data.max_size or 2 * model.trained_size)


def begin(job: Job, method: Method, number: int, request: Request) -> None:
    """Add an edit to a job, and its picture to the different ones.

    Raises:
        UserError: its sample does not fit the settings or the method.
    """
    sample, config, generate = request.sample, request.config or job.config, job.config.generate
    method.check(sample)
    if generate.enabled:  # its picture comes later
        blank = np.zeros((generate.height, generate.width, 3), np.uint8)
        working = sample = dataclasses.replace(sample, image=blank)
    else:
        working, prompt = at_working_size(sample, config, job.model), method.prompt(config, sample.prompt)
        if prompt != sample.prompt:
            working = dataclasses.replace(working, prompt=prompt)
        if working.image.shape != sample.image.shape and not config.data.max_size:
            warnings.warn(
                f"{sample.name or 'the picture'} has {sample.width}x{sample.height} px and is worked on at "
                f"{working.width}x{working.height}, up to twice what the model was trained on; data.max_size sets "
                "another size",
                stacklevel=2,
            )
    size, device = working.image.shape[:2], job.model.device
    check_fit(config, *size)
    grid = points.grid_size(size, config.drag.grid_scale)
    handles, targets = (
        points.to_grid(torch.tensor(np.asarray(which)), image_size=size, grid=grid).to(device)
        for which in (working.handles, working.targets)
    )
    start = points.Points(handles, handles.clone(), targets, grid)
    _check_points(config, sample, start)
    keep = None
    if working.mask is not None:
        mask, latent_size = torch.from_numpy(np.array(working.mask)), job.model.latent_size(*size)
        keep = 1 - points.mask_to_latent(mask, grid=grid, latent_size=latent_size).to(device)
    keys = [(cache.digest(image=picture.image), picture.prompt) for picture in job.pictures]
    key = (cache.digest(image=working.image), working.prompt)
    if key not in keys:
        job.pictures.append(working)
    edit = Edit(
        number,
        keys.index(key) if key in keys else len(keys),
        request,
        config,
        sample,
        working,
        start,
        keep,
        torch.Generator().manual_seed(config.seed),
    )
    _observe(edit)
    job.edits.append(edit)


def _check_points(config: Config, sample: EditSample, start: points.Points) -> None:
    """Warns of points that are most likely not meant, before any long work."""
    name, limit = sample.name or "the picture", config.drag.stop_distance
    for doubt in sample.doubts():
        warnings.warn(f"{name}: {doubt}", stacklevel=3)
    if len(sample.points) and config.reads("drag.stop_distance") and start.arrived(limit).all():
        warnings.warn(
            f"{name}: all handles are nearer to their targets than drag.stop_distance, here "
            f"{limit * sample.height / start.grid[0]:.3g} px of the picture: nothing will be dragged",
            stacklevel=3,
        )


def _observe(edit: Edit) -> None:
    """Give an edit its observers."""
    request = edit.request
    log_image = getattr(request.logger, "log_image", None)  # of loggers that take pictures

    def show(step: int, preview: np.ndarray | None) -> None:
        """Tell who watches; a preview goes to disk and to the log, with the points on it."""
        if preview is None and request.watch is None:
            return  # most steps: what follows would wait for a GPU
        way = edit.to_px(edit.trajectory.positions)
        if preview is not None:
            drawn = output.frame(preview, edit.sample, way)
            if request.folder is not None:
                folder = request.folder / "frames"
                folder.mkdir(parents=True, exist_ok=True)
                with output.written(folder / f"{step:04d}.png") as file:
                    drawn.save(file)
            if log_image:
                log_image("drag/frame", [drawn], caption=[f"step {step}"])
        if request.watch is not None:
            request.watch(step, way[-1], preview)

    edit.frames = Frames(show, every=edit.config.output.frames_every)
    edit.observers = [edit.trajectory, *request.callbacks, edit.frames]  # type: ignore[list-item]


def fix_unmasked(job: Job) -> None:
    """Let the mask term penalise every change of an edit without a mask, as some published code does."""
    for edit in job.edits:
        if edit.keep is None:
            size = job.model.latent_size(*edit.working.image.shape[:2])
            edit.keep = torch.ones((1, 1, *size), device=job.model.device)


def result(job: Job, edit: Edit, image: np.ndarray) -> EditResult:
    """What an edit of a job has come to.

    Args:
        image: its picture, (H, W, 3) uint8.
    """
    positions, grid, size = edit.trajectory.positions, edit.points.grid, edit.sample.image.shape[:2]
    frames = [
        (step, picture, points.to_image(handles, image_size=size, grid=grid).numpy())
        for step, picture, handles in edit.frames.frames
    ]
    return EditResult(
        sample=edit.sample,
        image=image,
        trajectory=edit.to_px(positions or [edit.points.handles]) if edit.stop_reason else None,
        steps=edit.steps,
        stop_reason=edit.stop_reason,
        frames=frames,
        seconds={stage: seconds / len(job.edits) for stage, seconds in job.seconds.items()},
        peak_memory_mb=peak_memory_mb(job.model.device),
        config=edit.config,
    )


def peak_memory_mb(device: torch.device) -> float:
    """Peak of the device's allocator (CUDA), else of this process's resident memory since it began; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
