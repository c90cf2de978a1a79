"""Edits replayed against traces of the published DragDiffusion code (see data/traces/README.md).

Each case runs once, unbroken, through `Editor.edit`, with a callback that watches. The text embedding and the latent at
the drag's timestep are compared and then replaced by the recorded ones, and the drag has the plain attention that the
traces were made with: otherwise rounding upstream decides signs downstream. Beside that, single drag steps with the
default attention start from the recorded latent and handles, and edits run with nothing replaced.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import TRACES
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor

from dragdiff import Editor, EditSample
from dragdiff.backbones.diffusion import Condition
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.callbacks import DragCallback
from dragdiff.config import load_config
from dragdiff.job import EditResult
from dragdiff.models.point_drag import Drag, PointDrag
from dragdiff.modules import ddim, lora, motion, tracking
from dragdiff.modules.features import FeatureMap, forward_with_features
from dragdiff.stages import sources

# What rounding may change: another processor or version of a library, fused instead of plain attention.
FORWARD = 5e-5
LOSS = 1e-4  # relative
LATENT = 1e-4
FINAL = 1e-3  # after all denoising steps
DECIDED = 1e-3  # a tracked position is unique when the runner-up's distance is larger by this
# Adam's first step moves every entry by lr times the sign of its gradient: below this share of the largest gradient
# rounding decides the sign. Of 4096 entries that is two in one case, one in another, none in the rest.
OPEN_SIGN = 1e-5
# The mask term's gradient is the sign of its argument. In the seventh step of this case 5 of the 1,912 arguments are
# smaller than 1e-5, one of them comes out with the other sign on another processor, and the latents go apart by up to
# 2 lr: from there on the steps are compared one by one, and the denoising starts from the recorded latent.
SIGN_FLIPS = {"lora256": 6}

SCENES = {
    "nomask256": "scene256.png",
    "skip_break256": "scene256.png",
    "idx2_inv05": "scene256.png",
    "lora256": "scene256.png",
    "odd250x331": "scene250x331.png",
    "gen256": "",  # made by the model
    "gen256_g1": "",
}
FEATURES = ["mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3"]  # by the reference's index


def load(case: str) -> dict[str, np.ndarray]:
    with np.load(TRACES / f"{case}.npz") as file:
        return dict(file)


class Recorder(DragCallback):
    """Watches the drag: what each step had before its update, and what came of it.

    Args:
        plain: the backbone that has plain attention during the drag.
        final: put in the dragged latent's place at the end.
    """

    def __init__(self, plain: StableDiffusion | None = None, final: Tensor | None = None) -> None:
        self.final = final
        self.plain = plain_attention(plain) if plain else nullcontext()
        self.handles: list[Tensor] = []
        self.losses: list[dict[str, float]] = []
        self.gradients: list[Tensor] = []
        self.latents: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: PointDrag) -> None:
        self.module = module
        self.plain.__enter__()

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        self.drag = drag
        self.handles.append(drag.points.handles.clone())

    def on_train_batch_end(self, trainer: L.Trainer, module: PointDrag, *_: object) -> None:
        if self.drag.steps_done > len(self.latents):
            self.losses.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.gradients.append(self.drag.value.grad.clone())
            self.latents.append(self.drag.value.detach().clone())

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, module: PointDrag) -> None:
        self.plain.__exit__(None, None, None)
        if self.final is not None:
            self.drag.value.copy_(self.final)


@dataclass
class Replay:
    """A case, and what running it gave."""

    case: str
    trace: dict[str, np.ndarray]
    settings: dict[str, Any]
    editor: Editor
    sample: EditSample
    result: EditResult
    recorder: Recorder
    condition: Condition
    path: list[Tensor]  # latents of the inversion, or of the generation
    denoising: tuple[list[Tensor], list[Tensor]]  # latents of the source and of the edited branch

    @property
    def drag(self) -> Drag:
        return self.recorder.drag

    def probe(self, latent: Tensor) -> tuple[Tensor, FeatureMap]:
        """The network's output and features, as the drag has them."""
        output, (features,) = self.recorder.module.probe(latent, [0], True)
        return output, features

    @property
    def device(self) -> torch.device:
        return self.editor.backbone.device

    def there(self, values: np.ndarray) -> Tensor:
        """What was recorded, on the model's device."""
        return torch.from_numpy(values).to(self.device)

    @property
    def t(self) -> Tensor:
        return torch.tensor(int(self.trace["t"]))

    @property
    def source(self) -> Tensor:
        """The recorded latent at the drag's timestep."""
        steps = self.editor.config.ddim.taken
        index = 50 - steps if self.settings.get("gen") else steps
        return recorded(self.trace, "path", index).to(self.device)

    def latent_before(self, step: int) -> Tensor:
        return self.source if step == 0 else recorded(self.trace, "latent", step - 1).to(self.device)

    @contextmanager
    def model(self) -> Iterator[None]:
        """The network as the drag has it: with the LoRA, if there is one."""
        with lora.merged(self.editor.backbone.network, self.editor.finetune(self.sample)):
            yield


def recorded(trace: dict[str, np.ndarray], key: str, index: int) -> Tensor:
    """An entry of a sequence of which the trace keeps only some."""
    plural = {"path": "path", "latent": "latents", "grad": "grads"}[key]
    entry = torch.from_numpy(trace[plural][list(trace[f"{key}_idx"]).index(index)])
    return entry if entry.ndim == 4 else entry[None]


def spy(patch: pytest.MonkeyPatch, owner: object, name: str, instead: Callable[[Any], Any] | None = None) -> list:
    """Keep what a function returns at each call; what its caller gets stays the same, or is made by `instead`."""
    results, original = [], getattr(owner, name)

    def call(*args, **kwargs):
        results.append(original(*args, **kwargs))
        return instead(results[-1]) if instead else results[-1]

    patch.setattr(owner, name, call)
    return results


def spy_denoising(patch: pytest.MonkeyPatch, backbone: StableDiffusion) -> tuple[list[Tensor], list[Tensor]]:
    """Keep the latents of the source and of the edited branch on their way down, in that order."""
    source, edited, seen = [], [], []
    down, predict = sources.Step.down, backbone.predict

    def predicted(latents, *args):
        seen.append(latents[:1])  # with guidance the same twice
        return predict(latents, *args)

    def call(step, latents, **settings):
        if source:
            del source[-1]
        source.extend([seen[-1], step.reference.below])  # whose forward comes before; the next one's is as good
        lower = down(step, latents, **settings)
        edited.extend([lower] if edited else [latents, lower])
        return lower

    patch.setattr(backbone, "predict", predicted)
    patch.setattr(sources.Step, "down", call)
    return source, edited


def case_of(case: str, tiny_sd: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], EditSample, list[str]]:
    """(trace, the published code's settings, sample, overrides) of a case."""
    trace = load(case)
    settings = json.loads(str(trace["settings_json"]))
    if case in ("skip_break256", "idx2_inv05"):  # the same picture, inverted in the same way
        trace |= {key: value for key, value in load("nomask256").items() if key in ("path", "path_idx")}
    overrides = [
        f"model.path={tiny_sd}",
        "model.device=cpu",
        "model.autocast=none",
        "cache.enabled=false",
        "output.frames_every=0",
        "lora.steps=0",
        f"ddim.strength={settings['inversion_strength']}",
        f"drag.steps={settings['n_pix_step']}",
        f"drag.lr={settings['latent_lr']}",
        f"drag.mask_weight={settings['lam']}",
        f"drag.features=[{FEATURES[settings['unet_feature_idx']]}]",
        f"control.start_step={settings['start_step']}",
        f"control.start_layer={settings['start_layer']}",
    ]
    if settings["lora"]:
        overrides.append(f"lora.path={TRACES / settings['lora']}")
    if settings.get("gen"):
        overrides += [
            "generate.enabled=true",
            f"generate.guidance={settings['guidance_scale']}",
            f"generate.negative_prompt={settings['neg_prompt']!r}",
            f"generate.height={settings['h']}",
            f"generate.width={settings['w']}",
            f"seed={settings['seed']}",
        ]
        image = np.zeros((settings["h"], settings["w"], 3), np.uint8)  # the drag takes the generation's own latent
    else:
        image = np.asarray(Image.open(TRACES / SCENES[case]))
    sample = EditSample(image, settings["prompt"], trace["points_xy"].reshape(-1, 2, 2), trace.get("mask"), case)
    return trace, settings, sample, overrides


@pytest.fixture(scope="module", params=[pytest.param(case, marks=pytest.mark.slow) for case in SCENES])
def replay(request, backbone, tiny_sd) -> Replay:
    return replayed(request.param, backbone, tiny_sd)


def replayed(case: str, backbone: StableDiffusion, tiny_sd: Path) -> Replay:
    """Run a case with the pipeline in `tiny_sd`, on whatever device the backbone has it."""
    trace, settings, sample, overrides = case_of(case, tiny_sd)
    editor = Editor(load_config(overrides=overrides), backbone)
    steps = editor.config.ddim.taken
    index = 50 - steps if settings.get("gen") else steps
    start = recorded(trace, "path", index).to(backbone.device)

    def with_recorded_embedding(condition: Condition) -> Condition:
        (embeddings,) = condition.values()
        replacement = torch.from_numpy(load("gen256")["embedding"])[-len(embeddings) :]
        return dict.fromkeys(condition, replacement.to(backbone.device))

    def with_recorded_start(path: list[Tensor]) -> list[Tensor]:
        return [*path[:index], start, *path[index + 1 :]]

    for module in backbone.modules:
        module.requires_grad_(False)
    flips = case in SIGN_FLIPS
    final = recorded(trace, "latent", trace["drag_steps_done"] - 1) if flips else None
    recorder = Recorder(backbone, final)
    with pytest.MonkeyPatch.context() as patch:
        conditions = spy(patch, backbone, "condition", with_recorded_embedding)
        inverted = spy(patch, ddim, "invert", with_recorded_start)
        generated = spy(patch, sources, "generated", lambda made: (made[0], with_recorded_start(made[1]), made[2]))
        source, edited = spy_denoising(patch, backbone)
        result = editor.edit(sample, callbacks=[recorder])
    return Replay(
        case=case,
        trace=trace,
        settings=settings,
        editor=editor,
        sample=sample,
        result=result,
        recorder=recorder,
        condition=conditions[-1],
        path=inverted[0] if inverted else generated[0][1],
        denoising=(source, edited),
    )


@contextmanager
def plain_attention(backbone: StableDiffusion) -> Iterator[None]:
    """The published code's own arithmetic, instead of torch's fused kernel."""
    fused = dict(backbone.network.attn_processors)
    backbone.network.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        backbone.network.set_attn_processor(fused)


def near(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(host(actual), host(expected), rtol=0, atol=tolerance)


def host(values: Tensor | np.ndarray) -> np.ndarray:
    """Values in the CPU's memory."""
    return values.numpy(force=True) if isinstance(values, Tensor) else values


# --- before the drag ----------------------------------------------------------------------------------------


def test_text_embedding(replay):
    negative, prompt = load("gen256")["embedding"]
    (embeddings,) = replay.condition.values()
    near(embeddings, np.stack([negative, prompt]) if replay.case == "gen256" else prompt[None], FORWARD)


def test_way_to_the_drags_latent(replay):
    """From the VAE's latent up, or from the generation's noise down."""
    indices = [int(i) for i in replay.trace["path_idx"] if i < len(replay.path)]
    assert len(indices) >= 3
    for index in indices:
        clean = replay.settings.get("gen") and index == 50
        near(replay.path[index], recorded(replay.trace, "path", index), FINAL if clean else LATENT)


def test_source_picture(replay):
    if replay.settings.get("gen"):
        same_picture(replay.result.sample.image[::4, ::4], replay.trace["generated"])
    else:
        np.testing.assert_array_equal(replay.result.sample.image, replay.sample.image)


def test_points_and_mask(replay):
    trace, drag = replay.trace, replay.drag
    np.testing.assert_array_equal(host(drag.points.initial), trace["handle0"])
    np.testing.assert_array_equal(host(drag.points.targets), trace["target"])
    if replay.case == "nomask256":
        assert drag.mask is None
    else:
        np.testing.assert_array_equal(1 - host(drag.mask.keep), trace["mask_latent"])


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_first_forward(replay, attention):
    """Output and features of the recorded latent, and the latent one step down, with either kind of attention."""
    trace, backbone = replay.trace, replay.editor.backbone
    blocks = [backbone.feature_block(name) for name in replay.editor.config.drag.features]
    (embeddings,) = replay.condition.values()
    rows = replay.source.expand(len(embeddings), -1, -1, -1)
    with torch.no_grad(), replay.model(), plain_attention(backbone) if attention == "plain" else nullcontext():
        output, (features,) = forward_with_features(
            lambda: backbone.predict(rows, replay.t, replay.condition), blocks, need_output=True
        )
        guided, _ = replay.probe(replay.source)
    near(output, trace["unet_out_0"], FORWARD)
    near(features[:, ::4], trace["F0_raw"], FORWARD)
    grid = tuple(side // 2 for side in replay.sample.image.shape[:2])
    at_handles = FeatureMap([features[:1]], grid).at(replay.there(trace["handle0"]))
    near(at_handles, trace["F0_at_handles"], FORWARD)

    scheduler = backbone.scheduler(50)
    index = scheduler.timesteps.tolist().index(int(replay.t))
    previous = ddim.move(
        replay.source,
        guided,
        alpha=scheduler.alphas_cumprod[int(replay.t)],
        alpha_to=ddim.alpha_before(scheduler, index),
        prediction_type=backbone.prediction_type,
    )
    near(previous, trace["x_prev_0"], FORWARD)


# --- the drag -----------------------------------------------------------------------------------------------


def test_each_step_from_its_recorded_state(replay):
    trace, drag = replay.trace, replay.drag
    steps = [0, *(int(i) + 1 for i in trace["latent_idx"])]
    gradients = trace["grad_idx"].tolist()
    assert set(gradients) <= set(steps)
    for step in steps:
        latent = replay.latent_before(step).requires_grad_()
        with replay.model():
            output, features = replay.probe(latent)
        if 0 < step <= len(trace["track_before_seq"]):
            moved = tracking.nearest(
                features,
                templates=drag.templates,
                handles=replay.there(trace["track_before_seq"][step - 1]),
                radius=3,
            )
            decided = trace["track_margin_seq"][step - 1, :, 1] > DECIDED
            np.testing.assert_array_equal(host(moved)[decided], trace["track_after_seq"][step - 1][decided])
        if step == len(trace["loss_total_seq"]):  # after the last update
            continue

        motion_loss = motion.one_step(
            features,
            handles=replay.there(trace["handle_at_step_seq"][step]),
            targets=replay.there(trace["target"]),
            radius=1,
            stop_distance=2,
        )
        mask_loss = torch.zeros((), device=replay.device)
        if drag.mask is not None:
            mask = drag.mask
            previous = ddim.move(
                latent, output, alpha=mask.alpha, alpha_to=mask.alpha_below, prediction_type=mask.prediction_type
            )
            initial = replay.there(trace["x_prev_0"]) if step else previous.detach()
            assert (previous - initial).abs().max().item() == pytest.approx(
                trace["xprev_absdiff_max_seq"][step], abs=FORWARD
            )
            mask_loss = mask.weight * motion.mask_term(previous, initial, keep=mask.keep)
        loss = motion_loss + mask_loss
        assert motion_loss.item() == pytest.approx(trace["loss_motion_seq"][step], rel=LOSS)
        assert mask_loss.item() == pytest.approx(trace["loss_mask_seq"][step], rel=LOSS)
        assert loss.item() == pytest.approx(trace["loss_total_seq"][step], rel=LOSS)

        if step in gradients:
            gradient = torch.autograd.grad(loss, latent, retain_graph=True)[0]
            same_gradient(gradient, recorded(trace, "grad", step))
        if step == 1 and "grad_mask_step1" in trace:
            same_gradient(torch.autograd.grad(motion_loss, latent, retain_graph=True)[0], trace["grad_motion_step1"])
            same_gradient(torch.autograd.grad(mask_loss, latent)[0], trace["grad_mask_step1"])


def same_gradient(actual: Tensor, expected: Tensor | np.ndarray) -> None:
    near(actual, expected, LOSS * float(np.abs(host(expected)).max()))


def test_handles(replay):
    trace, recorder = replay.trace, replay.recorder
    recorded_steps = trace["handle_at_step_seq"]
    assert len(recorder.latents) == len(recorded_steps)
    np.testing.assert_array_equal(host(recorder.handles[0]), recorded_steps[0])
    for step, (after, margin) in enumerate(zip(trace["track_after_seq"], trace["track_margin_seq"], strict=True), 1):
        decided = margin[:, 1] > DECIDED
        np.testing.assert_array_equal(host(recorder.handles[step])[decided], after[decided])


def test_losses_and_gradients(replay):
    trace, free = replay.trace, slice(SIGN_FLIPS.get(replay.case))
    for name, key in (("loss", "total"), ("motion", "motion"), ("mask", "mask")):
        actual = [step[f"drag/{name}"] for step in replay.recorder.losses]
        np.testing.assert_allclose(actual[free], trace[f"loss_{key}_seq"][free], rtol=LOSS)
    norms = [float(gradient.norm()) for gradient in replay.recorder.gradients]
    np.testing.assert_allclose(norms[free], trace["grad_norm_seq"][free], rtol=LOSS)


def open_signs(replay: Replay) -> Tensor:
    """Entries of the latent whose first update rounding decides, (C, h, w) bool."""
    gradient = recorded(replay.trace, "grad", 0)[0].abs()
    return gradient < OPEN_SIGN * gradient.max()


def test_latents(replay):
    free = open_signs(replay)
    assert free.sum() == {"skip_break256": 2, "gen256": 1}.get(replay.case, 0)
    for step in replay.trace["latent_idx"]:
        actual, expected = replay.recorder.latents[step][0].cpu(), recorded(replay.trace, "latent", step)[0]
        flipped = step >= SIGN_FLIPS.get(replay.case, len(replay.recorder.latents))
        near(actual[~free], expected[~free], 2 * replay.settings["latent_lr"] if flipped else LATENT)
        near(actual[free], expected[free], 2 * replay.settings["latent_lr"])


def test_end_of_the_drag(replay):
    trace, result = replay.trace, replay.result
    assert result.steps == trace["drag_steps_done"]
    assert result.stop_reason == ("reached" if replay.case == "skip_break256" else "steps")
    np.testing.assert_array_equal(host(replay.drag.points.handles), trace["handles_final"])


# --- after the drag -----------------------------------------------------------------------------------------


def test_denoising_of_both_branches(replay):
    trace, (source, edited), free = replay.trace, replay.denoising, open_signs(replay)
    assert len(source) == len(edited) == replay.editor.config.ddim.taken + 1 == trace["denoise_idx"][-1] + 1
    for place, index in enumerate(trace["denoise_idx"]):
        tolerance = FINAL if index else LATENT
        near(source[index][0], trace["denoise_ref"][place], tolerance)
        near(edited[index][0].cpu()[~free], torch.from_numpy(trace["denoise_edit"][place])[~free], tolerance)


def test_picture(replay):
    step = int(replay.trace["picture_step"])
    assert replay.result.image.shape == replay.sample.image.shape
    same_picture(replay.result.image[::step, ::step], replay.trace["picture"])


def same_picture(actual: np.ndarray, expected: np.ndarray) -> None:
    """One level is what cutting off, not rounding, makes of a rounding difference."""
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("case", ["idx2_inv05", "odd250x331"])
def test_edit_as_users_run_it(case, backbone, tiny_sd):
    """Nothing recorded goes in and attention is fused: rounding happens to leave the signs of these cases alone."""
    trace, _, sample, overrides = case_of(case, tiny_sd)
    recorder = Recorder()
    result = Editor(load_config(overrides=overrides), backbone).edit(sample, callbacks=[recorder])
    for step in trace["latent_idx"]:
        near(recorder.latents[step], recorded(trace, "latent", step), LATENT)
    np.testing.assert_array_equal(recorder.drag.points.handles, trace["handles_final"])
    step = int(trace["picture_step"])
    same_picture(result.image[::step, ::step], trace["picture"])
