"""FastDrag (Zhao et al., NeurIPS 2024, arXiv 2405.15769)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dragdiff import modules, stages
from dragdiff.methods.method import Method, Stage, denoising_stages, origin_stages
from dragdiff.options import one_of, option

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dragdiff.config import Config
    from dragdiff.job import Edit, Job


@dataclass
class FastDragSettings:
    """What FastDrag alone has."""

    blend: str = option(
        "average",
        "where several pairs pull: their weighted mean; or the nearest handle alone (LazyDrag, arXiv 2509.12203)",
        one_of("average", "nearest"),
    )
    fill: str = option(
        "neighbours",
        "what comes into places that content has left: its nearest neighbours; noise; or it is kept there, too",
        one_of("neighbours", "noise", "keep"),
    )


def run(job: Job) -> list[np.ndarray]:
    """Warp the inverted latent once, and denoise it with the keys and values of the inversion."""
    layers = stages.controlled_layers(job)
    with stages.adapted(job, stages.finetune(job)):
        source = stages.source(job, states=layers)
        with job.stage("drag", 1) as advance:
            latents = source.latents()
            for row, edit in enumerate(job.edits):
                latents[row] = warped(job, edit, latents[row])
            advance(1, "")
        return stages.decode(job, stages.denoise(job, latents, source.down(layers=layers, way="up")))


def warped(job: Job, edit: Edit, latent: Tensor) -> Tensor:
    """A latent (C, h, w) with its content moved as the edit's points say."""
    warp, settings, points = modules.warp, job.config.own, edit.points
    if edit.working.mask is None:
        warnings.warn("without a mask the whole picture is stretched: paint what should move with it", stacklevel=2)
    size = job.model.latent_size(*edit.working.image.shape[:2])
    region = warp.region_of(edit.working.mask, grid=points.grid, latent_size=size).to(latent.device)
    unit = 1 / (job.model.latent_stride * edit.config.drag.grid_scale)  # latent px per grid px
    displacement = warp.stretch(points.initial * unit, points.targets * unit, region, blend=settings.blend)
    moved, holes = warp.relocate(latent, region, displacement)
    return warp.fill(moved, holes, mode=settings.fill, original=latent, generator=edit.random)


def plan(config: Config) -> list[Stage]:
    """The work for one edit."""
    taken = config.ddim.taken
    # the inversion notes what the way down looks at; where it comes from the cache, that is computed again
    return [*origin_stages(config), Stage("drag", 1, 0.1, 0), *denoising_stages(config, steps=taken)]


METHOD = Method(
    name="fastdrag",
    title="FastDrag: Manipulate Anything in One Step",
    paper="2405.15769",
    year=2024,
    summary="Stretches the inverted latent once, without optimisation, and fills what is left behind.",
    needs=("points",),
    uses=("mask", "prompt"),
    reads=("lora", "ddim", "control", "drag.grid_scale"),
    published={"ddim.steps": 10, "lora.steps": 0, "control.start_layer": "up_blocks.1"},
    settings=FastDragSettings,
    stages=plan,
    run=run,
    draws=True,
    note="its authors sampled with the UNet of SimianLuo/LCM_Dreamshaper_v7: model.unet=SimianLuo/LCM_Dreamshaper_v7",
    licence="Apache-2.0 (of what it has from DragDiffusion)",
)
