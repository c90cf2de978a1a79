"""What every method owes the house: work as declared, layers of settings, batches, generated pictures, one cache."""

import copy
import dataclasses
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from test_batch import SAMPLES, assert_same, half, picture
from torch import Tensor

from dragdiff import Editor, EditResult, EditSample, Request, methods, output
from dragdiff.backbones.diffusion import Condition
from dragdiff.backbones.loading import load_backbone
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import Config, load_config, to_yaml
from dragdiff.errors import UserError
from dragdiff.methods.method import total_steps
from dragdiff.options import walk

QUICK = [
    "cache.enabled=false",
    "model.device=cpu",
    "ddim.steps=4",
    "ddim.strength=0.5",
    "lora.steps=2",
    "lora.batch_size=2",
    "lora.rank=2",
    "lora.resolution=64",
    "output.frames_every=2",
    "generate.height=64",
    "generate.width=64",
]
OWN = {
    "dragdiffusion": ["drag.steps=3"],
    "dragnoise": ["drag.steps=3", "dragnoise.end_step=1"],
    "gooddrag": ["gooddrag.levels=2", "gooddrag.trackings=2", "gooddrag.updates=2"],
}
GENERATED = ["generate.enabled=true", "generate.guidance=3"]
DEFAULT = "dragdiffusion"


def config(method: str, *overrides: str) -> Config:
    return load_config(overrides=[f"method={method}", *QUICK, *OWN.get(method, []), *overrides])


def values(settings: Config) -> dict[str, Any]:
    return {key: value for key, _, value in walk(settings)}


class Counting(StableDiffusion):
    """Counts the rows that the network is given."""

    rows = 0

    def predict(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows += len(latents)
        return super().predict(latents, t, condition)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> Counting:
    return Counting(
        load_backbone(load_config(overrides=[f"model.path={tiny_pipeline}", "model.device=cpu"]).model).pipeline
    )


@pytest.fixture(params=methods.NAMES)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


# ------------------------------------------------------------------------------------------- what it says of itself


def test_what_it_reads_and_publishes_is_there(method):
    found = methods.find(method)
    options = values(config(method))
    assert found.name == method and found.title and found.summary.endswith(".")
    assert 2000 < found.year < 2100 and len(found.paper) == len("2306.14435")
    for beginning in found.reads:
        assert any(key == beginning or key.startswith(f"{beginning}.") for key in options), beginning
    published = values(load_config(overrides=[f"method={method}"]))
    for key, value in found.published.items():
        assert found.reads_key(key) and published[key] == value


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["output.frames_every=0", "lora.steps=0"],
        ["control.enabled=false"],
        GENERATED,
        [*GENERATED, "generate.guidance=1", "output.frames_every=0"],
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not read control", "ignore:without a mask")
def test_it_does_no_more_than_it_declares(backbone, method, overrides):
    settings = config(method, *overrides)
    declared = methods.find(method).stages(settings)
    most, seen = total_steps(declared), Counter[str]()

    def report(stage: str, done: int, total: int, note: str) -> None:
        seen[stage] = max(seen[stage], done)
        assert done <= total <= most[stage]

    backbone.rows = 0
    sample = EditSample(picture(0), "a cat", [[[10, 10], [50, 50]]], half())
    Editor(settings, backbone, report=report).edit(sample)
    calls = sum(stage.calls for stage in declared)
    assert calls / 2 <= backbone.rows <= calls
    assert seen.keys() == most.keys()


def test_a_sample_without_points_is_refused(backbone, method):
    with pytest.raises(UserError, match=f"there are no points, and {method} needs them"):
        Editor(config(method), backbone).edit(EditSample(picture(0), "a cat", []))


# ------------------------------------------------------------------------------------------- settings in layers


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """For the default method, with what it wants of another."""
    file = tmp_path / "overlay.yaml"
    wanted = {"drag": {"lr": 0.7}, "dragnoise": {"end_step": 1}}
    file.write_text(
        yaml.safe_dump(
            {"seed": 7, "drag": {"lr": 0.5}, "ddim": {"steps": 20}, "methods": {"dragnoise": wanted}}, sort_keys=False
        )
    )
    return file


def test_plain_keys_of_an_overlay_are_for_the_default_method(overlay, recwarn):
    default, other = load_config([overlay]), load_config([overlay], ["method=fastdrag"])
    assert (default.method, default.drag.lr, default.ddim.steps, default.seed) == (DEFAULT, 0.5, 20, 7)
    assert (other.method, other.drag.lr, other.ddim.steps, other.seed) == ("fastdrag", 0.01, 10, 7)
    assert not recwarn


def test_what_an_overlay_wants_of_a_method_stands_below_its_name(overlay, recwarn):
    found = load_config([overlay], ["method=dragnoise"])
    assert (found.drag.lr, found.own.end_step, found.lora.steps, found.ddim.steps) == (0.7, 1, 200, 50)
    assert load_config([overlay], ["method=dragnoise", "drag.lr=0.9"]).drag.lr == 0.9
    assert not recwarn


def test_an_overlay_that_names_its_method_is_for_that_one(tmp_path, overlay):
    file = tmp_path / "own.yaml"
    file.write_text("method: dragnoise\ndrag: {lr: 0.3}\n")
    found = load_config([overlay, file])
    assert (found.method, found.drag.lr, found.own.end_step) == ("dragnoise", 0.3, 1)
    with pytest.warns(UserWarning, match="says? of drag is meant for dragnoise: gooddrag has its published values"):
        other = load_config([overlay, file], ["method=gooddrag"])
    assert other.drag.lr == methods.find("gooddrag").published["drag.lr"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods: {dragnoize: {}}", "method is 'dragnoize'.*did you mean 'dragnoise'"),
        ("methods: 3", "it must hold settings by the names of methods"),
        ("methods: {dragdiffusion: {drag: {lrr: 1}}}", "unknown key 'drag.lrr' below methods.dragdiffusion"),
        ("method: dragnoize", "method is 'dragnoize'.*did you mean 'dragnoise'"),
        ("dragnoise: {end_step: 1}", "unknown key 'dragnoise"),
    ],
)
def test_layers_that_say_nothing_sensible_are_refused(tmp_path, text, words):
    (tmp_path / "overlay.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_config([tmp_path / "overlay.yaml"])
    assert "\n" not in str(caught.value)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gooddrag'"):
        load_config(overrides=["method=godrag"])


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        (["control.start_step=1"], ["control.start_step"]),
        ([{"control": {"start_step": 1}, "drag": {"lr": 0.1}}], ["control.start_step"]),
        (
            ["control={start_step: 1}", "seed=3", "dragnoise.end_step=1", "output.frames_every=0"],
            ["control.start_step"],
        ),
        (["lora={steps: 3}", "drag.lr=0.1"], []),
    ],
)
def test_a_key_that_the_method_does_not_read_is_noted(recwarn, overrides, unread):
    load_config(overrides=["method=dragnoise", *overrides])
    assert [str(note.message) for note in recwarn] == [
        f"dragnoise does not read {key}: it changes nothing" for key in unread
    ]


def test_a_part_of_a_section_may_be_what_a_method_reads(recwarn):
    load_config(overrides=["method=gooddrag", "drag={lr: 0.1}"])
    assert not recwarn
    load_config(overrides=["method=gooddrag", "drag={lr: 0.1, steps: 3}"])
    assert [str(note.message) for note in recwarn] == ["gooddrag does not read drag.steps: it changes nothing"]


def test_a_saved_config_alone_gives_the_same(tmp_path, method, recwarn):
    saved = config(method, "seed=7", "prompt='${x} # y'")
    recwarn.clear()
    (tmp_path / "config.yaml").write_text(to_yaml(saved), "utf-8")
    assert load_config([tmp_path / "config.yaml"]) == saved
    assert load_config([tmp_path / "config.yaml"], [f"method={method}"]) == saved
    assert not recwarn


def test_another_method_over_a_saved_config_takes_its_own_published_values(tmp_path, method):
    saved = config(method, "seed=7", "lora.rank=5")
    (tmp_path / "config.yaml").write_text(to_yaml(saved), "utf-8")
    for other in methods.NAMES:
        if other == method:
            continue
        with pytest.warns(UserWarning, match=f"is meant for {method}: {other} has its published values"):
            found = load_config([tmp_path / "config.yaml"], [f"method={other}"])
        alone = load_config(overrides=[f"method={other}"])
        assert (found.lora, found.ddim, found.drag, found.control) == (
            alone.lora,
            alone.ddim,
            alone.drag,
            alone.control,
        )
        assert found.own == alone.own and not hasattr(found, method)
        assert (found.seed, found.output, found.generate) == (7, saved.output, saved.generate)


def test_a_config_is_pickled_and_copied_with_the_methods_own_settings(method):
    settings = config(method)
    for other in (pickle.loads(pickle.dumps(settings)), copy.deepcopy(settings), copy.copy(settings)):
        assert other == settings and type(other) is type(settings) and other.own == settings.own
    changed = dataclasses.replace(settings, seed=9)
    assert changed.own == settings.own and changed != settings


# ------------------------------------------------------------------------------------------- edits


@pytest.mark.filterwarnings("ignore:without a mask")
def test_a_batch_is_its_edits_one_by_one(backbone, method):
    """Also where edits of one picture stand between those of others."""
    settings = config(method, "lora.lr=0.01")
    again = dataclasses.replace(SAMPLES[1], points=SAMPLES[1].points[:1])
    samples = [SAMPLES[1], SAMPLES[2], again, SAMPLES[0]]
    together = Editor(settings, backbone).edit_batch([Request(sample) for sample in samples])
    for result, sample in zip(together, samples, strict=True):
        assert_same(result, Editor(settings, backbone).edit(sample))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_a_generated_picture(backbone, method, scheduler):
    settings = config(method, *GENERATED, f"generate.scheduler={scheduler}", "ddim.steps=6")
    sample = EditSample(np.zeros((64, 64, 3), np.uint8), "a cat", [[[20, 20], [44, 20]]], half())
    result = Editor(settings, backbone).edit(sample)
    drawn, _ = Editor(settings, backbone).generate("a cat")
    assert np.array_equal(result.sample.image, drawn)
    assert result.image.shape == (64, 64, 3) and result.image.std() > 1


def test_a_result_without_a_trajectory_is_shown_and_saved(backbone, tmp_path):
    result = Editor(config("fastdrag", "logger.kind=csv"), backbone).edit_and_save(SAMPLES[1], tmp_path)
    assert result.trajectory is None and result.distance_after is None
    assert (result.steps, result.stop_reason, result.frames) == (0, "", [])
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["method"] == "fastdrag" and numbers == json.loads(json.dumps(output.metrics(result)))
    assert [sorted(point) for point in numbers["points"]] == [["distance_before_px", "handle", "target"]] * 2
    first, last = output.animation(result)
    assert first.size == last.size == output.comparison(result).crop((0, 0, 384, 384)).size
    with Image.open(tmp_path / "trajectory.gif") as gif:
        assert gif.n_frames == 2
    assert load_config([tmp_path / "config.yaml"]) == result.config


@pytest.mark.filterwarnings("ignore:.*does not read")
def test_methods_share_loras_and_inversions(backbone, tmp_path):
    """What depends on the same comes from the cache, whichever method has made it."""
    made, found = Counter[str](), Counter[str]()

    def report(stage: str, done: int, total: int, note: str) -> None:
        if done == total:
            (found if note == "from the cache" else made)[stage] += 1

    shared = ["cache.enabled=true", f"cache.folder={tmp_path}", "lora.lr=0.001", "prompt='a cat'"]
    for name in methods.NAMES:
        result = Editor(config(name, *shared), backbone, report=report).edit(SAMPLES[1])
        assert isinstance(result, EditResult)
    others = len(methods.NAMES) - 1
    assert (made["LoRA"], made["inversion"]) == (1, 1) and (found["LoRA"], found["inversion"]) == (others, others)
