"""The editor as a guest: what it is lent comes back as it was, and a generated picture can be taken up again."""

import csv
import dataclasses
import math
import random
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from dragdiff import Editor, EditResult, EditSample, Request
from dragdiff.backbones import lora_file
from dragdiff.backbones.loading import load_backbone
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import load_config
from dragdiff.editor import OneModel, enough_memory
from dragdiff.errors import UserError, out_of_memory
from dragdiff.methods import dragdiffusion
from dragdiff.modules import lora
from dragdiff.output import HANDLE
from dragdiff.stages import sources

QUICK = [
    "cache.enabled=false",
    "model.device=cpu",
    "ddim.steps=4",
    "ddim.strength=0.5",
    "drag.steps=2",
    "lora.steps=2",
    "lora.batch_size=1",
    "lora.rank=2",
    "lora.resolution=64",
    "output.frames_every=1",
    "generate.height=64",
    "generate.width=64",
]
GENERATED = ["generate.enabled=true", "generate.freeu=true", "generate.freeu_b1=1.4", "generate.freeu_s1=0.6"]
MASK = np.zeros((64, 64), np.uint8)
MASK[8:56, 8:40] = 255
SAMPLE = EditSample(
    np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8),
    "a cat",
    [[[10, 10], [30, 30]], [[20, 40], [20, 44]]],
    MASK,
    "noise",
)


@pytest.fixture(scope="module")
def pipeline(tiny_sd) -> Any:
    """Somebody's pipeline, not in its plainest state."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, use_safetensors=True, safety_checker=None)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.unet.conv_in.weight.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    pipeline.unet.enable_freeu(s1=0.9, s2=0.9, b1=1.05, b2=1.05)
    pipeline.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    pipeline.unet.conv_out.register_forward_hook(lambda *_: None)
    return pipeline


@pytest.fixture(scope="module")
def adapter(pipeline, tmp_path_factory) -> str:
    """A LoRA that does something, as `lora.path`."""
    beside = lora.trainable(pipeline.unet, StableDiffusion.lora_targets, rank=2, alpha=2, seed=0, pictures=1)
    with beside as ((weights,), current):
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        trained = current(0)
    return f"lora.path={lora_file.save(trained, tmp_path_factory.mktemp('lora')).parent}"


class State:
    """Everything of a pipeline that an edit could leave changed."""

    def __init__(self, pipeline: Any) -> None:
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        modules = [(f"{part}.{name}", m) for part, root in parts.items() for name, m in root.named_modules()]
        weights = [(f"{part}.{name}", p) for part, root in parts.items() for name, p in root.named_parameters()]
        self.components = {name: id(part) for name, part in pipeline.components.items()}
        self.modules = [(name, id(m), type(m), m.training) for name, m in modules]
        self.attributes = [
            {key: self.look(value) for key, value in vars(m).items() if key != "training"} for _, m in modules
        ]
        self.weights = [(name, id(p), p.data_ptr(), p.requires_grad, p.dtype, p.grad) for name, p in weights]
        self.values = [p.detach().clone() for _, p in weights]
        self.scheduler = {key: self.look(value) for key, value in vars(pipeline.scheduler).items()}
        self.pipeline = {key: self.look(value) for key, value in vars(pipeline).items()}

    @staticmethod
    def look(value: Any) -> Any:
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        if isinstance(value, dict):  # hooks, submodules, parameters
            return {key: id(entry) for key, entry in value.items()}
        if isinstance(value, torch.Tensor):
            return value.tolist()
        return id(value)  # processors, activations

    def assert_same(self, other: "State") -> None:
        for key, value in vars(self).items():
            if key != "values":
                assert vars(other)[key] == value, key
        assert all(torch.equal(a, b) for a, b in zip(self.values, other.values, strict=True))


def edit(pipeline: Any, *overrides: str, **kwargs: Any) -> Any:
    backbone = StableDiffusion(pipeline)
    return Editor(load_config(overrides=[*QUICK, *overrides]), backbone, **kwargs).edit(SAMPLE)


def test_the_state_would_show_a_change(pipeline):
    """So that the tests below can fail."""
    before = State(pipeline)
    before.assert_same(State(pipeline))
    unet = pipeline.unet
    attention = unet.up_blocks[2].attentions[0].transformer_blocks[0].attn1
    processor, weight = attention.processor, unet.conv_out.weight

    def freeu(value: float) -> None:
        unet.up_blocks[0].b1 = value

    changes: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: attention.set_processor(AttnProcessor()), lambda: attention.set_processor(processor)),
        (lambda: weight.requires_grad_(False), lambda: weight.requires_grad_(True)),
        (lambda: freeu(2.0), lambda: freeu(1.05)),
        (lambda: unet.conv_in.eval(), lambda: unet.conv_in.train()),
        (lambda: weight.data.add_(1), lambda: weight.data.sub_(1)),
        (lambda: setattr(unet, "peft_config", {}), lambda: delattr(unet, "peft_config")),
        (lambda: setattr(pipeline.scheduler, "num_inference_steps", 7), lambda: None),
    ]
    for change, undo in changes:
        change()
        with pytest.raises(AssertionError):
            before.assert_same(State(pipeline))
        undo()
    pipeline.scheduler.num_inference_steps = None
    weight.data.copy_(before.values[[name for name, *_ in before.weights].index("unet.conv_out.weight")])
    before.assert_same(State(pipeline))


LOW = ["model.memory=low"]  # activations are computed again


@pytest.mark.parametrize("overrides", [[], LOW, GENERATED, [*GENERATED, "generate.scheduler=dpm++2m"]])
def test_an_edit_leaves_the_pipeline_and_the_random_state_as_they_were(pipeline, adapter, overrides):
    before = State(pipeline)
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    result = edit(pipeline, *overrides, *([adapter] if overrides else []))
    assert result.image.shape == (64, 64, 3) and result.steps == 2
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    before.assert_same(State(pipeline))


@pytest.mark.parametrize(
    "overrides, stage, error",
    [
        ([], "LoRA", ZeroDivisionError),
        ([], "LoRA", KeyboardInterrupt),
        ([], "inversion", ZeroDivisionError),
        ([], "drag", ZeroDivisionError),
        ([], "drag", KeyboardInterrupt),
        ([], "denoise", ZeroDivisionError),
        (LOW, "drag", ZeroDivisionError),
        (GENERATED, "generate", ZeroDivisionError),
        (GENERATED, "drag", ZeroDivisionError),
        (GENERATED, "denoise", KeyboardInterrupt),
    ],
)
def test_an_edit_that_fails_leaves_the_pipeline_as_it_was(pipeline, adapter, overrides, stage, error):
    def report(name: str, done: int, total: int, note: str) -> None:
        if name == stage and done == 1:
            raise error

    before = State(pipeline)
    with pytest.raises(error):
        edit(pipeline, *overrides, *([adapter] if overrides else []), report=report)
    before.assert_same(State(pipeline))


@pytest.mark.parametrize("stage", ["LoRA", "drag", ""])
def test_a_batch_leaves_the_pipeline_as_it_was(pipeline, stage):
    """Also where it fails; each picture has a LoRA of its own."""

    def report(name: str, done: int, total: int, note: str) -> None:
        if name == stage and done == 1:
            raise ZeroDivisionError

    before, editor = State(pipeline), Editor(load_config(overrides=QUICK), StableDiffusion(pipeline), report=report)
    other = EditSample(SAMPLE.image[::-1].copy(), "a dog", SAMPLE.points, SAMPLE.mask)
    with pytest.raises(ZeroDivisionError) if stage else nullcontext():
        assert all(isinstance(r, EditResult) for r in editor.edit_batch([Request(SAMPLE), Request(other)]))
    before.assert_same(State(pipeline))


def test_a_lora_of_another_model_is_refused_and_the_pipeline_left_alone(pipeline, tmp_path):
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    other = lora.LoRA({path: torch.ones(2, 7)}, {path: torch.ones(7, 2)}, {path: 1.0})
    lora_file.save(other, tmp_path)
    before = State(pipeline)
    with pytest.raises(UserError, match="another model"):
        edit(pipeline, f"lora.path={tmp_path}")
    before.assert_same(State(pipeline))


# ------------------------------------------------------------------------------------------- generated pictures


@pytest.mark.parametrize("guidance", [1, 5])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m", "dpm++2m-karras"])
def test_without_a_drag_a_generated_picture_comes_out_as_it_was(backbone, scheduler, guidance):
    overrides = [*GENERATED, f"generate.scheduler={scheduler}", f"generate.guidance={guidance}", "drag.steps=0"]
    editor = Editor(load_config(overrides=[*QUICK, *overrides, "ddim.steps=6"]), backbone)
    picture, path = editor.generate(SAMPLE.prompt)
    assert len(path) == 7 and picture.std() > 20
    result = editor.edit(SAMPLE)
    assert np.array_equal(result.sample.image, picture)
    difference = np.abs(result.image.astype(int) - picture.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.002  # batches of two round differently


def test_that_takes_the_solvers_memory(backbone, monkeypatch):
    """A multistep solver restarted in the middle would give another picture."""
    overrides = ["generate.enabled=true", "generate.scheduler=dpm++2m", "drag.steps=0", "ddim.steps=6"]
    editor = Editor(load_config(overrides=[*QUICK, *overrides]), backbone)
    picture, _ = editor.generate(SAMPLE.prompt)
    generated = sources.generated

    def forgetful(job: Any) -> Any:
        return *generated(job)[:2], backbone.scheduler(6, "dpm++2m")

    monkeypatch.setattr(sources, "generated", forgetful)
    assert np.abs(editor.edit(SAMPLE).image.astype(int) - picture.astype(int)).max() > 1


def test_freeu_reaches_every_stage(backbone, monkeypatch):
    """Also those after the generation."""
    seen: list[tuple[str, Any]] = []
    stage = ""

    def report(name: str, done: int, total: int, note: str) -> None:
        nonlocal stage
        stage = name

    block = backbone.network.up_blocks[0]
    hook = block.register_forward_pre_hook(lambda *_: seen.append((stage, getattr(block, "b1", None))))
    Editor(load_config(overrides=[*QUICK, *GENERATED]), backbone, report=report).edit(SAMPLE)
    hook.remove()
    assert {name for name, _ in seen} == {"generate", "drag", "denoise"}
    assert {factor for _, factor in seen} == {1.4}


# ------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("overrides", [["model.dtype=bf16"], ["model.autocast=bf16"]])
def test_bf16(tiny_sd, overrides):
    config = load_config(overrides=[*QUICK, f"model.path={tiny_sd}", *overrides])
    result = Editor(config).edit(SAMPLE)
    assert result.steps == 2 and result.stop_reason == "steps"
    assert result.image.std() > 5 and np.isfinite(result.trajectory).all()


# ------------------------------------------------------------------------------------------- logs and cache


def test_one_logger_gets_the_losses_of_both_optimisations(backbone, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log")
    Editor(load_config(overrides=[*QUICK, "lora.steps=3"]), backbone).edit(SAMPLE, logger=logger)
    logger.finalize("success")
    with open(tmp_path / "log" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key, steps in (("lora/loss", 3), ("drag/loss", 2)):
        assert [row["step"] for row in rows if row[key]] == [str(step) for step in range(steps)]


def test_a_cached_lora_is_used_for_exactly_what_it_was_trained_for(backbone, tmp_path):
    trained = []

    def report(name: str, done: int, total: int, note: str) -> None:
        if done == 1 and note != "from the cache":
            trained.append(name)

    def finetune(sample: EditSample, *overrides: str) -> bool:
        """Whether it was trained anew."""
        settings = [*QUICK, "lora.steps=1", "cache.enabled=true", f"cache.folder={tmp_path}", *overrides]
        before = len(trained)
        assert Editor(load_config(overrides=settings), backbone, report=report).finetune(sample) is not None
        return len(trained) > before

    assert finetune(SAMPLE) and not finetune(SAMPLE)
    assert not finetune(SAMPLE, "drag.lr=0.5", "ddim.strength=0.9")
    for change in ("lora.rank=3", "lora.alpha=1", "lora.lr=0.001", "lora.batch_size=2", "seed=7", "lora.crop=pixel"):
        assert finetune(SAMPLE, change)
    assert finetune(EditSample(255 - SAMPLE.image, "a cat", [[[10, 10], [30, 30]]], None, "x"))
    assert finetune(EditSample(SAMPLE.image, "a dog", [[[10, 10], [30, 30]]], None, "x"))
    assert not finetune(EditSample(SAMPLE.image, "a cat", [[[1, 1], [3, 3]]], None, "x"))
    weight = backbone.network.conv_out.weight
    before = weight.detach().clone()
    weight.data[0, 0, 0, 0] += 1
    try:
        assert finetune(SAMPLE)
    finally:
        weight.data.copy_(before)


def test_a_latent_that_is_not_finite_is_no_fault_of_the_drag(backbone, monkeypatch):
    encode = backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda images: tuple(part / 0 for part in encode(images)))
    with pytest.raises(UserError, match=r"not finite.*use model\.dtype=fp32"):
        Editor(load_config(overrides=[*QUICK, "lora.steps=0"]), backbone).edit(SAMPLE)


def notes_before_work(run: Editor, sample: EditSample, monkeypatch) -> list[str]:
    """What an edit warns of before its method runs."""

    def stop(job):
        raise UserError("stop")

    monkeypatch.setattr(run, "method", dataclasses.replace(run.method, run=stop))
    with warnings.catch_warnings(record=True) as notes, pytest.raises(UserError, match="stop"):
        warnings.simplefilter("always")
        run.edit(sample)
    return [str(note.message) for note in notes if issubclass(note.category, UserWarning)]


def test_a_sample_that_is_most_likely_not_meant_is_said_before_the_work(backbone, monkeypatch):
    def notes(pairs, *overrides, mask=None):
        run = Editor(load_config(overrides=[*QUICK, *overrides]), backbone)
        return notes_before_work(run, EditSample(SAMPLE.image, "", pairs, mask, "cat"), monkeypatch)

    assert notes([[[10, 20], [30, 20]]], mask=MASK) == []
    (note,) = notes([[[50, 20], [60, 20]]], mask=MASK)
    assert note.startswith("cat: Outside of the mask's white") and "(50, 20) of pair 1" in note
    near, mixed = [[[10, 20], [13, 20]]], [[[10, 20], [13, 20]], [[10, 20], [30, 20]]]
    assert notes(mixed) == notes(near, "drag.stop_distance=1") == notes(near, "method=fastdrag") == []
    assert notes(near) == [
        "cat: all handles are nearer to their targets than drag.stop_distance, here 4 px of the picture: nothing will "
        "be dragged"
    ]
    shares = notes([[[0.3, 0.4], [0.6, 0.4]]])
    assert len(shares) == 2 and "not shares of width and height" in shares[0]


def test_a_large_picture_is_worked_on_at_a_size_that_suits_the_model(backbone, monkeypatch):
    assert backbone.trained_size == 512
    monkeypatch.setattr(backbone, "trained_size", 64)
    image = np.random.default_rng(0).integers(0, 255, (96, 256, 3)).astype(np.uint8)
    large = EditSample(image, "", [[[10, 20], [90, 20]]], None, "cat")
    run = Editor(load_config(overrides=QUICK), backbone)
    assert run.size_class(large) == (6, 16)
    (note,) = notes_before_work(run, large, monkeypatch)
    assert note.startswith("cat has 256x96 px and is worked on at 128x48,") and "data.max_size" in note
    for size, expected in (("256", (12, 32)), ("9999", (12, 32)), ("64", (3, 8))):
        chosen = Editor(load_config(overrides=[*QUICK, f"data.max_size={size}"]), backbone)
        assert chosen.size_class(large) == expected and notes_before_work(chosen, large, monkeypatch) == []
    small = EditSample(image[:, :128], "", [[[10, 20], [90, 20]]], None, "cat")
    assert run.size_class(small) == (12, 16) and notes_before_work(run, small, monkeypatch) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError("Unable to allocate 9 GiB"),
        RuntimeError("a bug"),
    ],
)
def test_memory_that_gives_out_anywhere_is_said_as_on_a_gpu(backbone, monkeypatch, error):
    def encode(images):
        raise error

    monkeypatch.setattr(backbone, "encode", encode)
    run, bug = Editor(load_config(overrides=[*QUICK, "lora.steps=0"]), backbone), "a bug" in str(error)
    kind, said = (RuntimeError, "a bug") if bug else (UserError, "memory is too small for this")
    with pytest.raises(kind, match=said), enough_memory():
        run.edit(SAMPLE)
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        run.edit(SAMPLE)
    assert out_of_memory(caught.value) != bug


@pytest.fixture
def overflows(backbone, monkeypatch) -> None:
    """An autoencoder that makes no finite picture of anything."""
    weight = backbone.pipeline.vae.decoder.conv_out.weight
    monkeypatch.setattr(weight, "data", weight.data / 0)


@pytest.mark.parametrize("overrides", [[], ["generate.enabled=true"]])
def test_a_picture_that_is_not_finite_is_an_error_and_its_previews_are_left_out(
    backbone, overflows, monkeypatch, overrides
):
    shown: list[Any] = []
    run = Editor(load_config(overrides=[*QUICK, "lora.steps=0", *overrides]), backbone)
    with pytest.raises(UserError, match=r"the autoencoder of .* overflows"):
        run.edit(SAMPLE, watch=lambda step, handles, preview: shown.append(preview))
    assert shown == ([] if overrides else [None, None])
    with pytest.raises(UserError, match=r"the autoencoder of .* overflows"):
        run.generate("a cat")


def test_the_other_edits_of_a_batch_have_their_pictures(backbone, monkeypatch):
    decode, calls = backbone.decode, []

    def fail_first(latents):
        calls.append(latents)
        if len(calls) == 1:
            raise UserError("the autoencoder overflows")
        return decode(latents)

    run = Editor(load_config(overrides=[*QUICK, "lora.steps=0", "output.frames_every=0"]), backbone)
    alone = run.edit(SAMPLE)
    monkeypatch.setattr(backbone, "decode", fail_first)
    failed, result = run.edit_batch([Request(SAMPLE), Request(SAMPLE)])
    assert isinstance(failed, UserError) and np.abs(result.image - alone.image.astype(int)).max() <= 1


def test_a_latent_that_the_drag_or_the_denoising_has_spoilt_makes_no_picture(backbone, monkeypatch):
    denoise = dragdiffusion.stages.denoise
    monkeypatch.setattr(dragdiffusion.stages, "denoise", lambda *args, **kwargs: denoise(*args, **kwargs) * math.nan)
    with pytest.raises(UserError, match=r"not finite.*use model\.dtype=fp32"):
        Editor(load_config(overrides=[*QUICK, "lora.steps=0"]), backbone).edit(SAMPLE)


def test_the_result_has_the_sources_size(backbone):
    """The work is done on the smaller picture; what comes out belongs to the one that went in."""
    image = np.random.default_rng(0).integers(0, 255, (128, 192, 3)).astype(np.uint8)
    mask = np.zeros((128, 192), np.uint8)
    mask[16:112, 16:160] = 255
    sample = EditSample(image, "a cat", [[[40, 40], [120, 80]]], mask, "large")
    settings = [*QUICK, "drag.steps=4"]
    large = Editor(load_config(overrides=[*settings, "data.max_size=96"]), backbone).edit(sample)
    small = Editor(load_config(overrides=settings), backbone).edit(sample.resized(96))
    assert large.image.shape == image.shape and small.image.shape == (64, 96, 3)
    np.testing.assert_array_equal(large.trajectory, 2 * small.trajectory)
    np.testing.assert_array_equal(large.distance_after, 2 * small.distance_after)
    assert large.sample is sample
    enlarged = F.interpolate(torch.from_numpy(small.image).permute(2, 0, 1)[None].float(), (128, 192), mode="bilinear")
    assert (enlarged[0].permute(1, 2, 0) - torch.from_numpy(large.image)).abs().max() < 2  # each cut to whole levels


def test_edit_and_save_writes_what_the_command_does(backbone, tmp_path):
    config = load_config(overrides=[*QUICK, "lora.steps=0", "logger.kind=csv"])
    result = Editor(config, backbone).edit_and_save(SAMPLE, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        Editor(config, backbone).edit_and_save(SAMPLE, tmp_path / "file" / "out")
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert made >= {"edited.png", "comparison.png", "trajectory.gif", "metrics.json", "config.yaml", "log/metrics.csv"}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "edited.png")), result.image)
    for step in (0, 1):  # with the points: a red dot on the handle
        shown = np.asarray(Image.open(tmp_path / "out" / "frames" / f"{step:04d}.png"))
        scale = shown.shape[0] / 64
        for x, y in result.trajectory[step]:
            assert tuple(shown[int(y * scale), int(x * scale)]) == HANDLE


def test_somebody_who_watches_sees_each_step_and_changes_nothing(tiny_sd):
    overrides = [f"model.path={tiny_sd}", "model.device=cpu", "cache.enabled=false", "output.frames_every=2"]
    editor = Editor.from_config("debug", overrides=[*overrides, "drag.steps=4", "lora.steps=0"])
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    sample = EditSample(image, "a", [[[10, 20], [40, 30]]])
    seen = []
    watched = editor.edit(sample, watch=lambda step, handles, preview: seen.append((step, handles, preview)))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert np.array_equal(np.stack([handles for _, handles, _ in seen]), watched.trajectory)
    assert [preview is not None for _, _, preview in seen] == [True, False, True, False]
    assert all(np.array_equal(seen[step][2], picture) for step, picture, _ in watched.frames)
    assert np.array_equal(editor.edit(sample).image, watched.image)


def test_a_model_is_gone_before_the_next_is_loaded(tiny_sd, tiny_pipeline, monkeypatch):
    models: list[weakref.ref[StableDiffusion]] = []

    def load(settings):
        assert not any(model() for model in models)
        backbone = load_backbone(settings)
        models.append(weakref.ref(backbone))
        return backbone

    monkeypatch.setattr("dragdiff.editor.load_backbone", load)
    one = OneModel()
    for folder in (tiny_sd, tiny_pipeline):
        one.editor(load_config(overrides=[*QUICK, f"model.path={folder}"])).edit(SAMPLE)
    assert len(models) == 2
