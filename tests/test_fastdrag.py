"""FastDrag's run against its steps written out: loops over pixels, keys and values by hooks on the projections."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from dragdiff import Editor, EditSample
from dragdiff.backbones.diffusion import Diffusion
from dragdiff.backbones.loading import load_backbone
from dragdiff.config import Config, load_config
from dragdiff.data.scenes import make_scene
from dragdiff.modules.images import to_tensor, to_uint8

SETTINGS = ["method=fastdrag", "model.device=cpu", "cache.enabled=false"]


@pytest.fixture(scope="module")
def embedded() -> Diffusion:
    return load_backbone(load_config(["embedded"], ["model.device=cpu"]).model)


@contextmanager
def projections(model: Diffusion, layers: list[str], memory: dict, *, record: bool) -> Iterator[None]:
    """Note what keys and values are, or give those that were noted."""
    handles = []

    def hook(name: str):
        def call(module: object, inputs: object, output: Tensor) -> Tensor:
            if record:
                memory[name] = output
            return output if record else memory[name].expand_as(output)

        return call

    for layer in layers:
        for part in ("to_k", "to_v"):
            module = model.network.get_submodule(f"{layer}.{part}")
            handles.append(module.register_forward_hook(hook(f"{layer}.{part}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def written_out(model: Diffusion, config: Config, sample: EditSample) -> np.ndarray:
    """The edited picture (H, W, 3) uint8; the sample has a mask and one pair."""
    model.network.eval()
    scheduler = model.scheduler(config.ddim.steps)
    times = [int(t) for t in scheduler.timesteps[-config.ddim.taken :]]
    alphas = [float(scheduler.alphas_cumprod[t]) for t in times] + [float(scheduler.final_alpha_cumprod)]
    condition = model.condition([sample.prompt])
    layers = [name for name in model.self_attention_layers if name.startswith("up_blocks")]
    latent = model.encode(to_tensor(sample.image))[0]
    kept: dict[int, dict] = {}
    for step in reversed(range(len(times))):
        kept[step] = {}
        with projections(model, layers, kept[step], record=True):
            eps = model.predict(latent, torch.tensor(times[step]), condition)
        here, up = alphas[step + 1], alphas[step]
        x0 = (latent - math.sqrt(1 - here) * eps) / math.sqrt(here)
        latent = math.sqrt(up) * x0 + math.sqrt(1 - up) * eps
    latent = warped(latent[0], model, config, sample)[None]
    for step in range(len(times)):
        with projections(model, layers, kept[step], record=False):
            eps = model.predict(latent, torch.tensor(times[step]), condition)
        here, down = alphas[step], alphas[step + 1]
        x0 = (latent - math.sqrt(1 - here) * eps) / math.sqrt(here)
        latent = math.sqrt(down) * x0 + math.sqrt(1 - down) * eps
    return to_uint8(model.decode(latent) / 2 + 0.5)


def warped(latent: Tensor, model: Diffusion, config: Config, sample: EditSample) -> Tensor:
    """Stretched and filled, pixel by pixel; the feature grid is the picture itself."""
    assert config.drag.grid_scale == 1
    stride, (_, height, width) = model.latent_stride, latent.shape
    mask = np.asarray(sample.mask)
    ((handle, target),) = (np.round(pair[:, ::-1].astype(np.float64)) / stride for pair in sample.points)
    region = [
        (r, c)
        for r in range(height)
        for c in range(width)
        if mask[stride * r + stride // 2 - 1 : stride * r + stride // 2 + 1][
            :, stride * c + stride // 2 - 1 : stride * c + stride // 2 + 1
        ].any()
    ]
    low, high = np.min(region, axis=0), np.max(region, axis=0)
    centre = (low + high) / 2
    radius = np.linalg.norm(centre - low + 1e-6)
    moved, claimed = latent.clone(), set()
    for r, c in region:
        moved[:, r, c] = 0
    for r, c in region:
        offset = np.array([r, c]) - handle
        length = np.linalg.norm(offset)
        if length:
            along = offset @ (handle - centre) / length
            ray = max(math.sqrt(radius**2 - ((handle - centre) ** 2).sum() + along**2) - along, 1e-6)
        share = min(abs(length - ray) / ray, 1) if length else 1
        to = np.round(np.array([r, c]) + share * (target - handle)).astype(int)
        to = (int(np.clip(to[0], 0, height - 1)), int(np.clip(to[1], 0, width - 1)))
        if to not in claimed:
            claimed.add(to)
            moved[:, to[0], to[1]] = latent[:, r, c]
    holes = {place for place in region if place not in claimed}
    for r, c in sorted(holes):
        total, value = 0.0, torch.zeros(len(latent))
        for down, across in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            for distance in range(1, max(height, width)):
                place = (r + down * distance, c + across * distance)
                if not (0 <= place[0] < height and 0 <= place[1] < width):
                    break
                if place not in holes:
                    value, total = value + moved[:, place[0], place[1]] / distance, total + 1 / distance
                    break
        if total:
            moved[:, r, c] = value / total
            holes.discard((r, c))
    return moved


@pytest.mark.parametrize(("kind", "seed"), [("sun", 3), ("tower", 4)])
def test_its_run_is_its_steps(embedded, kind, seed):
    config = load_config(["embedded"], [*SETTINGS, "drag.grid_scale=1"])
    sample = make_scene(kind, seed).sample
    found = Editor(config, embedded).edit(sample).image.astype(int)
    expected = written_out(embedded, config, sample).astype(int)
    assert np.abs(expected - np.asarray(sample.image).astype(int)).max() > 40  # something has moved
    assert np.abs(found - expected).max() <= 1


def test_from_the_cache_it_is_the_same(embedded, tmp_path):
    """Then the inversion's keys and values are computed again."""
    settings = ["method=fastdrag", "model.device=cpu", f"cache.folder={tmp_path}"]
    editor, sample = Editor(load_config(["embedded"], settings), embedded), make_scene("sun", 5).sample
    reports: list[tuple[str, str]] = []
    first = editor.edit(sample)
    editor.report = lambda stage, done, total, note: reports.append((stage, note))
    assert np.array_equal(editor.edit(sample).image, first.image)
    assert ("inversion", "from the cache") in reports


@pytest.mark.parametrize("changed", ["fastdrag.fill=noise", "fastdrag.fill=keep", "fastdrag.blend=nearest"])
def test_its_settings_change_the_picture(embedded, changed):
    sample = make_scene("tower", 6).sample
    (x, y), _ = sample.points[0]
    pairs = np.concatenate([sample.points, [[[32 + (32 - x) / 3, y], [32, y + 4]]]])
    sample = EditSample(sample.image, sample.prompt, pairs, sample.mask)
    plain, other = (
        Editor(load_config(["embedded"], [*SETTINGS, *more]), embedded).edit(sample) for more in ([], [changed])
    )
    assert (np.abs(plain.image.astype(int) - other.image.astype(int)) > 8).mean() > 0.005
    assert plain.trajectory is None and plain.distance_after is None and plain.steps == 0


def test_without_a_mask_it_says_so(embedded):
    sample = make_scene("sun", 7).sample
    sample = EditSample(sample.image, sample.prompt, sample.points)
    with pytest.warns(UserWarning, match="whole picture is stretched"):
        Editor(load_config(["embedded"], SETTINGS), embedded).edit(sample)
