"""Diffusion steps: against recorded ones, against diffusers' schedulers, and against a solution in closed form."""

import numpy as np
import pytest
import torch
from conftest import TRACES
from diffusers import DDIMInverseScheduler, DDIMScheduler

from dragdiff.modules import ddim

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PREDICTIONS = ["epsilon", "v_prediction"]


def scheduler(steps, prediction_type="epsilon", kind=DDIMScheduler):
    made = kind(**STABLE_DIFFUSION, prediction_type=prediction_type)
    made.set_timesteps(steps)
    return made


def latent(seed=0):
    return torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


def network(sample, t):
    """Some function of a latent and its timestep."""
    return torch.sin(sample * 1.3 + float(t) / 500) - 0.2 * sample.flip(-1)


@pytest.mark.parametrize("steps", [50, 20, 30, 7])
def test_recorded_steps(steps):
    with np.load(TRACES / "units.npz") as units:
        sample, output, timesteps, down, up = (
            torch.from_numpy(units[name])
            for name in ("st_x", "st_eps", f"st_ts_{steps}", f"st_step_{steps}", f"st_inv_{steps}")
        )
    schedule = scheduler(steps)
    assert torch.equal(schedule.timesteps, timesteps)
    for index, t in enumerate(timesteps.tolist()):
        here, below = schedule.alphas_cumprod[t], ddim.alpha_before(schedule, index)
        moved = ddim.move(sample, output, alpha=here, alpha_to=below, prediction_type="epsilon")
        torch.testing.assert_close(moved, down[index], rtol=0, atol=1e-6)
        moved = ddim.move(sample, output, alpha=below, alpha_to=here, prediction_type="epsilon")
        torch.testing.assert_close(moved, up[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_down_equal_diffusers(prediction_type):
    schedule, sample = scheduler(50, prediction_type), latent()
    for index, t in enumerate(schedule.timesteps):
        output = network(sample, t)
        moved = ddim.move(
            sample,
            output,
            alpha=schedule.alphas_cumprod[int(t)],
            alpha_to=ddim.alpha_before(schedule, index),
            prediction_type=prediction_type,
        )
        expected = schedule.step(output, t, sample)
        torch.testing.assert_close(moved, expected.prev_sample, rtol=0, atol=1e-6)
        x0, _ = ddim.predict_x0_and_noise(
            sample, output, alpha=schedule.alphas_cumprod[int(t)], prediction_type=prediction_type
        )
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [50, 35, 1])
def test_inversion_equals_diffusers(prediction_type, steps):
    inverse = scheduler(50, prediction_type, DDIMInverseScheduler)
    expected = [latent()]
    for t in inverse.timesteps[:steps]:
        expected.append(inverse.step(network(expected[-1], t), t, expected[-1]).prev_sample)
    reported = []
    path = ddim.invert(network, latent(), scheduler=scheduler(50, prediction_type), steps=steps, report=reported.append)
    assert reported == list(range(1, steps + 1))
    assert len(path) == len(expected)
    for actual, wanted in zip(path, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=5e-6)


def test_sampling_is_the_schedulers_from_the_start_given():
    expected, schedule = [latent()], scheduler(50)
    for t in schedule.timesteps[15:]:
        expected.append(schedule.step(network(expected[-1], t), t, expected[-1]).prev_sample)
    reported = []
    path = ddim.sample(network, latent(), scheduler=scheduler(50), start=15, report=reported.append)
    assert reported == list(range(1, 36))
    assert len(path) == 36
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(path, expected, strict=True))


def test_network_sees_the_timesteps_in_order():
    seen = []

    def predict(sample, t):
        seen.append(int(t))
        return network(sample, t)

    top = ddim.invert(predict, latent(), scheduler=scheduler(50), steps=35)[-1]
    assert seen == list(range(1, 682, 20))
    seen.clear()
    ddim.sample(predict, top, scheduler=scheduler(50), start=15)
    assert seen == list(range(681, 0, -20))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_pictures_from_a_gaussian_go_where_theory_says_and_come_back(prediction_type):
    """With pictures from N(mean, spread^2) the perfect network and its paths have a closed form."""
    mean, spread, start = 0.7, 0.5, latent()

    def paths(steps):
        schedule = scheduler(steps, prediction_type)

        def perfect(sample, t):
            alpha = schedule.alphas_cumprod[int(t)]
            noise = (1 - alpha).sqrt() * (sample - alpha.sqrt() * mean) / (alpha * spread**2 + 1 - alpha)
            x0 = (sample - (1 - alpha).sqrt() * noise) / alpha.sqrt()
            return noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x0

        used = round(0.7 * steps)
        top = ddim.invert(perfect, start, scheduler=schedule, steps=used)[-1]
        alpha = schedule.alphas_cumprod[int(schedule.timesteps[-used])]
        lowest = schedule.final_alpha_cumprod
        # along a path of the flow, distance to the mean grows with the standard deviation of what is at that level
        growth = ((alpha * spread**2 + 1 - alpha) / (lowest * spread**2 + 1 - lowest)).sqrt()
        theory = alpha.sqrt() * mean + growth * (start - lowest.sqrt() * mean)
        back = ddim.sample(perfect, top, scheduler=schedule, start=steps - used)[-1]
        return float((top - theory).abs().max()), float((back - start).abs().max())

    coarse, fine = paths(50), paths(500)
    assert max(coarse) < 0.25
    assert fine[0] < coarse[0] / 5  # the error of a first-order method
    assert fine[1] < coarse[1] / 5


def test_one_step_up_and_down_with_the_same_output_is_no_step():
    schedule, sample = scheduler(50), latent()
    low, high = schedule.alphas_cumprod[681], schedule.alphas_cumprod[661]
    for prediction_type in PREDICTIONS:
        x0, noise = ddim.predict_x0_and_noise(sample, latent(1), alpha=low, prediction_type=prediction_type)
        torch.testing.assert_close(low.sqrt() * x0 + (1 - low).sqrt() * noise, sample)
    up = ddim.move(sample, latent(1), alpha=high, alpha_to=low, prediction_type="epsilon")
    down = ddim.move(up, latent(1), alpha=low, alpha_to=high, prediction_type="epsilon")
    torch.testing.assert_close(down, sample)


def test_no_graph_is_kept():
    start = latent().requires_grad_()
    for path in (
        ddim.invert(network, start, scheduler=scheduler(20), steps=2),
        ddim.sample(network, start, scheduler=scheduler(20), start=18),
    ):
        assert not any(step.requires_grad for step in path[1:])


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="sample"):
        ddim.move(latent(), latent(), alpha=torch.tensor(0.5), alpha_to=torch.tensor(0.6), prediction_type="sample")
