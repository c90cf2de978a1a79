"""Each stage of each method on a GPU that is not there: what was left on the CPU, or has another precision, raises."""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import fake_gpu
import numpy as np
import pytest
import torch

from dragdiff import Editor, EditResult, EditSample, Request
from dragdiff.backbones.loading import load_backbone
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import Config, load_config
from dragdiff.methods import NAMES
from dragdiff.metrics.correspondence import MeanDistance
from dragdiff.modules import motion

SIDE = 64


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable]:
    """Calls a function in a process that has the device."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=fake_gpu.register) as pool:
        yield lambda function, *args: pool.submit(told, function, *args).result()


def told(function: Callable, *args: object) -> object:
    """What a function returns; its exceptions as text, as some of torch's can't be sent to another process."""
    try:
        return function(*args)
    except Exception:
        raise AssertionError(traceback.format_exc()) from None


def settings(model: Path, *more: str) -> Config:
    short = ["ddim.steps=3", "ddim.strength=0.67", "drag.steps=2", "lora.steps=0", "lora.batch_size=1"]
    alone = ["cache.enabled=false", "cache.reference_mb=0", f"lora.resolution={SIDE}", "model.device=cpu"]
    return load_config(overrides=[f"model.path={model}", *short, *alone, *more])


@contextmanager
def there(config: Config) -> Iterator[StableDiffusion]:
    """The settings' model on the device, while that can be used."""
    pipeline = load_backbone(config.model).pipeline
    with fake_gpu.fake_gpu():
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.to(fake_gpu.DEVICE)
        yield StableDiffusion(pipeline)


def sample(number: int = 0) -> EditSample:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[8:-8, 8:-8] = True
    picture = np.full((SIDE, SIDE, 3), number, np.uint8)
    return EditSample(picture, "a", [[[10, 20], [30, 20]], [[40, 40], [40, 30]]], mask)


def edited(model: Path, count: int, *more: str) -> list[EditResult]:
    config = settings(model, *more)
    with there(config) as backbone:
        return Editor(config, backbone).edit_batch([Request(sample(number)) for number in range(count)])


def edited_with_the_mask_on_the_cpu(model: Path) -> None:
    term = motion.mask_term
    with mock.patch.object(motion, "mask_term", lambda *latents, keep: term(*latents, keep=keep.cpu())):
        edited(model, 1)


def matched(model: Path) -> tuple[float, bool]:
    """The mean distance of an edit, and whether its features were on the device."""
    config = settings(model)
    with there(config) as backbone:
        kind = {"t": 261, "block": "up_blocks.1", "ensemble": 2, "variant": "mask", "seed": 0, "ordered": False}
        metric = MeanDistance(backbone, **kind)
        (features,) = metric.features(sample(), sample(1).image)[1].maps
        metric.update(sample(), np.array(sample(1).image))
        return float(metric.compute()), features.device == torch.device(fake_gpu.DEVICE)


def check(results: list[EditResult], steps: int) -> None:
    for result in results:
        assert isinstance(result, EditResult), result
        assert result.image.shape == (SIDE, SIDE, 3)
        assert (result.image == 1).all()  # as is all that is read from the device
        assert result.steps == steps


METHODS = {
    "dragdiffusion": ([], 2),
    "dragnoise": ([], 2),
    "fastdrag": (["fastdrag.blend=nearest", "fastdrag.fill=noise"], 0),
    "gooddrag": (["gooddrag.levels=1", "gooddrag.trackings=1", "gooddrag.updates=2"], 2),
}


def test_no_method_is_left_out():
    assert tuple(METHODS) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_edit_in_half_precision(method, elsewhere, tiny_pipeline):
    more, steps = METHODS[method]
    check(elsewhere(edited, tiny_pipeline, 1, f"method={method}", "model.dtype=fp16", *more), steps)


@pytest.mark.slow
def test_batch_whose_pictures_have_loras_of_their_own(elsewhere, tiny_pipeline):
    check(elsewhere(edited, tiny_pipeline, 2, "lora.steps=2"), 2)


@pytest.mark.slow
def test_generated_picture_with_guidance(elsewhere, tiny_pipeline):
    size = [f"generate.height={SIDE}", f"generate.width={SIDE}"]
    more = ["generate.enabled=true", "generate.guidance=5", "generate.freeu=true", "generate.scheduler=dpm++2m", *size]
    check(elsewhere(edited, tiny_pipeline, 1, *more), 2)


@pytest.mark.slow
def test_mean_distance(elsewhere, tiny_pipeline):
    distance, was_there = elsewhere(matched, tiny_pipeline)
    assert was_there
    # where all features are equal, the first place of the mask is nearest
    assert distance == pytest.approx((np.hypot(30 - 8, 20 - 8) + np.hypot(40 - 8, 30 - 8)) / 2)


@pytest.mark.slow
def test_a_tensor_left_on_the_cpu_raises(elsewhere, tiny_pipeline):
    with pytest.raises(AssertionError, match="to be on the same device"):
        elsewhere(edited_with_the_mask_on_the_cpu, tiny_pipeline)
