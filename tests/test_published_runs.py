"""Whole runs of methods, by the method's own `run`, against those of the published code on the same stand-in.

A case whose name is not here runs too: files with more cases may be put in the place of those in data/methods.
"""

import re
from dataclasses import dataclass, field

import lightning as L
import numpy as np
import pytest
import torch
import toy
from conftest import METHODS
from torch import Tensor

from dragdiff import Editor, EditResult, EditSample
from dragdiff.callbacks import DragCallback
from dragdiff.config import load_config
from dragdiff.models.point_drag import Drag
from dragdiff.modules import ddim, tracking
from dragdiff.modules.features import FeatureMap

FILES = {name: np.load(METHODS / f"{name}.npz") for name in ("gooddrag", "dragnoise")}
DEVICE = "cpu"  # where the stand-in runs
# In this run's L1 loss a sign flips by rounding: from that update on latents go apart, handles and counts don't.
SIGN_FLIPS = {"gooddrag:early_stop": 31}


def runs(method: str) -> list:
    names = dict.fromkeys(match[1] for key in FILES[method] if (match := re.match(r"run:(\w+):points_xy", key)))
    assert names
    return [pytest.param(name, id=f"{method}:run:{name}") for name in names]


class Recorder(DragCallback):
    """Keeps what each update started from, and its loss."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.handles: list[Tensor] = []
        self.losses: list[tuple[float, float]] = []

    def on_update(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        self.losses.append((float(drag.values["drag/loss"]), float(drag.values["drag/motion"])))

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        if not drag.stop_reason:
            self.values.append(drag.value.detach().clone())
            self.handles.append(drag.points.handles.clone())


@dataclass
class Run:
    """What a method did.

    Attributes:
        latents: that entered each step down, and the clean one.
        tracked: handles after each tracking.
    """

    result: EditResult
    recorder: Recorder
    latents: list[Tensor] = field(default_factory=list)
    tracked: list[Tensor] = field(default_factory=list)


def run(method: str, case: str, patch: pytest.MonkeyPatch, height: int, width: int, *settings: str) -> Run:
    file = FILES[method]
    model, start = toy.Toy(toy.weights(file, case, DEVICE)), torch.from_numpy(file[f"run:{case}:z_t"]).to(DEVICE)
    overrides = [
        *(f"method={method}", "lora.steps=0", "cache.enabled=false", "output.frames_every=0", "model.autocast=none"),
        *(["control.enabled=false"] if method == "gooddrag" else []),
        *("drag.features=[features]", f"{method}.empty_mask=everything", *settings),
    ]
    mask = file[f"run:{case}:mask"]
    sample = EditSample(
        np.zeros((height, width, 3), np.uint8),
        "",
        file[f"run:{case}:points_xy"].reshape(-1, 2, 2),
        mask if mask.any() else None,
    )
    recorder, tracked, moves = Recorder(), [], []
    nearest = tracking.nearest
    step = toy.DDIMScheduler.step

    def track(*args: object, **kwargs: object) -> Tensor:
        tracked.append(nearest(*args, **kwargs))
        return tracked[-1]

    def down(scheduler: object, output: Tensor, t: Tensor, latent: Tensor) -> object:
        moves.append((int(t), latent))
        return step(scheduler, output, t, latent)

    patch.setattr(ddim, "invert", lambda *args, steps, **kwargs: [start] * (steps + 1))
    patch.setattr(tracking, "nearest", track)
    patch.setitem(tracking.TRACKERS, "nearest", track)
    patch.setattr(toy.DDIMScheduler, "step", down)
    result = Editor(load_config(overrides=overrides), model).edit(sample, callbacks=[recorder])
    seen: dict[int, list[Tensor]] = {}
    for t, latent in moves:
        seen.setdefault(t, []).append(latent)
    # of the two that go down from a level, the source's, if any, goes first
    return Run(result, recorder, [latents[-1] for latents in seen.values()] + model.decoded[-1:], tracked)


def near(found: list[Tensor], expected: np.ndarray, tolerance: float) -> None:
    assert len(found) == len(expected)
    if len(expected):
        np.testing.assert_allclose(torch.stack(found).numpy(force=True), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", runs("gooddrag"))
def test_gooddrag(case, monkeypatch):
    trace = {
        key.removeprefix(f"run:{case}:"): FILES["gooddrag"][key] for key in FILES["gooddrag"] if f":{case}:" in key
    }
    height, width, levels, trackings, every, patience, lr, weight, r1, r2, reach = trace["settings"].tolist()
    done = run(
        *("gooddrag", case, monkeypatch, int(height), int(width)),
        *(f"gooddrag.levels={int(levels)}", f"gooddrag.trackings={int(trackings)}", f"gooddrag.updates={int(every)}"),
        *(f"gooddrag.patience={int(patience)}", f"gooddrag.reach={reach}", f"drag.lr={lr}"),
        *(f"drag.mask_weight={weight}", f"drag.motion_radius={int(r1)}", f"drag.tracking_radius={int(r2)}"),
    )
    decided = SIGN_FLIPS.get(f"gooddrag:{case}")
    recorder, updates = done.recorder, len(trace["loss"])
    assert done.result.steps == updates
    near(recorder.handles, trace["handles_used"], 0)
    near(done.tracked, trace["tracked"], 0)
    for number, key in ((0, "loss"), (1, "drag_loss")):
        found = [values[number] for values in recorder.losses]
        assert len(found) == updates
        np.testing.assert_allclose(found[:decided], trace[key][:decided], rtol=1e-4)
    first = trace["latent_before_step"]
    near([value[0] for value in recorder.values[: len(first)]], first, 1e-4)
    if decided is None:
        near([latent[0] for latent in done.latents[:-1]], trace["denoise_in_edit"], 1e-4)
        near(done.latents[-1:], trace["z_0"][None], 1e-3)
    through = done.result.stop_reason != "steps"
    assert through != bool(trace["do_drag"])
    assert (done.result.stop_reason == f"no handle moved in {int(patience)} trackings") == (
        trace["no_change_count"] == patience
    )


@pytest.mark.parametrize("case", runs("dragnoise"))
@pytest.mark.parametrize("end_step", [0, 20])
def test_dragnoise(case, end_step, monkeypatch):
    file = FILES["dragnoise"]
    trace = {key.removeprefix(f"run:{case}:"): file[key] for key in file if f":{case}:" in key}
    height, width, steps, weight, lr = trace["settings_H_W_steps_lam_lr"].tolist()
    done = run(
        *("dragnoise", case, monkeypatch, int(height), int(width), f"drag.steps={int(steps)}"),
        *(f"drag.mask_weight={weight}", f"drag.lr={lr}", f"dragnoise.end_step={end_step}"),
    )
    losses = trace["loss_printed"]
    assert done.result.steps == len(losses)
    np.testing.assert_allclose([loss for loss, _ in done.recorder.losses], losses, rtol=1e-4, atol=1e-6)
    before = trace["h_before_each_step"]
    near([value[0] for value in done.recorder.values], before[: len(done.recorder.values)], 1e-4)
    near(done.tracked, trace["tracked_from_step_1"], 0)
    near(done.latents[-1:], trace[f"denoise_end{end_step}_z0"][None], 1e-3)
    if end_step == 0:
        near([latent[0] for latent in done.latents[1:4]], trace["denoise_end0_first3"], 1e-4)
