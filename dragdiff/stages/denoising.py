"""Denoising with reference-latent control (MasaCtrl, arXiv 2304.08465)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dragdiff.backbones.layout import layers_from
from dragdiff.job import Job
from dragdiff.stages.sources import Step


def controlled_layers(job: Job) -> list[str]:
    """The self-attention layers that look at the source, as the settings name them."""
    control = job.config.control
    return layers_from(job.model.self_attention_layers, control.start_layer) if control.enabled else []


def denoise(job: Job, latents: Tensor, steps: Iterable[Step], *, left: int | None = None) -> Tensor:
    """The edits' clean latents (E, C, h, w), from where they are on.

    Args:
        latents: at the first of the steps.
        steps: what is left of a way down.
        left: how many that are; None = the whole way from the top.
    """
    if left is not None and left < 0:
        raise ValueError(f"left is {left}: the way down has no more steps")
    with job.stage("denoise", job.config.ddim.taken if left is None else left) as advance:
        for done, step in enumerate(steps, 1):
            latents = step.down(latents)
            advance(done, "")
    return latents
