"""The optimisation that moves what is under the handles, for all edits of a job at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dragdiff.callbacks import DragCallback, DragProgress, PointTracking
from dragdiff.errors import UserError
from dragdiff.job import Edit, Job
from dragdiff.models.point_drag import Drag, Forward, MaskTerm, PointDrag
from dragdiff.models.trainer import fit, shared_logger
from dragdiff.models.variables import Bottleneck, Latent, Variable
from dragdiff.modules import ddim, motion, tracking
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.images import to_uint8
from dragdiff.stages.sources import Level, Reference

PREVIEW_LATENT = 32  # previews are decoded from a latent of at most this side


def drag(
    job: Job,
    level: Level,
    start: Tensor | Variable,
    *,
    advance: Callable[[int, str], None],
    reference: Reference | None = None,
    supervision: motion.Supervision | None = None,
    tracker: Callable[[Edit], DragCallback] | None = None,
    steps: int | None = None,
) -> Tensor:
    """Drag the edits that are not through yet, at one level.

    Args:
        start: latents (E, C, h, w) to optimise; or another variable, with a value for each edit.
        advance: reports updates done.
        reference: the sources at this level; None = the first forward, of latents that are still the sources'.
        supervision: None = as the settings name it.
        tracker: makes an edit's tracking; None = before each loss, by the tracker that the settings name.
        steps: updates at most; None = as the settings say.

    Returns:
        The edits' values, (E, ...); those that are through rest. Each edit's points, steps and reason to stop are kept
        in it.
    """
    every = Latent(start) if isinstance(start, Tensor) else start
    values = [value.detach() for value in every.values]
    moving = [number for number, edit in enumerate(job.edits) if not edit.through]
    if not moving:
        return torch.cat(values)
    variable = every if len(moving) == len(job.edits) else every.only(moving)
    edits = [job.edits[number] for number in moving]

    drags = [_drag(job, edit, level, reference, supervision, tracker or _tracking, steps) for edit in edits]
    for edit in edits:
        edit.frames.preview = _preview(job, edit, level)
    module = PointDrag(_forward(job, level, edits), variable, drags, scaling=job.autocast == "fp16")
    observers = {id(callback): callback for drag in drags for callback in drag.callbacks}  # edits may share one
    scales = [edit.sample.height / edit.points.grid[0] for edit in edits]
    if any(not drag.stop_reason for drag in drags):
        fit(
            module,
            steps=max(drag.steps for drag in drags),
            device=job.model.device,
            autocast=job.autocast,
            callbacks=[*observers.values(), DragProgress(advance, drags, scales)],
            logger=shared_logger([edit.request.logger for edit in edits]),
            own_scaling=True,
        )
    module.to(job.model.device)
    for edit, done in zip(edits, drags, strict=True):
        edit.steps, edit.stop_reason = done.step, done.stop_reason or "steps"
    for number, value in zip(moving, variable.values, strict=True):
        values[number] = value.detach()
    return torch.cat(values)


def _forward(job: Job, level: Level, edits: Sequence[Edit]) -> Forward:
    """The model's forward for rows of some edits at a level."""

    def forward(latents: Tensor, rows: Sequence[int], need_output: bool) -> tuple[Tensor | None, Sequence[FeatureMap]]:
        output, maps = job.denoiser.with_features(
            latents,
            level.t,
            [edits[row].picture for row in rows],
            names=job.config.drag.features,
            need_output=need_output,
        )
        return output, [
            FeatureMap([features[place, None] for features in maps], edits[row].points.grid)
            for place, row in enumerate(rows)
        ]

    return forward


@torch.no_grad()
def bottleneck(job: Job, level: Level, latents: Tensor) -> Bottleneck:
    """The output of the network's bottleneck for the edits' latents, to be optimised in their place.

    Args:
        latents: (E, C, h, w), at the level.
    """
    model, pictures = job.model, [edit.picture for edit in job.edits]
    _, (values,) = job.denoiser.with_features(
        latents, level.t, pictures, names=[model.bottleneck], need_output=False, guided=False
    )
    return Bottleneck(values.float(), latents, model.feature_block(model.bottleneck))


def _drag(
    job: Job,
    edit: Edit,
    level: Level,
    reference: Reference | None,
    supervision: motion.Supervision | None,
    tracker: Callable[[Edit], DragCallback],
    steps: int | None,
) -> Drag:
    """The drag of an edit, with its callbacks."""
    settings, row, mask, unedited = edit.config.drag, edit.picture, None, None
    if edit.keep is not None and settings.mask_weight > 0:
        below = None if reference is None or reference.below is None else reference.below[row, None]
        alphas = level.alpha, level.alpha_below
        mask = MaskTerm(edit.keep, settings.mask_weight, *alphas, job.model.prediction_type, below)
    if reference is not None:
        unedited = FeatureMap([features[row, None] for features in reference.features], edit.points.grid)
    return Drag(
        points=edit.points,
        supervision=supervision or motion.SUPERVISIONS[settings.supervision],
        radius=settings.motion_radius,
        stop_distance=settings.stop_distance,
        lr=settings.lr,
        steps=settings.steps if steps is None else steps,
        mask=mask,
        callbacks=[tracker(edit), *edit.observers],
        first=edit.steps,
        reference=unedited,
    )


def _tracking(edit: Edit) -> DragCallback:
    """As DragDiffusion tracks."""
    settings = edit.config.drag
    found = tracking.TRACKERS[settings.tracker]
    return PointTracking(found, radius=settings.tracking_radius)


def _preview(job: Job, edit: Edit, level: Level) -> Callable[[Tensor], np.ndarray | None]:
    """What makes a small picture (h, w, 3) uint8 of a latent at a level, of its prediction of the clean one; none where
    that is not finite."""

    def preview(latent: Tensor) -> np.ndarray | None:
        output = job.denoiser(latent, level.t, [edit.picture])
        x0, _ = ddim.predict_x0_and_noise(latent, output, alpha=level.alpha, prediction_type=job.model.prediction_type)
        shrink = min(1.0, PREVIEW_LATENT / max(x0.shape[2:]))
        x0 = F.interpolate(x0, scale_factor=shrink, mode="area") if shrink < 1 else x0
        if not torch.isfinite(x0).all():
            return None
        try:
            return to_uint8(job.model.decode(x0) / 2 + 0.5)
        except UserError:  # the edit's own picture says it
            return None

    return preview
