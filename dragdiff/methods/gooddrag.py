"""GoodDrag (Zhang et al., ICLR 2025, arXiv 2404.07206)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dragdiff import modules, stages
from dragdiff.methods.method import DRAG_STEP, Method, Stage, denoising_stages, guidance_rows, origin_stages
from dragdiff.options import at_least, one_of, option, within

if TYPE_CHECKING:
    import numpy as np

    from dragdiff.callbacks import DragCallback
    from dragdiff.config import Config
    from dragdiff.job import Edit, Job


@dataclass
class GoodDragSettings:
    """What GoodDrag alone has."""

    levels: int = option(7, "denoising levels at which the latent is dragged, from the top on", within(1, 999))
    trackings: int = option(10, "trackings at each of them", within(1, 10_000))
    updates: int = option(3, "J: updates of the latent between two trackings", within(1, 10_000))
    patience: int = option(
        5, "trackings in a row, over all levels, that move no handle: then the drag is over (the demo: 10)", at_least(1)
    )
    reach: float = option(
        4.0, "beta: how far ahead of a handle its patch is pulled, grid px", within(0, 1000, low_open=True)
    )
    empty_mask: str = option(
        "nothing",
        "what the mask term penalises where there is no mask: nothing, or (the published code) every change",
        one_of("nothing", "everything"),
    )
    empty_prompt: bool = option(
        True, "real pictures are worked on with an empty prompt, as published, unless `prompt` is given"
    )


def run(job: Job) -> list[np.ndarray]:
    """Alternate dragging and denoising: at each of the first levels some updates, then one step down."""
    settings: GoodDragSettings = job.config.own
    layers, features = stages.controlled_layers(job), job.config.drag.features
    supervision = partial(modules.motion.to_initial, reach=settings.reach)
    most, taken = settings.trackings * settings.updates, job.config.ddim.taken
    levels = min(settings.levels, taken)
    if job.config.own.empty_mask == "everything":
        stages.fix_unmasked(job)
    with stages.adapted(job, stages.finetune(job)):
        source = stages.source(job)
        latents, way = source.latents(), source.down(layers=layers, features=features)
        trackers = {edit.number: _tracker(edit, settings) for edit in job.edits}
        left = taken
        with job.stage("drag", levels * most) as advance:
            while left > taken - levels and not all(edit.through for edit in job.edits):
                step = next(way)
                controlled = [edit.through for edit in job.edits]  # from the first level without a drag on
                latents = stages.drag(
                    job,
                    step.level,
                    latents,
                    advance=advance,
                    reference=step.reference,
                    supervision=supervision,
                    tracker=lambda edit: trackers[edit.number],
                    steps=most,
                )
                latents = step.down(latents, controlled=controlled)
                left -= 1
        return stages.decode(job, stages.denoise(job, latents, way, left=left))


def _tracker(edit: Edit, settings: GoodDragSettings) -> DragCallback:
    from dragdiff.callbacks import PeriodicTracking

    return PeriodicTracking(
        modules.tracking.nearest,
        radius=edit.config.drag.tracking_radius,
        every=settings.updates,
        patience=settings.patience,
    )


def plan(config: Config) -> list[Stage]:
    """The work for one edit."""
    settings: GoodDragSettings = config.own
    levels, taken, branches = min(settings.levels, config.ddim.taken), config.ddim.taken, guidance_rows(config)
    updates = levels * settings.trackings * settings.updates
    # the source and the edited row go down while it is dragged; a level may end with a forward without an update
    calls = branches * (updates + 3 * levels)
    previews = branches * (-(-updates // every)) if (every := config.output.frames_every) else 0
    drag = Stage("drag", updates, DRAG_STEP * branches * updates + branches * 3 * levels + previews, calls + previews)
    return [*origin_stages(config), drag, *denoising_stages(config, steps=taken, shared=False)]


METHOD = Method(
    name="gooddrag",
    title="GoodDrag: Towards Good Practices for Drag Editing with Diffusion Models",
    paper="2404.07206",
    year=2025,
    summary="Alternates dragging and denoising over several timesteps, pulling towards the features of the start.",
    needs=("points",),
    uses=("mask", "prompt"),
    reads=(
        *("lora", "ddim", "control"),
        *(f"drag.{key}" for key in ("lr", "features", "grid_scale", "motion_radius", "tracking_radius")),
        *(f"drag.{key}" for key in ("stop_distance", "mask_weight")),
    ),
    published={
        "ddim.strength": 0.75,
        "drag.lr": 0.02,
        "drag.motion_radius": 4,
        "drag.tracking_radius": 12,
        "drag.mask_weight": 0.1,
        "lora.steps": 70,
    },
    settings=GoodDragSettings,
    prompt=lambda config, prompt: prompt if config.prompt or not config.own.empty_prompt else "",
    stages=plan,
    run=run,
    note="its authors used the autoencoder stabilityai/sd-vae-ft-mse: model.vae=stabilityai/sd-vae-ft-mse",
    licence="none stated",
)
