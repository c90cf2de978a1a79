"""DragNoise: Drag Your Noise (Liu et al., CVPR 2024, arXiv 2404.01050)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dragdiff import modules, stages
from dragdiff.methods.method import DECODING, DRAG_STEP, Method, Stage, guidance_rows, origin_stages
from dragdiff.options import at_least, one_of, option

if TYPE_CHECKING:
    import numpy as np

    from dragdiff.config import Config
    from dragdiff.job import Job


@dataclass
class DragNoiseSettings:
    """What DragNoise alone has."""

    end_step: int = option(
        0, "last steps of the schedule in which the network is left alone (the code: 0; the paper: some)", at_least(0)
    )
    empty_mask: str = option(
        "nothing",
        "what the mask term penalises where there is no mask: nothing, or (the published code) every change",
        one_of("nothing", "everything"),
    )


def run(job: Job) -> list[np.ndarray]:
    """Optimise what the network's bottleneck gives at the top level, and let it give that in the steps below, too."""
    if job.config.own.empty_mask == "everything":
        stages.fix_unmasked(job)
    with stages.adapted(job, stages.finetune(job)):
        source = stages.source(job)
        start = stages.bottleneck(job, source.top, source.latents())
        with job.stage("drag", max(edit.config.drag.steps for edit in job.edits)) as advance:
            values = stages.drag(job, source.top, start, advance=advance)
        block = job.model.feature_block(job.model.bottleneck)
        latents, left = source.latents(), job.config.ddim.taken - job.config.own.end_step
        with job.stage("denoise", job.config.ddim.taken) as advance:
            for done, step in enumerate(source.down(), 1):
                with modules.features.replaced(block, values) if done <= left else nullcontext():
                    latents = step.down(latents)
                advance(done, "")
        return stages.decode(job, latents)


def plan(config: Config) -> list[Stage]:
    """The work for one edit."""
    branches, taken = guidance_rows(config), config.ddim.taken
    updates = config.drag.steps * branches
    previews = branches * (-(-config.drag.steps // every)) if (every := config.output.frames_every) else 0
    # the first forward gives the bottleneck's start
    drag = Stage("drag", config.drag.steps, DRAG_STEP * updates + previews, updates + previews + 1)
    down = Stage("denoise", taken, taken * branches, taken * branches)
    return [*origin_stages(config), drag, down, Stage("decode", 1, DECODING, 0)]


METHOD = Method(
    name="dragnoise",
    title="Drag Your Noise: Interactive Point-based Editing via Diffusion Semantic Propagation",
    paper="2404.01050",
    year=2024,
    summary="Optimises the output of the network's bottleneck at one timestep and keeps it in the steps below.",
    needs=("points",),
    uses=("mask", "prompt"),
    reads=("lora", "ddim", "drag"),
    published={"drag.lr": 0.02, "drag.mask_weight": 0.2, "lora.steps": 200, "lora.lr": 2e-4},
    settings=DragNoiseSettings,
    stages=plan,
    run=run,
    licence="Apache-2.0",
)
