"""Deterministic diffusion steps (DDIM, Song et al. 2021, arXiv 2010.02502) upwards and downwards.

Pure functions on tensors; the model is a callable `predict(latent, t) -> model output`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
Report = Callable[[int], None]


def predict_x0_and_noise(
    latent: Tensor, output: Tensor, *, alpha: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """What the model's output says of the clean latent and of the noise.

    Args:
        latent: noisy latent (B, C, h, w).
        output: model output of the same shape.
        alpha: cumulative alpha of the latent's noise level, scalar tensor in (0, 1].
        prediction_type: "epsilon" or "v_prediction" (Salimans & Ho 2022, arXiv 2202.00512).

    Returns:
        (x0, noise), each of the latent's shape.
    """
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return (latent - noise * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * latent - noise * output, signal * output + noise * latent
    raise ValueError(f"prediction type {prediction_type!r} is neither epsilon nor v_prediction")


def move(latent: Tensor, output: Tensor, *, alpha: Tensor, alpha_to: Tensor, prediction_type: str) -> Tensor:
    """Carry a latent from one noise level to another along the model's output (DDIM, eq. 12 with sigma = 0).

    With `alpha_to` > `alpha` this is a denoising step, otherwise an inversion step.

    Args:
        latent: (B, C, h, w).
        output: the model's for it, likewise.
        alpha, alpha_to: cumulative alphas of the two levels, scalar tensors in (0, 1].
        prediction_type: as of `predict_x0_and_noise`.
    """
    x0, noise = predict_x0_and_noise(latent, output, alpha=alpha, prediction_type=prediction_type)
    return alpha_to.sqrt() * x0 + (1 - alpha_to).sqrt() * noise


def alpha_before(scheduler: Any, index: int) -> Tensor:
    """Cumulative alpha one step below `scheduler.timesteps[index]`; at the end of the schedule, its final alpha."""
    if index + 1 < len(scheduler.timesteps):
        return scheduler.alphas_cumprod[int(scheduler.timesteps[index + 1])]
    return getattr(scheduler, "final_alpha_cumprod", scheduler.alphas_cumprod[0])


@torch.no_grad()
def invert(
    predict: Predict, latent: Tensor, *, scheduler: Any, steps: int, report: Report = lambda step: None
) -> list[Tensor]:
    """DDIM inversion: the clean latent's path up through the last `steps` timesteps of the schedule.

    Args:
        predict: model output for (latent, t).
        latent: clean latent z_0 (B, C, h, w).
        scheduler: with `timesteps` (descending), `alphas_cumprod`, `final_alpha_cumprod` and `config.prediction_type`.
        steps: number of steps, 1 .. len(timesteps).
        report: called with the number of steps done.

    Returns:
        steps + 1 latents, z_0 first; the last one belongs to `timesteps[-steps]`.
    """
    path = [latent]
    first = len(scheduler.timesteps) - steps
    timesteps = scheduler.timesteps.to(latent.device)  # one by one, each would have a GPU wait
    for index in reversed(range(first, len(scheduler.timesteps))):
        t = scheduler.timesteps[index]
        path.append(
            move(
                path[-1],
                predict(path[-1], timesteps[index]),
                alpha=alpha_before(scheduler, index),
                alpha_to=scheduler.alphas_cumprod[int(t)],
                prediction_type=scheduler.config.prediction_type,
            )
        )
        report(len(path) - 1)
    return path


@torch.no_grad()
def sample(
    predict: Predict, latent: Tensor, *, scheduler: Any, start: int, report: Report = lambda step: None
) -> list[Tensor]:
    """Denoise from `scheduler.timesteps[start]` to the end with the scheduler's own step.

    Args:
        latent: (B, C, h, w) at `timesteps[start]`.
        scheduler: a diffusers scheduler on which `set_timesteps` has just been called.

    Returns:
        The latent before each step and the clean one, len(timesteps) - start + 1 tensors.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    path, timesteps = [latent], scheduler.timesteps[start:]
    for t, on_device in zip(timesteps, timesteps.to(latent.device), strict=True):
        path.append(scheduler.step(predict(path[-1], on_device), t, path[-1]).prev_sample)
        report(len(path) - 1)
    return path
