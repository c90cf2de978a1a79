"""The stand-in for a UNet gives what the recorded runs of whole methods had from it."""

import re

import numpy as np
import pytest
import torch
import toy
from conftest import METHODS

GOODDRAG, DRAGNOISE = (np.load(METHODS / f"{name}.npz") for name in ("gooddrag", "dragnoise"))


def cases(file, method, pattern):
    found = [match.groups() for key in file if (match := re.fullmatch(pattern, key))]
    assert found
    return [pytest.param(*groups, id=":".join((method, "run", *groups))) for groups in found]


@pytest.mark.parametrize("case", cases(GOODDRAG, "gooddrag", r"run:(\w+):denoise_in_edit"))
def test_denoising_of_gooddrag(case):
    """Each step down, from where no drag comes between."""
    weights, scheduler = toy.weights(GOODDRAG, case), toy.schedule()
    first = int(GOODDRAG[f"run:{case}:control_from_denoise_index"][0])
    latents, times = (torch.from_numpy(GOODDRAG[f"run:{case}:{key}"]) for key in ("denoise_in_edit", "den_t"))
    path = [*latents, torch.from_numpy(GOODDRAG[f"run:{case}:z_0"])[0]]
    for step in range(first, len(times)):
        index = len(scheduler.timesteps) - len(times) + step
        assert scheduler.timesteps[index] == times[step]
        output = toy.noise(weights, path[step][None], times[step], weights["emb"])
        lower = toy.step_down(scheduler, path[step][None], output, index=index)
        torch.testing.assert_close(lower[0], path[step + 1].float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", cases(DRAGNOISE, "dragnoise", r"run:(\w+):h_initial"))
def test_mid_block_of_dragnoise(case):
    weights, latent = toy.weights(DRAGNOISE, case), torch.from_numpy(DRAGNOISE[f"run:{case}:z_t"])
    mid = toy.mid_block(weights, latent)
    torch.testing.assert_close(mid, torch.from_numpy(DRAGNOISE[f"run:{case}:h_initial"]))
    own, replaced, other = (
        toy.features(weights, latent, weights["emb"], grid=(64, 72), mid=given).at(torch.tensor([[25, 25]]))
        for given in (None, mid, mid + 1)
    )
    assert torch.equal(own, replaced) and not torch.equal(own, other)


@pytest.mark.parametrize(("case", "end"), cases(DRAGNOISE, "dragnoise", r"run:(\w+):denoise_end(\d+)_z0"))
def test_denoising_of_dragnoise(case, end):
    weights, scheduler = toy.weights(DRAGNOISE, case), toy.schedule()
    latent, mid = (torch.from_numpy(DRAGNOISE[f"run:{case}:{key}"]) for key in ("z_t", "h_final"))
    start = scheduler.timesteps.tolist().index(int(DRAGNOISE[f"run:{case}:t"]))
    for index in range(start, 50):
        given = mid if index < 50 - int(end) else None
        output = toy.noise(weights, latent, scheduler.timesteps[index], weights["emb"], mid=given)
        latent = toy.step_down(scheduler, latent, output, index=index)
    expected = torch.from_numpy(DRAGNOISE[f"run:{case}:denoise_end{end}_z0"])
    torch.testing.assert_close(latent, expected, rtol=0, atol=2e-5)
