"""How often the host looks at the device changes nothing; between the looks it reads nothing from it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from test_batch import QUICK, SAMPLES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dragdiff import Editor
from dragdiff.callbacks import DragCallback, PointTracking, Progress, Trajectory
from dragdiff.config import load_config
from dragdiff.edits import Request
from dragdiff.models.drag import Drag, LatentDrag, MaskTerm
from dragdiff.models.lora import Lesson, LoRAFinetune, seeded_noise
from dragdiff.models.trainer import Each, Recording, fit
from dragdiff.modules import motion, tracking
from dragdiff.modules.features import FeatureMap

GRID = (16, 16)


class Scene(nn.Module):
    """A network small enough to see through: its features are a blurred latent, each row by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        with torch.no_grad():
            self.layer.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
            self.layer.bias.zero_()
        self.rows: list[int] = []

    def forward(self, latents: Tensor, numbers: Any, need_output: bool) -> tuple[Tensor | None, list[FeatureMap]]:
        self.rows.append(len(numbers))
        outputs = [self.layer(latent) for latent in latents.split(1)]  # no rounding by the size of the batch
        return torch.cat(outputs) if need_output else None, [FeatureMap([features], GRID) for features in outputs]


def drag(
    seed: int,
    *,
    lr: float = 0.05,
    steps: int = 12,
    shift: float = 6.0,
    stop_distance: float = 1.5,
    tracker: tracking.Tracker = tracking.nearest,
    masked: bool = False,
    also: Sequence[L.Callback] = (),
    device: str = "cpu",
) -> Drag:
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros((1, 1, 8, 8), device=device)
    keep[..., :2] = 1
    handles = torch.tensor([[4.0, 4.0], [15.0, 9.0]])
    return Drag(
        latent=latent.to(device),
        handles=handles,
        targets=(handles + torch.tensor([-shift, shift])).clamp(0, 15),
        supervision=motion.one_step,
        radius=1,
        stop_distance=stop_distance,
        lr=lr,
        steps=steps,
        mask=MaskTerm(keep, 0.1, torch.tensor(0.3), torch.tensor(0.4), "epsilon") if masked else None,
        callbacks=[PointTracking(tracker, radius=3), Trajectory(), *also],
    )


def walk(features: FeatureMap, *, templates: Tensor, handles: Tensor, radius: int) -> Tensor:
    """A tracker that arrives whatever the features are."""
    return handles + torch.tensor([-1.0, 1.0], device=handles.device)


def mixed() -> list[Drag]:
    """Arrived at the start and after some steps, diverged at once and later, out of steps; with and without a mask."""
    return [
        drag(0, shift=0.0),
        drag(1, tracker=walk, stop_distance=3.5),
        drag(2, lr=3000.0, masked=True),
        drag(3, lr=300.0),
        drag(4, masked=True),
        drag(5, steps=9),
        drag(6, steps=0),
        drag(7, tracker=walk, stop_distance=1.5, masked=True),
    ]


def run(drags: list[Drag], look_every: int) -> tuple[list[tuple[Any, ...]], Scene]:
    loggers, scene = [Recording() for _ in drags], Scene()
    fit(
        LatentDrag(scene, drags, look_every=look_every),
        steps=max(drag.steps for drag in drags),
        device=torch.device("cpu"),
        autocast="none",
        callbacks=[callback for drag in drags for callback in drag.callbacks],
        logger=Each(loggers) if len(drags) > 1 else loggers[0],
    )
    found = []
    for one, logger in zip(drags, loggers, strict=True):
        positions = next(callback for callback in one.callbacks if isinstance(callback, Trajectory)).positions
        logged = [args for name, args, _ in logger._calls if name == "log_metrics"]
        found.append(
            (one.latent.detach(), one.handles, positions, one.steps_done, one.seen, one.stop_reason, repr(logged))
        )
    return found, scene


def assert_equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len(one[2]) == len(other[2]) and all(map(torch.equal, one[2], other[2]))
    assert one[3:] == other[3:]


@pytest.mark.parametrize("look_every", [2, 3, 8, 100])
def test_a_batch_comes_to_the_same(look_every):
    expected, each_step = run(mixed(), 1)
    reasons = [found[5].partition(" (")[0] for found in expected]
    assert [reason.partition(" at")[0] for reason in reasons] == [
        *("reached", "reached", "diverged", "diverged", "steps", "steps", "steps", "reached")
    ]
    assert [found[3] for found in expected][:2] == [0, 4] and expected[7][3] == 5
    found, seldom = run(mixed(), look_every)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    if look_every > 2:  # else this would be about nothing
        assert sum(seldom.rows) > sum(each_step.rows)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 7])  # without the one that has no step
def test_one_comes_to_the_same(number):
    (expected,), _ = run([mixed()[number]], 1)
    for look_every in (3, 8):
        (found,), _ = run([mixed()[number]], look_every)
        assert_equal(found, expected)


def test_values_past_the_end_are_not_logged():
    (found,), scene = run([drag(1, tracker=walk, stop_distance=3.5)], 8)
    assert scene.rows == [1] * 8  # four of them for nothing
    assert found[3] == 4 and len(found[2]) == 5
    assert found[6].count("drag/loss") == 4 and found[6].count("'drag/distance'") == 5


class Reader(DragCallback):
    """Written by a user: reads what it likes."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, float]] = []
        self.after: list[tuple[int, str]] = []

    def on_latent(self, trainer: L.Trainer, drag: Drag) -> None:
        drag.log("size", drag.latent.abs().max())

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        self.drag = drag
        self.seen.append((drag.steps_done, drag.stop_reason, float(drag.handles.sum())))

    def on_train_batch_end(self, trainer: L.Trainer, module: LatentDrag, *_: object) -> None:
        self.after.append((self.drag.steps_done, self.drag.stop_reason))
        assert "drag/distance" in trainer.callback_metrics


class Stopper(DragCallback):
    """Ends the drag from the host, and looks at nothing."""

    def reads(self, drag: Drag) -> bool:
        return False

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        if drag.steps_done == 6:
            drag.stop("enough")


@pytest.mark.parametrize(("stop_distance", "steps", "reason"), [(3.5, 4, "reached"), (0.0, 6, "enough")])
def test_an_end_from_the_host_between_looks(stop_distance, steps, reason):
    (found,), _ = run([drag(1, tracker=walk, stop_distance=stop_distance, also=[Stopper()])], 8)
    assert (found[3], found[5]) == (steps, reason)
    assert found[6].count("drag/loss") == steps and len(found[2]) == steps + 1


def test_a_callback_of_ones_own_sees_each_step_as_it_is():
    reader = Reader()
    (found,), scene = run([drag(1, tracker=walk, stop_distance=3.5, also=[reader])], 8)
    assert scene.rows == [1] * 5
    assert found[6].count("'size'") == 5
    assert [seen[:2] for seen in reader.seen] == [(0, ""), (1, ""), (2, ""), (3, ""), (4, "reached")]
    assert reader.after == [(1, ""), (2, ""), (3, ""), (4, ""), (4, "reached")]


@pytest.mark.parametrize("watched", [False, True])
def test_edits_are_the_same(backbone, monkeypatch, watched):
    """With previews, which are made of steps before the end only, and logs."""
    settings = [
        load_config(overrides=[*QUICK, "lora.steps=0", "output.frames_every=3", *more])
        for more in (["drag.steps=7"], ["drag.lr=500", "drag.steps=6"], ["drag.steps=7"])
    ]
    found = []
    for look_every in (1, 3, 8):
        monkeypatch.setattr(
            "dragdiff.stages.LatentDrag",
            lambda probe, drags, look_every, every=look_every: LatentDrag(probe, drags, look_every=every),
        )
        loggers = [Recording() for _ in SAMPLES]
        steps: list[int] = []
        watch = (lambda step, handles, preview, steps=steps: steps.append(step)) if watched else None
        requests = [
            Request(sample, config, logger=logger, watch=watch)
            for sample, config, logger in zip(SAMPLES, settings, loggers, strict=True)
        ]
        results = Editor(settings[0], backbone).edit_batch(requests)
        found.append((results, [[c[1] for c in log._calls if c[0] == "log_metrics"] for log in loggers], steps))
    (expected, logs, steps), *others = found
    assert [result.stop_reason.partition(" at")[0] for result in expected] == ["steps", "diverged", "reached"]
    for results, logged, told in others:
        assert told == steps
        for one, other in zip(results, expected, strict=True):
            assert (one.steps, one.stop_reason.partition(" (")[0]) == (
                other.steps,
                other.stop_reason.partition(" (")[0],
            )
            np.testing.assert_array_equal(one.trajectory, other.trajectory)
            assert np.abs(one.image.astype(int) - other.image.astype(int)).mean() < 0.5
            assert [frame[0] for frame in one.frames] == [frame[0] for frame in other.frames]
        for one, other in zip(logged, logs, strict=True):
            assert [(step, values.keys()) for values, step in one] == [(step, values.keys()) for values, step in other]
            for (values, _), (before, _) in zip(one, other, strict=True):
                assert values == pytest.approx(before, rel=1e-2, abs=1e-4)


# ------------------------------------------------------------------------------------------- nothing is read


class Copies(TorchDispatchMode):
    """Names what carries values to the device, which a GPU waits for; whatever reads from `meta` raises by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, Tensor)]
        copied = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copied and len({tensor.device.type for tensor in [*given, result]}) > 1:
            raise AssertionError(f"{func} between host and device")
        return result


def on_meta(look_every: int, **more: Any) -> tuple[LatentDrag, Any]:
    """Two drags whose latents have no values."""
    drags = [drag(0, masked=True, device="meta", **more), drag(1, device="meta")]
    module = LatentDrag(Scene().to("meta"), drags, look_every=look_every)
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    module.trainer = trainer = SimpleNamespace(should_stop=False, precision_plugin=None, strategy=strategy)  # type: ignore[assignment]
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer  # type: ignore[method-assign, assignment]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, assignment]
    return module, trainer


def test_steps_between_looks_read_nothing_from_the_device():
    module, trainer = on_meta(100)
    with Copies():
        for step in range(1, 6):
            module.training_step(step)
    assert [one.steps_done for one in module.drags] == [5, 5] and not trainer.should_stop
    assert len(module.probe.rows) == 5  # type: ignore[attr-defined]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        module.training_step(100)


def test_a_tracker_that_reads_would_be_found():
    def reading(features: FeatureMap, *, handles: Tensor, **_: Any) -> Tensor:
        return torch.tensor(handles.tolist())

    module, _ = on_meta(100, tracker=reading)
    module.training_step(1)  # nothing to track yet
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        module.training_step(2)


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_lora_is_trained_without_reading_but_for_every_eighth_loss(monkeypatch, pictures):
    scene, draw = (
        Scene().to("meta"),
        seeded_noise(seed=0, batch_size=2, latent_shape=(4, 8, 8), slack=(0, 0), train_timesteps=1000),
    )
    latent = torch.zeros((2, 4, 8, 8), device="meta")
    lesson = Lesson(lambda corners: (latent, latent), torch.zeros((1, 3, 5), device="meta"), draw)
    weight = nn.Parameter(torch.zeros((pictures, 2, 4), device="meta"))
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("meta")
    backbone = SimpleNamespace(
        predict=lambda latents, t, embeddings: scene.layer(latents) + weight.sum(), prediction_type="epsilon"
    )
    module = LoRAFinetune(
        cast(Any, backbone), {"w": weight}, [lesson] * pictures, lr=1e-3, weight_decay=0.0, scheduler=scheduler
    ).to("meta")
    # what a GPU gets from pinned memory
    monkeypatch.setattr(module, "_sent", lambda part: torch.empty_like(part, device="meta"))
    told: list[tuple[int, str]] = []
    trainer = SimpleNamespace(global_step=0, max_steps=20, callback_metrics={})
    monkeypatch.setattr(LoRAFinetune, "global_step", property(lambda self: trainer.global_step))
    logged = trainer.callback_metrics
    monkeypatch.setattr(module, "log_dict", lambda losses: logged.update({n: v.detach() for n, v in losses.items()}))
    progress = Progress(lambda done, note: told.append((done, note)), look_every=8)
    with Copies():
        for step in range(1, 8):
            module.training_step(step).backward()
            trainer.global_step = step
            progress.on_train_batch_end(cast(Any, trainer), module)
    assert told == [(step, "") for step in range(1, 8)]
    trainer.global_step = 8
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        progress.on_train_batch_end(cast(Any, trainer), module)
    trainer.callback_metrics.update(dict.fromkeys(trainer.callback_metrics, torch.tensor(0.25)))
    for trainer.global_step in (8, 9, 20):  # the last, too
        progress.on_train_batch_end(cast(Any, trainer), module)
        trainer.callback_metrics.update(dict.fromkeys(trainer.callback_metrics, torch.tensor(0.5)))
    assert told[-3:] == [(8, "loss 0.250"), (9, "loss 0.250"), (20, "loss 0.500")]
