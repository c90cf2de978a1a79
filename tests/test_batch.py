"""Many edits at once: each comes out as it would by itself, but for rounding."""

import copy
import csv
import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.amp import GradScaler

from dragdiff import Editor, EditSample
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.cli import main_edit
from dragdiff.config import load_config, load_study
from dragdiff.data.readers import write_folder
from dragdiff.errors import UserError
from dragdiff.job import EditResult, Request
from dragdiff.models.lora_finetune import LoRAFinetune
from dragdiff.models.trainer import Recording
from dragdiff.modules import ddim, lora
from dragdiff.modules.images import to_tensor
from dragdiff.stages import adapters
from dragdiff.study import runner
from dragdiff.study.plan import expand

QUICK = [
    "cache.enabled=false",
    "model.device=cpu",
    "ddim.steps=4",
    "ddim.strength=0.5",
    "drag.steps=5",
    "lora.steps=3",
    "lora.batch_size=2",
    "lora.rank=3",
    "lora.lr=0.01",
    "lora.resolution=64",
    "output.frames_every=2",
    "generate.height=64",
    "generate.width=64",
]
TARGETS = StableDiffusion.lora_targets


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    noise = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, size, mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0) * 255).numpy().astype(np.uint8)


def half(size: tuple[int, int] = (64, 64)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 4 :] = 255
    return mask


SAMPLES = [
    EditSample(picture(0), "a cat", [[[20, 20], [40, 30]]], None, "one"),
    EditSample(picture(1), "a dog on a hill", [[[10, 40], [30, 44]], [[50, 20], [44, 40]]], half(), "two"),
    EditSample(picture(2, (66, 70)), "a house", [[[30, 30], [31, 30]]], half((66, 70)), "three"),  # arrives at once
]

WIDE = EditSample(picture(0, (64, 96)), "", [[[9, 9], [20, 9]]])


def editor(backbone: Any, *overrides: str, **kwargs: Any) -> Editor:
    return Editor(load_config(overrides=[*QUICK, *overrides]), backbone, **kwargs)


def assert_same(together: EditResult | UserError, alone: EditResult) -> None:
    """Rounding decides the sign of a few first steps of Adam's, so not every entry of a latent is equal."""
    assert isinstance(together, EditResult), together
    assert (together.steps, together.stop_reason) == (alone.steps, alone.stop_reason)
    assert (together.trajectory is None) == (alone.trajectory is None)
    if alone.trajectory is not None:
        np.testing.assert_allclose(together.trajectory, alone.trajectory)
    assert np.abs(together.image.astype(int) - alone.image.astype(int)).mean() < 0.5
    assert [step for step, _, _ in together.frames] == [step for step, _, _ in alone.frames]
    assert together.image.shape == alone.image.shape


@pytest.mark.parametrize("overrides", [[], ["lora.steps=0"], ["control.start_step=1", "lora.crop=pixel"]])
def test_a_batch_is_its_edits_one_by_one(backbone, overrides):
    one_by_one = [editor(backbone, *overrides).edit(sample) for sample in SAMPLES]
    assert len({result.steps for result in one_by_one}) > 1  # some leave the batch before others
    changed = [
        np.abs(r.image.astype(int) - s.image.astype(int)).mean() for r, s in zip(one_by_one, SAMPLES, strict=True)
    ]
    assert min(changed) > 2  # so that "the same" says something
    together = editor(backbone, *overrides).edit_batch([Request(sample) for sample in SAMPLES])
    for result, alone in zip(together, one_by_one, strict=True):
        assert_same(result, alone)


def test_no_edit_sees_another(backbone):
    """Not one bit of an edit depends on what is beside it."""
    noise = dataclasses.replace(SAMPLES[1], image=255 - SAMPLES[1].image, prompt="something else")
    first, _ = editor(backbone).edit_batch([Request(SAMPLES[0]), Request(SAMPLES[1])])
    again, _ = editor(backbone).edit_batch([Request(SAMPLES[0]), Request(noise)])
    assert np.array_equal(first.image, again.image) and np.array_equal(first.trajectory, again.trajectory)


def test_drags_of_one_picture_differ_in_their_loss_and_share_the_rest(backbone, monkeypatch):
    settings = [
        load_config(overrides=[*QUICK, "output.frames_every=0", *more])
        for more in (
            ["drag.lr=0.05"],
            ["drag.steps=2", "drag.motion_radius=3", "drag.tracking_radius=1"],
            ["drag.mask_weight=0", "drag.stop_distance=0.5"],
            ["drag.steps=0"],
            ["drag.grid_scale=1", "drag.mask_weight=2"],
        )
    ]
    alone = [Editor(config, backbone).edit(SAMPLES[1]) for config in settings]
    rows: Counter[str] = Counter()
    predict, invert = backbone.predict, ddim.invert

    def counted(latents: Tensor, *args: Any) -> Tensor:
        rows["predict"] += len(latents)
        return predict(latents, *args)

    def inverted(network: Any, latent: Tensor, **kwargs: Any) -> list[Tensor]:
        rows["inverted"] += len(latent)
        return invert(network, latent, **kwargs)

    monkeypatch.setattr(backbone, "predict", counted)
    monkeypatch.setattr(ddim, "invert", inverted)
    together = editor(backbone).edit_batch([Request(SAMPLES[1], config) for config in settings])
    for result, before, config in zip(together, alone, settings, strict=True):
        assert_same(result, before)
        assert result.config == config
    assert rows["inverted"] == 1
    lora_rows, inversion, drags, edited, source = 3 * 2, 2, 5 + 2 + 5 + 5, 5 * 2, 2
    assert rows["predict"] == lora_rows + inversion + drags + edited + source


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_generated_pictures(backbone, scheduler):
    settings = ["generate.enabled=true", f"generate.scheduler={scheduler}", "generate.guidance=3", "ddim.steps=6"]
    blank = np.zeros((64, 64, 3), np.uint8)
    prompts = ["a cat", "a dog", "a cat"]
    samples = [EditSample(blank, p, [[[20, 20], [40, 20 + 4 * i]]]) for i, p in enumerate(prompts)]
    alone = [editor(backbone, *settings).edit(sample) for sample in samples]
    for result, before in zip(
        editor(backbone, *settings).edit_batch([Request(s) for s in samples]), alone, strict=True
    ):
        assert_same(result, before)
        assert np.abs(result.sample.image.astype(int) - before.sample.image.astype(int)).max() <= 1


@pytest.mark.parametrize("control", ["control.enabled=true", "control.enabled=false"])
def test_a_refused_edit_of_a_generated_picture_takes_no_others_source(backbone, control):
    settings = ["generate.enabled=true", "generate.scheduler=dpm++2m", "ddim.steps=6", control]
    tiny = np.zeros((64, 64), np.uint8)
    tiny[0, 1] = 255
    pair = [[[20, 20], [40, 20]]]
    blank = np.zeros((64, 64, 3), np.uint8)
    refused, good = EditSample(blank, "a dog", pair, tiny), EditSample(blank, "a cat", pair)
    small, result = editor(backbone, *settings).edit_batch([Request(refused), Request(good)])
    assert isinstance(small, UserError)
    assert_same(result, editor(backbone, *settings).edit(good))


# ------------------------------------------------------------------------------------------- LoRA


def decided(paths: Iterable[str]) -> list[str]:
    """The middle block has one token: its softmax is 1, and these projections' gradients are rounding alone."""
    return [p for p in paths if not p.startswith("mid_block") or not p.endswith(("attn1.to_q", "attn1.to_k"))]


def assert_same_lora(one: Any, other: lora.LoRA) -> None:
    assert one.down.keys() == other.down.keys() and one.scale == other.scale
    for part, expected in ((one.down, other.down), (one.up, other.up)):
        difference = torch.cat([(part[path] - expected[path]).abs().flatten() for path in decided(expected)])
        # as in test_traces_lora: Adam's first step is of full size also where a gradient is zero but for rounding
        assert (difference > 1e-4).float().mean() < 0.01


def trained(editor: Editor, samples: list[EditSample]) -> list[lora.LoRA | UserError]:
    """The samples' LoRAs, trained in one batch."""
    with editor.backbone.frozen(editor.config.model):
        return adapters.trained_loras(editor.job(samples), [None] * len(samples))


def largest(made: lora.LoRA) -> float:
    return max(float(up.abs().max()) for up in made.up.values())


def test_loras_trained_together_are_those_trained_alone(backbone):
    settings = ["lora.steps=6", "lora.weight_decay=0.1"]
    alone = [editor(backbone, *settings).finetune(sample) for sample in SAMPLES]
    together = trained(editor(backbone, *settings), SAMPLES)
    for one, other in zip(together, alone, strict=True):
        assert_same_lora(one, other)
        assert all(torch.cat([v.flatten() for v in part.values()]).max() > 0.03 for part in (other.down, other.up))
    assert not torch.allclose(together[0].up[path := next(iter(alone[0].up))], together[1].up[path], atol=1e-3)


def state(network: torch.nn.Module) -> list[dict[str, Any]]:
    """What stands in each module of a network: weights, submodules, hooks."""
    return [
        {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for module in network.modules()
    ]


def test_each_row_has_its_own_lora(backbone):
    """Against the network with the LoRA in its weights, in float64; with ranks, scales and modules of their own."""
    unet = copy.deepcopy(backbone.network).double()
    loras: list[lora.LoRA | None] = []
    for seed, rank in ((0, 4), (1, 2)):
        generator = torch.Generator().manual_seed(seed)
        beside = lora.trainable(unet, TARGETS, rank=rank, alpha=2 * rank, seed=seed, pictures=1)
        with beside as ((weights,), current):
            for weight in weights.values():
                weight.data.normal_(std=0.1, generator=generator)
            loras.append(current(0))
    path = next(iter(loras[1].down))
    del loras[1].down[path], loras[1].up[path], loras[1].scale[path]
    loras.append(None)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((5, 4, 8, 8), generator=generator, dtype=torch.float64)
    context = torch.randn((5, 77, unet.config.cross_attention_dim), generator=generator, dtype=torch.float64)
    pictures = [2, 0, 1, 0, 1]
    expected = []
    for row, picture_number in enumerate(pictures):
        with lora.merged(unet, loras[picture_number]), torch.no_grad():
            expected.append(unet(latents[row : row + 1], torch.tensor(500), context[row : row + 1]).sample)
    hooked = unet.get_submodule(next(iter(loras[0].up)))  # by its owner
    own = hooked.register_forward_hook(lambda module, inputs, output: output + 0)
    before = state(unet)
    with lora.unmerged(unet, loras) as rows, torch.no_grad():
        rows.pictures = pictures
        actual = unet(latents, torch.tensor(500), context).sample
        twice = unet(torch.cat([latents] * 2), torch.tensor(500), torch.cat([context] * 2)).sample  # guidance
    assert state(unet) == before
    own.remove()
    torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-4)  # the LoRAs compute in float32
    torch.testing.assert_close(twice, torch.cat([actual, actual]), rtol=0, atol=1e-5)
    assert (expected[1] - expected[3]).abs().max() > 0.1


def test_a_lora_of_another_model_is_refused_in_a_batch(backbone, tmp_path):
    network = backbone.network
    good = next(name for name, module in network.named_modules() if name.endswith("attn1.to_q"))
    size = network.get_submodule(good).in_features
    wrong = lora.LoRA(
        {path: torch.ones(1, size) for path in (good, "mid_block.nothing")},
        {path: torch.ones(size, 1) for path in (good, "mid_block.nothing")},
        dict.fromkeys((good, "mid_block.nothing"), 1.0),
    )
    before = state(network)
    with pytest.raises(UserError, match="another model"), lora.unmerged(network, [wrong, None]):
        pass
    assert state(network) == before


# ------------------------------------------------------------------------------------------- what goes wrong


def test_one_that_fails_takes_nothing_from_the_others(backbone):
    tiny = np.zeros((64, 64), np.uint8)
    tiny[0, 1] = 255  # vanishes at the latent's size
    samples = [SAMPLES[0], dataclasses.replace(SAMPLES[1], mask=tiny), SAMPLES[1]]
    settings = [None, None, load_config(overrides=[*QUICK, "drag.lr=500"])]
    first, small, diverged = editor(backbone).edit_batch(
        [Request(sample, config) for sample, config in zip(samples, settings, strict=True)]
    )
    assert_same(first, editor(backbone).edit(SAMPLES[0]))
    assert isinstance(small, UserError) and "vanishes" in str(small)
    assert isinstance(diverged, EditResult) and "diverged at step" in diverged.stop_reason


def test_a_sample_that_does_not_fit_takes_nothing_from_the_others(backbone):
    long = EditSample(picture(1, (16, 200)), "a dog", [[[10, 8], [30, 8]]])  # 5 px high at the working size
    first, bad = editor(backbone, "data.max_size=64").edit_batch([Request(SAMPLES[0]), Request(long)])
    assert isinstance(bad, UserError)
    assert_same(first, editor(backbone, "data.max_size=64").edit(SAMPLES[0]))


def test_a_sample_of_another_size_than_is_generated_takes_nothing_from_the_others(backbone):
    small = EditSample(picture(1, (32, 32)), "a dog", [[[10, 8], [30, 8]]], np.full((32, 32), 255, np.uint8))
    first, bad = editor(backbone, "generate.enabled=true").edit_batch([Request(SAMPLES[0]), Request(small)])
    assert isinstance(bad, UserError)
    assert_same(first, editor(backbone, "generate.enabled=true").edit(SAMPLES[0]))


class Counting(L.Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def test_edits_may_share_a_callback(backbone):
    """Which the Trainer calls once in each step."""
    alone, shared = Counting(), Counting()
    editor(backbone).edit(SAMPLES[0], callbacks=[alone])
    editor(backbone).edit_batch([Request(SAMPLES[0], callbacks=[shared]), Request(SAMPLES[1], callbacks=[shared])])
    assert alone.batches == shared.batches > 1


class Narrow(GradScaler):
    """Loss scaling of a run whose gradients overflow as long as its scale is above a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__("cpu")
        self.limit = limit

    def scale(self, outputs: Any) -> Any:
        return super().scale(outputs) * (1.0 if self.get_scale() <= self.limit else float("inf"))


def scaled(monkeypatch: pytest.MonkeyPatch, *limits: int) -> None:
    """Give the runs of the next batch narrow scaling."""
    left = iter(limits)
    monkeypatch.setattr("dragdiff.models.separate.GradScaler", lambda device, enabled: Narrow(next(left)))


def test_a_picture_whose_loss_overflows_holds_back_no_other(backbone, monkeypatch):
    """As under fp16: torch's loss scaling begins with 2**16 and halves it with each step that it leaves out."""
    scaled(monkeypatch, 2**20, 2**14)
    first, second = trained(editor(backbone), SAMPLES[:2])
    alone, lr = editor(backbone).finetune(SAMPLES[0]), load_config(overrides=QUICK).lora.lr
    assert_same_lora(first, alone)
    # one of three steps is left, and it is Adam's first, which moves each entry by the learning rate
    assert largest(second) == pytest.approx(lr, rel=1e-4)
    scaled(monkeypatch, 2**14, 2**15)
    again, other = trained(editor(backbone), [SAMPLES[1], SAMPLES[2]])
    assert_same_lora(again, second)
    assert lr < largest(other) < largest(first)


def test_a_drag_whose_gradient_overflows_holds_back_no_other(backbone, monkeypatch):
    settings = ["lora.steps=0", "drag.stop_distance=0"]  # so that none arrives at once
    one_by_one, limits = [], (2**14, 2**20, 2**12)
    for sample, limit in zip(SAMPLES, limits, strict=True):
        scaled(monkeypatch, limit)
        one_by_one.append(editor(backbone, *settings).edit(sample))
    scaled(monkeypatch, *limits)
    together = editor(backbone, *settings).edit_batch([Request(sample) for sample in SAMPLES])
    monkeypatch.undo()
    never = [editor(backbone, *settings).edit(sample) for sample in SAMPLES]
    for result, alone in zip(together, one_by_one, strict=True):
        assert_same(result, alone)
    same = [np.array_equal(one.image, other.image) for one, other in zip(one_by_one, never, strict=True)]
    assert same == [False, True, False]  # scaling by a power of two rounds nothing


@pytest.mark.parametrize(("since", "words"), [(0, "its LoRA's loss, is not finite"), (2, "diverged: try a smaller")])
def test_a_lora_whose_losses_overflow_is_not_taken_for_trained(backbone, monkeypatch, tmp_path, since, words):
    """As under fp16, where a loss scaler leaves out each of these steps, so that its weights stay finite."""
    step = LoRAFinetune.training_step

    def overflows(self: LoRAFinetune, number: int) -> Tensor:
        loss = step(self, number)
        self.lost[-1] = max(0, self.steps_done - since)
        return loss

    monkeypatch.setattr(LoRAFinetune, "training_step", overflows)
    both = editor(backbone, "lora.steps=8", "cache.enabled=true", f"cache.folder={tmp_path}")
    both.share_loras(SAMPLES[:2], [1, 8])  # the second's first step is good if it diverges later
    assert len([path for path in (tmp_path / "lora").iterdir() if path.is_dir()]) == (2 if since == 0 else 3)
    first, bad = both.edit_batch([Request(SAMPLES[0]), Request(SAMPLES[1])])
    assert isinstance(first, EditResult)
    assert isinstance(bad, UserError) and words in str(bad)


def test_single_losses_that_overflow_are_no_divergence(backbone, monkeypatch):
    step = LoRAFinetune.training_step

    def overflows(self: LoRAFinetune, number: int) -> Tensor:
        loss = step(self, number)
        self.lost[:] = self.steps_done % 2
        return loss

    monkeypatch.setattr(LoRAFinetune, "training_step", overflows)
    assert isinstance(editor(backbone).edit(SAMPLES[0]), EditResult)


def test_a_picture_whose_latent_is_not_finite_is_the_end_of_its_own_edits(backbone, monkeypatch):
    encode, broken = backbone.encode, to_tensor(SAMPLES[1].image)

    def encoded(images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode(images)
        return (mean / 0, std) if torch.equal(images, broken) else (mean, std)

    monkeypatch.setattr(backbone, "encode", encoded)
    first, bad = editor(backbone).edit_batch([Request(SAMPLES[0]), Request(SAMPLES[1])])
    assert isinstance(first, EditResult) and first.steps > 0
    assert isinstance(bad, UserError) and "not finite" in str(bad)
    assert_same(first, editor(backbone).edit(SAMPLES[0]))


def limited(backbone: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Memory for so many rows of a forward; notes how many each has had."""
    predict, rows = backbone.predict, list[int]()

    def small(latents: Tensor, *args: Any) -> Tensor:
        if len(latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(len(latents))
        return predict(latents, *args)

    monkeypatch.setattr(backbone, "predict", small)
    return rows


class Told:
    """Notes the steps whose LoRA loss it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        if "lora/loss" in values:
            self.steps.append(step)


def test_a_batch_too_large_for_the_memory_goes_on_one_by_one(backbone, monkeypatch):
    rows, kept = limited(backbone, monkeypatch, 4), list[int]()

    def report(stage: str, done: int, total: int, note: str) -> None:
        if (stage, done) == ("LoRA", 0):
            kept.append(len(one.kept["references"]))

    logger, told, one = Recording(), Told(), editor(backbone, "cache.reference_mb=100", report=report)
    with pytest.warns(UserWarning, match="too small for 3 edits at once: they go on one by one"):
        results = one.edit_batch([Request(SAMPLES[0], logger=logger), *map(Request, SAMPLES[1:])])
    assert max(rows) == 2  # two draws each
    assert kept == [0] * 4 and one.kept["references"]  # what an edit keeps is not in the way of the next
    monkeypatch.undo()
    for result, sample in zip(results, SAMPLES, strict=True):
        assert_same(result, editor(backbone).edit(sample))
    logger.replay(told)
    assert told.steps == [0, 1, 2]


def test_an_edit_too_large_for_the_memory_takes_nothing_from_the_others(backbone, monkeypatch):
    limited(backbone, monkeypatch, 1)
    requests = [Request(sample) for sample in SAMPLES[:2]]
    broken, encode = to_tensor(SAMPLES[1].image), backbone.encode

    def encoded(images: Tensor) -> tuple[Tensor, Tensor]:
        if torch.equal(images, broken):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    monkeypatch.setattr(backbone, "encode", encoded)
    with pytest.warns(UserWarning, match="too small for 2 edits at once"):
        first, large = editor(backbone, "lora.steps=0").edit_batch(requests)
    assert isinstance(first, EditResult)
    assert isinstance(large, UserError) and "memory is too small" in str(large)
    with pytest.raises(torch.OutOfMemoryError):
        editor(backbone, "lora.steps=0").edit_batch(requests[1:])


def test_loras_that_edits_share_are_trained_together(backbone, monkeypatch, tmp_path):
    settings = ["cache.enabled=true", f"cache.folder={tmp_path}"]
    rows = limited(backbone, monkeypatch, 6)
    shared = editor(backbone, *settings)
    shared.share_loras(SAMPLES, [1, 2])
    assert rows == [6, 6] and shared.ran_together == 3  # two draws for each picture
    monkeypatch.undo()
    for sample in SAMPLES:
        found = editor(backbone, "lora.steps=2", *settings).finetune(sample)
        alone = editor(backbone, "lora.steps=2").finetune(sample)
        assert alone is not None
        assert_same_lora(found, alone)
    assert len([path for path in (tmp_path / "lora").iterdir() if path.is_dir()]) == 6
    limited(backbone, monkeypatch, 5)
    with pytest.raises(torch.OutOfMemoryError):
        shared.share_loras(SAMPLES, [3])


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "at least one"),
        ([Request(SAMPLES[0]), Request(WIDE)], r"one size.*\(8, 12\)"),
        ([Request(SAMPLES[0], load_config(overrides=[*QUICK, "drag.features=[mid_block]"]))], r"drag\.features is"),
        ([Request(SAMPLES[0], load_config(overrides=[*QUICK, "lora.rank=4"]))], r"lora\.rank is 4 .* and 3 in"),
        ([Request(SAMPLES[0], dataclasses.replace(load_config(overrides=QUICK), seed=-1))], r"seed is -1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_into_a_batch_is_said_before_any_work(backbone, requests, message):
    stages: list[str] = []
    with pytest.raises(UserError, match=message):
        editor(backbone, report=lambda *step: stages.append(step[0])).edit_batch(requests)
    assert not stages


# ------------------------------------------------------------------------------------------- files, logs, cache


def test_files_and_logs_are_those_of_single_edits(backbone, tmp_path):
    settings = ["logger.kind=csv", "lora.steps=2"]
    for sample in SAMPLES[:2]:
        editor(backbone, *settings).edit_and_save(sample, tmp_path / "alone" / sample.name)
    requests = [Request(sample, folder=tmp_path / "together" / sample.name) for sample in SAMPLES[:2]]
    editor(backbone, *settings).edit_and_save_batch(requests)
    for name in ("one", "two"):
        alone, together = tmp_path / "alone" / name, tmp_path / "together" / name
        files = {str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file()}
        assert files == {str(path.relative_to(together)) for path in together.rglob("*") if path.is_file()}
        assert (alone / "config.yaml").read_text() == (together / "config.yaml").read_text()
        one, other = (read_csv(folder / "log" / "metrics.csv") for folder in (alone, together))
        assert [row.keys() for row in one] == [row.keys() for row in other]
        for before, after in zip(one, other, strict=True):
            for key in before:
                assert (before[key] == "") == (after[key] == "")
                if before[key]:
                    assert float(after[key]) == pytest.approx(float(before[key]), rel=1e-2, abs=1e-4), key


def test_loggers_of_ones_own_are_told_and_saved(backbone, tmp_path):
    requests = [Request(s, logger=CSVLogger(tmp_path, name="", version=s.name)) for s in SAMPLES[:2]]
    editor(backbone).edit_batch(requests)
    for name in ("one", "two"):
        rows = read_csv(tmp_path / name / "metrics.csv")
        assert sum(bool(row["lora/loss"]) for row in rows) == 3 and sum(bool(row["drag/loss"]) for row in rows) > 1


@pytest.mark.parametrize("folders", [(None, "a"), ("a", "a")])
def test_each_edit_of_a_batch_needs_a_folder_of_its_own(backbone, tmp_path, folders):
    requests = [Request(s, folder=f and tmp_path / f) for s, f in zip(SAMPLES, folders, strict=False)]
    with pytest.raises(UserError, match="a folder of its own"):
        editor(backbone).edit_and_save_batch(requests)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_no_edit(backbone, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("dragdiff.cache.save_file", full)
    with pytest.warns(UserWarning, match="cannot write the cache"):
        result = editor(backbone, "cache.enabled=true", f"cache.folder={tmp_path}", "lora.steps=0").edit(SAMPLES[0])
    assert result.steps > 0


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_batch_trains_and_inverts_only_what_is_missing(backbone, tmp_path):
    settings = ["cache.enabled=true", f"cache.folder={tmp_path}"]
    stages: list[tuple[str, str]] = []

    def report(stage: str, done: int, total: int, note: str) -> None:
        if done == total and stage in ("LoRA", "inversion"):
            stages.append((stage, note if note == "from the cache" else ""))

    alone = editor(backbone, *settings).edit(SAMPLES[1])
    first = editor(backbone, *settings, report=report).edit_batch([Request(sample) for sample in SAMPLES])
    assert sorted(stages) == [
        ("LoRA", ""),
        ("LoRA", "from the cache"),
        ("inversion", ""),
        ("inversion", "from the cache"),
    ]
    assert_same(first[1], alone)
    stages.clear()
    again = editor(backbone, *settings, report=report).edit_batch([Request(sample) for sample in SAMPLES])
    assert set(stages) == {("LoRA", "from the cache"), ("inversion", "from the cache")}
    assert all(np.array_equal(one.image, other.image) for one, other in zip(first, again, strict=True))
    stages.clear()
    editor(backbone, *settings, report=report).edit(SAMPLES[2])  # what the batch kept serves single edits
    assert set(stages) == {("LoRA", "from the cache"), ("inversion", "from the cache")}


def folder_of(tmp_path: Path) -> Path:
    """Four samples of two sizes, one of them bad."""
    for name, sample in {"a": SAMPLES[0], "b": WIDE, "c": SAMPLES[1], "d": SAMPLES[0]}.items():
        (tmp_path / "samples").mkdir(exist_ok=True)
        write_folder(sample, tmp_path / "samples" / name)
    (tmp_path / "samples" / "d" / "edit.json").write_text("{")
    return tmp_path / "samples"


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many edits each batch of the test has had."""
    sizes: list[int] = []
    edit_batch = Editor.edit_batch

    def counted(self: Editor, requests: Any) -> Any:
        sizes.append(len(requests))
        return edit_batch(self, requests)

    monkeypatch.setattr(Editor, "edit_batch", counted)
    return sizes


def test_the_command_edits_a_folder_in_batches(tiny_sd, tmp_path, capsys, batches):
    folder = folder_of(tmp_path)
    settings = [f"model.path={tiny_sd}", *QUICK, "lora.steps=1", f"sample={folder}"]
    assert main_edit([*settings, f"output.folder={tmp_path / 'alone'}"]) == 2
    assert batches == [1, 1, 1]
    assert main_edit([*settings, f"output.folder={tmp_path / 'together'}", "edit.batch=8"]) == 2
    assert batches[3:] == [2, 1]
    said = capsys.readouterr()
    assert said.out.count("wrote") == 6 and said.err.count("passing over d") == 2
    for name in "abc":
        one, other = (np.asarray(Image.open(tmp_path / way / name / "edited.png")) for way in ("alone", "together"))
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 0.5
        config = load_config([tmp_path / "together" / name / "config.yaml"])
        assert config.sample == str(folder / name)


# ------------------------------------------------------------------------------------------- studies


def test_a_study_runs_its_edits_in_batches(tiny_sd, tmp_path, batches):
    """Of several pictures, and several variants whose difference is in the loss; scores are those of one by one."""
    study = tmp_path / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "base": ["debug"],
                "settings": {
                    "model": {"path": str(tiny_sd), "device": "cpu"},
                    "lora": {"steps": 2, "rank": 2, "resolution": 64},
                    "drag": {"steps": 4},
                    "cache": {"enabled": True, "folder": str(tmp_path / "cache")},
                },
                "data": {"path": "scenes", "scenes": 2, "categories": ["sun"]},
                "grid": {"drag.lr": [0.01, 0.1], "ddim.steps": [4, 5]},
                "metrics": {"names": ["scene"]},
            }
        )
    )
    found = {}
    for batch in (0, 3, 4):
        results = tmp_path / f"results-{batch}"
        plan = expand(load_study(study, [f"results={results}", f"batch={batch}"]))
        summary = runner.run(plan)
        assert summary.done == summary.total == 8 + 2 * 3 and not summary.failed
        found[batch] = {
            path.parent.name: np.asarray(Image.open(path)) for path in sorted(results.glob("results/*/edited.png"))
        }
        sizes = {0: [1] * 8, 3: [3, 3, 1, 1], 4: [4, 4]}[batch]
        assert sorted(batches, reverse=True) == sizes
        batches.clear()
    assert found[0].keys() == found[3].keys() == found[4].keys()
    for key, picture_alone in found[0].items():
        for batch in (3, 4):
            assert np.abs(found[batch][key].astype(int) - picture_alone.astype(int)).mean() < 0.5
