"""DragDiffusion (Shi et al., CVPR 2024, arXiv 2306.14435)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dragdiff import stages
from dragdiff.methods.method import DRAG_STEP, Method, Stage, denoising_stages, guidance_rows, origin_stages

if TYPE_CHECKING:
    import numpy as np

    from dragdiff.config import Config
    from dragdiff.job import Job


def run(job: Job) -> list[np.ndarray]:
    """Fine-tune, invert to one level, optimise that latent, denoise with the source's keys and values."""
    with stages.adapted(job, stages.finetune(job)):
        source = stages.source(job)
        with job.stage("drag", max(edit.config.drag.steps for edit in job.edits)) as advance:
            latents = stages.drag(job, source.top, source.latents(), advance=advance)
        return stages.decode(job, stages.denoise(job, latents, source.down(layers=stages.controlled_layers(job))))


def plan(config: Config) -> list[Stage]:
    """The work for one edit."""
    rows = config.drag.steps * guidance_rows(config)
    previews = -(-config.drag.steps // every) * guidance_rows(config) if (every := config.output.frames_every) else 0
    drag = Stage("drag", config.drag.steps, DRAG_STEP * rows + previews, rows + previews)
    return [*origin_stages(config), drag, *denoising_stages(config, steps=config.ddim.taken)]


METHOD = Method(
    name="dragdiffusion",
    title="DragDiffusion: Harnessing Diffusion Models for Interactive Point-based Image Editing",
    paper="2306.14435",
    year=2024,
    summary="Optimises the inverted latent at one timestep so that the features under each handle move to its target.",
    needs=("points",),
    uses=("mask", "prompt"),
    reads=("lora", "ddim", "drag", "control"),
    stages=plan,
    run=run,
    licence="Apache-2.0",
)
