"""Studies: what a file expands to, what is run and what is kept, through failures, kills and any number of workers."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import multiprocessing
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dragdiff import cli
from dragdiff.backbones import lora_file
from dragdiff.config import load_config, load_study
from dragdiff.data.readers import write_folder
from dragdiff.data.sample import EditSample
from dragdiff.data.scenes import make_scene
from dragdiff.editor import Editor
from dragdiff.errors import DeviceLost, WorkerDied
from dragdiff.job import Job
from dragdiff.modules.lora import LoRA
from dragdiff.study import executors, runner
from dragdiff.study.plan import BASELINES, Plan, determinants, expand
from dragdiff.study.store import Store, StoreError
from dragdiff.study.table import measured
from dragdiff.study.worker import Outcome, Room, Worker

SAMPLES = Path(__file__).parent / "data" / "samples"


def write(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def file(tmp_path, tiny_pipeline):
    """Writes a study's file: a small random model, three small samples, cheap settings."""
    for index, name in enumerate(("cats/a", "cats/b", "dogs/a")):
        folder = tmp_path / "data" / name
        if not folder.exists():
            picture = np.random.default_rng(index).integers(0, 256, (32, 40, 3), dtype=np.uint8)
            mask = np.zeros((32, 40), bool)
            mask[4:28, 4:36] = True
            write_folder(
                EditSample(picture, name, [[[8, 8], [20, 16]], [[30, 20], [28, 12]]][: 1 + index % 2], mask), folder
            )

    def make(name="study", **content) -> Path:
        settings = {
            "model": {"path": str(tiny_pipeline), "device": "cpu"},
            "lora": {"steps": 0, "batch_size": 1, "resolution": 32},
            "ddim": {"steps": 4, "strength": 0.5},
            "drag": {"steps": 2},
            "cache": {"folder": str(tmp_path / "stages")},
        }
        base = {
            "question": "which?",
            "base": [],
            "settings": settings,
            "data": {"path": str(tmp_path / "data")},
            "metrics": {"names": ["outside", "accuracy"]},
            "results": str(tmp_path / "results"),
        }
        return write(tmp_path / f"{name}.yaml", **base | content)

    return make


def plan_of(path: Path, *overrides: str) -> Plan:
    return expand(load_study(path, overrides))


def scores_of(path: Path, *overrides: str) -> str:
    """Every number that a study has measured, as text."""
    plan = plan_of(path, *overrides)
    data = measured(plan, Store(plan.study.results))
    return data.scores.to_csv() + data.failures.to_csv()


def names(plan: Plan) -> list[str]:
    return [variant.name for variant in plan.variants if not variant.baseline]


# ------------------------------------------------------------------------------------------- what a file expands to


def test_grid_is_every_combination(file):
    grid = {"ddim.strength": [0.25, 0.5], "drag.features": [["up_blocks.1"], ["mid_block", "up_blocks.2"]]}
    plan = plan_of(file(grid=grid))
    assert names(plan) == [
        "ddim.strength=0.25, drag.features=[up_blocks.1]",
        "ddim.strength=0.25, drag.features=[mid_block,up_blocks.2]",
        "ddim.strength=0.5, drag.features=[up_blocks.1]",
        "ddim.strength=0.5, drag.features=[mid_block,up_blocks.2]",
    ]
    configs = [task.config for task in plan.jobs[0] if task.config]
    assert {(c.ddim.strength, tuple(c.drag.features)) for c in configs} == set(
        itertools.product([0.25, 0.5], [("up_blocks.1",), ("mid_block", "up_blocks.2")])
    )
    assert all(config.drag.steps == 2 for config in configs)  # what they share


def test_list_of_variants(file):
    plan = plan_of(file(variants=[{"name": "off", "control.enabled": False}, {"drag": {"lr": 0.1}}, {}]))
    assert names(plan)[0] == "off"
    assert [task.config.control.enabled for task in plan.jobs[0] if task.config].count(False) == 1
    assert sorted(task.config.drag.lr for task in plan.jobs[0] if task.config) == [0.01, 0.01, 0.1]


def test_random_draws_are_seeded_and_in_range(file):
    space = {"drag.lr": {"low": 0.001, "high": 0.1, "log": True}, "drag.steps": {"low": 1, "high": 9}}
    space["control.enabled"] = [True, False]
    variants = [plan_of(file(random=space), "random_count=60").variants[:60] for _ in range(2)]
    assert variants[0] == variants[1]
    other = plan_of(file(random=space), "random_count=60", "random_seed=1").variants[:60]
    assert other != variants[0]
    drawn = [variant.settings for variant in variants[0]]
    rates = np.array([settings["drag.lr"] for settings in drawn])
    assert rates.min() >= 0.001 and rates.max() <= 0.1
    assert 0.3 < (rates < 0.01).mean() < 0.7  # log-uniform: half below the geometric mean; uniform would give 9 %
    assert {type(settings["drag.steps"]) for settings in drawn} == {int}
    assert {settings["drag.steps"] for settings in drawn} == set(range(1, 10))
    assert {settings["control.enabled"] for settings in drawn} == {True, False}


def test_without_variants_a_study_is_a_benchmark(file):
    plan = plan_of(file())
    assert [variant.name for variant in plan.variants] == ["default", "identity", "copy-patch"]
    assert [subject.name for subject in plan.subjects] == ["cats-a", "cats-b", "dogs-a"]
    assert [subject.category for subject in plan.subjects] == ["cats", "cats", "dogs"]


def test_scenes_have_an_oracle_and_their_truth(file):
    plan = plan_of(file(data={"path": "scenes", "scenes": 2, "first_seed": 7}))
    assert [subject.name for subject in plan.subjects] == ["sun-7", "sun-8", "tower-7", "tower-8"]
    assert plan.variants[-1].baseline == "oracle"
    assert np.array_equal(plan.subjects[0].scene.truth, make_scene("sun", 7).truth)


def test_the_first_samples_are_those_of_the_smallest_numbers(file):
    plan = plan_of(file(data={"path": "scenes", "scenes": 12, "first_seed": 1, "limit": 3}))
    assert [subject.name for subject in plan.subjects] == ["sun-1", "sun-2", "sun-3"]


def test_limit_subset_and_categories(file):
    assert [s.name for s in plan_of(file(), "data.limit=2").subjects] == ["cats-a", "cats-b"]
    assert [s.name for s in plan_of(file(), "data.categories=[dogs]").subjects] == ["dogs-a"]
    draws = [[s.name for s in plan_of(file(), "data.subset=2", f"data.subset_seed={n}").subjects] for n in range(20)]
    assert draws[0] == [s.name for s in plan_of(file(), "data.subset=2").subjects]
    assert len({tuple(draw) for draw in draws}) == 3  # of three possible ones
    assert all(draw == sorted(draw) for draw in draws)


def test_study_extends_another(file, tmp_path):
    parent = file("parent", grid={"drag.lr": [0.1, 0.2]}, question="parent's")
    child = write(tmp_path / "child.yaml", extends=parent.name, question="own", data={"limit": 1})
    plan = plan_of(child)
    assert (plan.study.question, plan.study.name, len(plan.subjects)) == ("own", "child", 1)
    assert names(plan) == ["drag.lr=0.1", "drag.lr=0.2"]
    own = {"ddim": {"steps": 6}}
    write(tmp_path / "child.yaml", extends=parent.name, question="own", settings=own)
    config = next(task.config for task in plan_of(child).tasks if task.config)
    assert (config.ddim.steps, config.ddim.strength, config.drag.steps) == (6, 0.5, 2)  # the others are the parent's


def test_random_draws_are_different_and_as_many_as_there_are(file):
    plan = plan_of(file(random={"drag.steps": [10, 20, 40]}), "random_count=10")
    assert sorted(names(plan)) == ["drag.steps=10", "drag.steps=20", "drag.steps=40"]


def keys(path: Path, *overrides: str) -> set[str]:
    return {task.key for task in plan_of(path, *overrides).tasks if task.config}


@pytest.mark.parametrize(
    "override",
    [
        "settings.drag.steps=3",
        "settings.ddim.strength=0.25",
        "settings.control.start_layer=up_blocks.3",
        "settings.data.max_size=24",
        "settings.model.dtype=bf16",
        "settings.lora.steps=1",
    ],
)
def test_results_key_changes_with(override, file):
    assert not keys(file()) & keys(file(), override)


@pytest.mark.parametrize(
    "override",
    [
        "seeds=[5]",  # nothing is drawn
        "settings.lora.rank=8",  # nothing is trained
        "settings.generate.guidance=3",
        "settings.output.frames_every=3",
        "settings.cache.enabled=false",
        "settings.model.device=auto",
        "results=elsewhere",
        "workers=3",
        "name=other",
        "metrics.names=[clip]",
    ],
)
def test_results_key_does_not_change_with(override, file):
    assert keys(file()) == keys(file(), override)


def test_results_key_depends_on_the_sample_and_not_on_its_name(file, tmp_path):
    before = keys(file())
    (tmp_path / "data" / "cats" / "a").rename(tmp_path / "data" / "cats" / "z")
    assert keys(file()) == before
    edit = tmp_path / "data" / "cats" / "z" / "edit.json"
    edit.write_text(edit.read_text().replace("20.0", "21.0"))
    assert len(keys(file()) & before) == 2


def test_results_key_depends_on_the_weights(file, tiny_pipeline, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline, copy)
    assert keys(file(), f"settings.model.path={copy}") == keys(file())
    weights = next((copy / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not keys(file(), f"settings.model.path={copy}") & keys(file())


def test_seeds_count_where_something_is_drawn(file):
    with_lora = plan_of(file(grid={"lora.steps": [0, 1]}, seeds=[1, 2, 3]))
    assert len([task for task in with_lora.jobs[0] if task.config]) == 1 + 3
    assert determinants(with_lora.jobs[0][-1].config)["seed"] in (1, 2, 3)


def test_named_lora_counts_by_its_weights(file, tmp_path, tiny_pipeline):
    editor = Editor(plan_of(file(), "settings.lora.steps=1").jobs[0][-1].config)
    folders = []
    for name, steps in (("one", 1), ("same", 1), ("two", 2)):
        settings = dataclasses.replace(editor.config.lora, steps=steps)
        trained = editor.reconfigured(dataclasses.replace(editor.config, lora=settings)).finetune(
            plan_of(file()).subjects[0].sample
        )
        (tmp_path / name).mkdir()
        lora_file.save(trained, tmp_path / name)
        folders.append(keys(file(), f"settings.lora.path={tmp_path / name}"))
    assert folders[0] == folders[1] != folders[2]


# ------------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments: object) -> str:
    assert cli.main(["study", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dragdiff: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"grids": {"drag.lr": [1]}}, "unknown key 'grids'.*did you mean 'grid'"),
        ({"data": {"pth": "x"}}, "unknown key 'data.pth'.*did you mean 'data.path'"),
        ({"grid": {"drag.lrr": [1]}}, "unknown key 'drag.lrr'.*did you mean 'drag.lr'"),
        ({"grid": {"drag.lr": []}}, r"grid.drag.lr is \[\].*at least one value"),
        ({"grid": {"drag.lr": 0.1}}, "grid.drag.lr is 0.1: give a list"),
        ({"grid": {"drag.lr": [0.1, -1]}}, r"drag.lr is -1.0: it must be in \(0, 1000\]"),
        ({"grid": {"drag.lr": [0.1, 0.1]}}, "two variants are called 'drag.lr=0.1'"),
        ({"grid": {"drag.lr": [0.1]}, "variants": [{"drag.lr": 0.2}]}, "grid and variants are given"),
        ({"grid": {"sample": ["x"]}}, "sets sample: data of the study does that"),
        ({"grid": {"prompt": ["a", "b"]}}, "sets prompt: data of the study does that"),
        ({"grid": {"seed": [1, 2]}}, "sets seed: seeds of the study does that"),
        ({"settings": {"points": []}}, "sets points: data of the study does that"),
        ({"grid": {"output.frames_every": [1, 2]}}, "sets output.frames_every, which changes no picture"),
        ({"grid": {"drag.features": [["up_blocks.9"]]}}, "up_blocks.9"),
        ({"grid": {"control.start_layer": ["up_blocks.77"]}}, "control.start_layer is 'up_blocks.77'"),
        ({"grid": {"drag.tracker": ["nearest", "foo"]}}, "drag.tracker is 'foo'"),
        ({"seeds": [42, -1]}, "seed is -1"),
        ({"seeds": [42, 42]}, r"seeds is \[42, 42\]: give at least one, each once"),
        ({"random": {"drag.lr": {"low": -1e308, "high": 1e308}}}, "low < high"),
        ({"variants": [{"name": [1], "drag.lr": 0.2}]}, r"the name of variant 1 is \[1\]"),
        ({"name": ".."}, "name is '..': it must be a plain name"),
        ({"name": "results"}, "name is 'results': it must be a plain name"),
        ({"variants": [{"name": "identity", "drag.lr": 0.2}]}, "that is a baseline's name"),
        ({"variants": ["drag.lr=0.2"]}, "variant 1 is 'drag.lr=0.2': it must hold key: value"),
        ({"random": {"drag.lr": {"low": 1, "high": 0}}}, "low < high"),
        ({"random": {"drag.lr": {"low": 0, "high": 1, "log": True}}}, "low < high"),
        ({"random": {"drag.lr": 3}}, "random.drag.lr is 3: give a list"),
        ({"seeds": []}, "seeds is .*: give at least one"),
        ({"seeds": ["a"]}, "seeds is .*it must be a list"),
        ({"workers": -1}, "workers is -1: it must be >= 0"),
        ({"executor": "slurm"}, "executor is 'slurm': it must be local | ray"),
        ({"reference": "x"}, "reference is 'x': there are the variants default; identity; copy-patch"),
        ({"data": {"path": "no/such"}}, "no/such is not a folder"),
        ({"data": {"path": "scenes", "categories": ["moon"]}}, "names 'moon': there are sun, tower"),
        ({"metrics": {"names": ["psnr"]}}, "metrics.names names 'psnr': there are scene, outside"),
        ({"metrics": {"names": ["distance"], "areas": ["left"]}}, "metrics.areas names 'left'"),
        ({"settings": {"generate": {"enabled": True}}}, "sets generate.enabled"),
        ({"settings": {"model": {"path": "/no/such"}}}, "model.path is '/no/such': no such file"),
        ({"results": "nowhere://x"}, "results is 'nowhere://x'"),
        ({"name": "a/b"}, "name is 'a/b': it must be a plain name"),
        ({"base": ["no_such"]}, "no config file 'no_such'"),
    ],
)
def test_wrong_file_is_refused(content, words, file, capsys):
    import re

    path = file()
    assert re.search(words, refused(capsys, write(path, **yaml.safe_load(path.read_text()) | content)))


def test_other_wrong_files(file, tmp_path, capsys):
    assert "no study file" in refused(capsys, tmp_path / "none.yaml")
    assert "unknown option --frob" in refused(capsys, file(), "--frob")
    assert "data.subset is 9: there are only 3" in refused(capsys, file(), "data.subset=9")
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="a.yaml")
    assert "extend each other" in refused(capsys, tmp_path / "a.yaml")


def test_results_of_another_study_are_left_alone(file, tmp_path, capsys):
    assert cli.main(["study", str(file()), "data.limit=1"]) == 0
    before = (tmp_path / "results" / "study" / "study.json").read_text()
    capsys.readouterr()
    assert "holds another study (question: 'which?'" in refused(capsys, file(question="what else?"))
    assert (tmp_path / "results" / "study" / "study.json").read_text() == before


def test_plan_only_says_what_would_be_done(file, tmp_path, capsys):
    grid = {"ddim.strength": [0.25, 0.5, 0.75], "drag.features": [["up_blocks.1"], ["up_blocks.2"]]}
    assert cli.main(["study", str(file(grid=grid)), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "6 variants x 3 samples x 1 seeds and 2 baselines: 18 different edits" in said
    assert "0 trainings of a LoRA, 9 inversions and 9 denoisings of a source" in said
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------- running


@pytest.fixture
def stages(monkeypatch):
    """Counts what editors compute."""
    counted: list[str] = []
    original = Job.stage

    def stage(self, name, total):
        counted.append(name)
        return original(self, name, total)

    monkeypatch.setattr(Job, "stage", stage)
    return counted


def test_each_stage_is_computed_once_and_nothing_twice(file, stages, capsys):
    """Two timesteps, two blocks, three numbers of LoRA steps: one training; an inversion for each timestep and LoRA."""
    grid = {
        "ddim.strength": [0.25, 0.5],
        "drag.features": [["up_blocks.1"], ["up_blocks.2"]],
        "lora.steps": [0, 1, 2],
    }
    path = file(grid=grid)
    assert cli.main(["study", str(path), "data.limit=1"]) == 0
    said = capsys.readouterr()
    assert "14 done now, 0 found done, 0 failed of 14" in said.out
    assert "1 trainings of a LoRA, 6 inversions and 6 denoisings of a source" in said.out
    assert [stages.count(name) for name in ("LoRA", "inversion", "drag", "denoise")] == [1, 6, 12, 12]
    assert "12 edits to do" in said.err and "0 failed, 0 left" in said.err
    stages.clear()
    assert cli.main(["study", str(path), "data.limit=1"]) == 0
    assert "0 done now, 14 found done, 0 failed of 14" in capsys.readouterr().out
    assert stages == []
    assert cli.main(["study", str(file("wider", grid=grid | {"drag.lr": [0.01, 0.02]})), "data.limit=1"]) == 0
    assert [stages.count(name) for name in ("LoRA", "inversion", "drag")] == [0, 0, 12]  # it shares the first one's


def test_result_is_what_the_editor_gives_and_its_config_reproduces_it(file, tmp_path):
    path = file(data={"path": str(tmp_path / "data"), "limit": 1})
    assert cli.main(["study", str(path)]) == 0
    plan = plan_of(path)
    task = next(task for task in plan.tasks if task.config)
    folder = tmp_path / "results" / "results" / task.key
    from PIL import Image

    edited = np.asarray(Image.open(folder / "edited.png"))
    again = f"output.folder={tmp_path / 'again'}"
    assert cli.main(["edit", str(folder / "config.yaml"), again, "output.name=one", "cache.enabled=false"]) == 0
    assert np.array_equal(edited, np.asarray(Image.open(tmp_path / "again/one/edited.png")))
    result = Editor.from_config(folder / "config.yaml").edit(task.subject.sample)
    facts = json.loads((folder / "edit.json").read_text())
    np.testing.assert_allclose(facts["trajectory"], result.trajectory, atol=0.006)
    for name, make in BASELINES.items():
        key = plan.keys[name, task.subject.name, 42]
        pasted = np.asarray(Image.open(tmp_path / "results" / "results" / key / "edited.png"))
        assert np.array_equal(pasted, make(task.subject.sample))


@pytest.mark.parametrize("times", [1, 2])
def test_too_little_memory_for_what_is_shared_is_no_failure(times, file, monkeypatch, capsys):
    budgets, original = [], Editor.edit_batch

    def edit(self, requests):
        budgets.append(self.config.cache.reference_mb)
        if len(budgets) <= times:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, requests)

    monkeypatch.setattr(Editor, "edit_batch", edit)
    assert cli.main(["study", str(file()), "data.limit=1"]) == times - 1
    assert budgets == [4096, 0]
    assert ("out of memory" in capsys.readouterr().out) == (times == 2)


def test_lora_that_diverges_late_takes_no_other_with_it(file, tmp_path, monkeypatch, capsys):
    """What is not finite never gets into the cache; the edits with fewer steps are done."""

    def finite(trained):
        finite.seen += 1
        return finite.seen == 1  # the first snapshot, and nothing after it

    finite.seen = 0
    monkeypatch.setattr(LoRA, "is_finite", property(finite))
    assert cli.main(["study", str(file(grid={"lora.steps": [1, 2]})), "data.limit=1"]) == 1
    said = capsys.readouterr().out
    assert "3 done now, 0 found done, 1 failed of 4" in said and "the LoRA's training diverged" in said
    assert len(list((tmp_path / "stages" / "lora").iterdir())) == 1


def test_sample_that_cannot_be_timed_stops_nobody(file, tmp_path, capsys):
    small = np.zeros((16, 60, 3), np.uint8)
    write_folder(EditSample(small, "", [[[2, 2], [9, 9]]]), tmp_path / "data" / "a_first" / "thin")
    assert cli.main(["study", str(file()), "settings.data.max_size=30"]) == 1
    said = capsys.readouterr()
    assert "11 done now, 0 found done, 1 failed of 12" in said.out
    assert "failed: a_first-thin: resized from 60x16" in said.out
    assert "4 edits to do" in said.err and "at most" not in said.err


def test_scenes_do_not_share_scores_with_folders_that_look_the_same(file, tmp_path):
    """A folder's sample has no truth to be measured against."""
    write_folder(make_scene("sun", 0).sample, tmp_path / "scenes" / "sun" / "0")
    metrics = {"names": ["scene", "accuracy"]}
    assert cli.main(["study", str(file("folder", data={"path": str(tmp_path / "scenes")}, metrics=metrics))]) == 0
    scenes = file("scenes", data={"path": "scenes", "scenes": 1, "categories": ["sun"]}, metrics=metrics)
    assert cli.main(["study", str(scenes)]) == 0
    assert "true_distance" in scores_of(scenes)


def test_metric_that_fails_takes_nothing_from_the_others(file, tmp_path, monkeypatch):
    from dragdiff.metrics import suite

    def broken(settings):
        def measure(subject, edited):
            raise RuntimeError("no luck")

        return measure

    monkeypatch.setitem(suite.FACTORIES, "clip", broken)
    path = file(metrics={"names": ["accuracy", "clip", "outside"]})
    assert cli.main(["study", str(path), "data.limit=1"]) == 1
    assert "dai_10" in scores_of(path, "data.limit=1")


def test_new_metric_needs_no_new_edit(file, stages, capsys):
    path = file()
    cli.main(["study", str(path), "metrics.names=[outside]"])
    before = scores_of(path, "metrics.names=[outside]")
    stages.clear()
    capsys.readouterr()
    assert cli.main(["study", str(path)]) == 0
    assert "9 done now" in capsys.readouterr().out
    assert stages == []
    assert scores_of(path, "metrics.names=[outside]") == before
    assert "dai_10" in scores_of(path)


def test_metric_that_cannot_be_had_is_said_and_the_others_are_measured(file, tmp_path, capsys):
    path = file(metrics={"names": ["clip", "accuracy"], "clip_model": str(tmp_path / "none"), "clip_revision": ""})
    for found in (0, 9):
        assert cli.main(["study", str(path)]) == 0
        said = capsys.readouterr()
        assert f"{9 - found} done now, {found} found done" in said.out
        assert "not measured: clip: CLIP similarity needs the model" in said.out
    assert list(json.loads((tmp_path / "results/study/unavailable.json").read_text())) == ["clip"]
    assert "dai_10" in scores_of(path)


@pytest.mark.parametrize("batch", [1, 3])
def test_broken_and_failing_samples_do_not_stop_the_others(batch, file, tmp_path, monkeypatch, capsys):
    (tmp_path / "data/cats/b/edit.json").write_text("{")
    original = Editor.edit_batch

    def edit(self, requests):
        if "dogs-a" in [request.sample.name for request in requests]:
            raise RuntimeError("no luck\nat all")
        return original(self, requests)

    monkeypatch.setattr(Editor, "edit_batch", edit)
    assert cli.main(["study", str(file()), f"batch={batch}"]) == 1
    said = capsys.readouterr()
    assert "passing over cats-b: " in said.err and "not valid JSON" in said.err
    assert "5 done now, 0 found done, 1 failed of 6" in said.out
    assert "failed: dogs-a: RuntimeError: no luck at all" in said.out
    data = measured(plan_of(file()), Store(str(tmp_path / "results")))
    assert set(data.failures["sample"]) == {"cats-b", "dogs-a"}
    (failure,) = (tmp_path / "results/failures").glob("*.json")
    assert "Traceback" in json.loads(failure.read_text())["details"]

    monkeypatch.setattr(Editor, "edit_batch", original)
    assert cli.main(["study", str(file())]) == 1  # not tried again by itself
    assert "0 done now, 5 found done, 1 failed of 6" in capsys.readouterr().out
    assert cli.main(["study", str(file()), "--retry-failed"]) == 1  # the broken sample still is
    assert "1 done now, 5 found done, 0 failed of 6" in capsys.readouterr().out
    assert not list((tmp_path / "results/failures").glob("*.json"))


def test_full_disk_stops_the_study_and_loses_nothing(file, tmp_path, monkeypatch, capsys):
    original, written = Store.write_result, []

    def write_result(self, key, files):
        if len(written) == 4:
            monkeypatch.setattr(self.files, "pipe_file", full)
        written.append(key)
        original(self, key, files)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path = file(grid={"drag.lr": [0.01, 0.02]})
    monkeypatch.setattr(Store, "write_result", write_result)
    assert "No space left on device" in refused_late(capsys, path)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    assert cli.main(["study", str(path)]) == 0
    assert "8 done now, 4 found done" in capsys.readouterr().out


def refused_late(capsys, path: Path) -> str:
    assert cli.main(["study", str(path)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_mean_distance_in_the_files_order_as_the_published_script(file, tmp_path):
    """With `ordered` one generator runs through a variant's samples; otherwise neither order nor neighbours matter."""
    from dragdiff.backbones.loading import load_backbone
    from dragdiff.metrics.correspondence import MeanDistance

    settings = {"path": load_study(file()).settings["model.path"], "device": "cpu"}
    metrics = {"names": ["distance"], "distance": settings | {"revision": ""}, "block": "up_blocks.1", "ensemble": 2}
    path = file(metrics=metrics | {"ordered": True})
    assert cli.main(["study", str(path)]) == 0
    plan = plan_of(path)
    data = measured(plan, Store(plan.study.results))
    store = Store(plan.study.results)
    for variant in ("default", "identity"):
        metric = MeanDistance(
            load_backbone(plan.study.metrics.distance),
            t=261, block="up_blocks.1", ensemble=2, variant="image", seed=42, ordered=True,
        )  # fmt: skip
        for subject in plan.subjects:
            edited = store.read(f"results/{plan.keys[variant, subject.name, 42]}/edited.png")
            expected = metric.distances(subject.sample, np.asarray(Image.open(io.BytesIO(edited))))
            np.testing.assert_allclose(data.values(variant, "distance")[subject.name], expected)
    assert store.files.exists(store.path("study", "ordered"))
    nowhere = f"metrics.distance.path={tmp_path / 'nowhere'}"
    assert cli.main(["study", str(path), nowhere]) == 0
    assert "distance" in json.loads((tmp_path / "results/study/unavailable.json").read_text())
    assert len(list((tmp_path / "results/study/ordered").iterdir())) == len(plan.variants)
    together, alone = file(metrics=metrics), f"results={tmp_path / 'alone'}"
    assert (
        cli.main(["study", str(together)]) == cli.main(["study", str(together), "data.categories=[dogs]", alone]) == 0
    )
    (by_itself,) = (
        measured(plan_of(together, "data.categories=[dogs]", alone), Store(str(tmp_path / "alone")))
        .values("default", "distance")
        .values()
    )
    np.testing.assert_array_equal(measured(plan_of(together), store).values("default", "distance")["dogs-a"], by_itself)


def test_a_worker_with_a_device_of_its_own(file):
    """As each has on a machine with several GPUs; the task's settings leave the device open."""
    settings = load_study(file()).settings
    plan = plan_of(file(settings=settings | {"model.device": "auto"}))
    task = next(task for task in plan.tasks if task.config)
    (outcome,) = Worker(plan.study, "cpu").run([task])
    assert not outcome.failure and len(outcome.scores) == 2


def test_identity_scores_the_drags_length(file):
    """On samples of DragBench and Drag100: with the same noise for both pictures a handle is found where it was."""
    settings = {"path": load_study(file()).settings["model.path"], "device": "cpu"}
    metrics = {"names": ["distance"], "distance": settings | {"revision": ""}, "block": "up_blocks.1", "ensemble": 1}
    path = file(
        metrics=metrics, data={"path": str(SAMPLES)}, settings=load_study(file()).settings | {"data.max_size": 64}
    )
    assert cli.main(["study", str(path)]) == 0
    plan = plan_of(path)
    assert {subject.category for subject in plan.subjects} == {"animals", "drag100"}
    found = measured(plan, Store(plan.study.results)).values("identity", "distance")
    for subject in plan.subjects:
        whole = np.trunc(subject.sample.handles)
        np.testing.assert_allclose(
            found[subject.name], np.linalg.norm(whole - subject.sample.targets, axis=1), atol=1e-4
        )


def test_study_in_wandb(file, tmp_path, monkeypatch, capsys):
    """A run for each variant and baseline and one for the whole; kept where W&B can't be had."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert cli.main(["study", str(file(grid={"drag.lr": [0.01, 0.02]})), "logger.kind=wandb"]) == 0
    assert len(list((tmp_path / "results/study/wandb").glob("offline-run-*"))) == 2 + 2 + 1
    assert (tmp_path / "results/study/report/report.md").is_file()
    capsys.readouterr()
    assert "logger.kind is 'csv'" in refused_late(capsys, file(logger={"kind": "csv"}))


# ------------------------------------------------------------------------------------------- the store


def test_result_appears_as_a_whole_and_the_first_writer_wins(tmp_path):
    store = Store(str(tmp_path / "x" / "y"))
    assert not store.has_result("k") and store.read("results/k/edit.json") is None
    store.write_result("k", {"edit.json": b"1", "edited.png": b"2"})
    store.write_result("k", {"edit.json": b"3"})
    assert store.read("results/k/edit.json") == b"1"
    rival = Store(str(tmp_path / "x" / "y"))
    rival.has_result = lambda key: store.has_result(key) if raced else False  # came between the question and the rename
    raced = []
    original = Path.rename

    def rename(self, target):
        raced.append(1)
        return original(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        rival.write_result("k", {"edit.json": b"4"})
    assert store.read("results/k/edit.json") == b"1"
    assert [path.name for path in (tmp_path / "x/y/results").iterdir()] == ["k"]


def test_damaged_json_counts_as_missing(tmp_path):
    store = Store(str(tmp_path))
    store.write("a.json", b'{"x": ')
    assert store.read_json("a.json") is None and store.read_json("none.json") is None
    store.write_json("a.json", {"x": [1, 2]})
    assert store.read_json("a.json") == {"x": [1, 2]}
    store.remove("a.json")
    store.remove("a.json")
    assert store.read("a.json") is None


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="in the results"):
        Store(str(tmp_path / "file")).write_json("a/b.json", 1)


def test_object_stores_are_not_given_what_only_folders_take(monkeypatch):
    import fsspec

    asked = []
    original = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **more: asked.append(more) or original(url, **more))
    Store("memory://x")
    assert asked == [{}]


def test_damaged_result_is_made_again(file, tmp_path, capsys):
    path = file()
    assert cli.main(["study", str(path)]) == 0
    before = scores_of(path)
    first, second = (task.key for task in plan_of(path).tasks if task.config and task.subject.category == "cats")
    place = tmp_path / "results" / "results"
    (place / first / "edit.json").unlink()
    (place / second / "edited.png").write_bytes(b"no picture")
    (place / second / "scores.json").unlink()
    capsys.readouterr()
    assert cli.main(["study", str(path)]) == 0
    assert "2 done now, 7 found done, 0 failed" in capsys.readouterr().out
    assert scores_of(path) == before
    assert (place / first / "edit.json").is_file() and (place / second / "edited.png").stat().st_size > 99


def test_results_with_odd_names(file, tmp_path):
    odd = tmp_path / "out[1]*"
    assert cli.main(["study", str(file(results=str(odd))), "data.limit=1"]) == 0
    assert "dai_10" in scores_of(file(results=str(odd)), "data.limit=1")


def test_study_in_another_file_system(file, capsys):
    """Any that fsspec knows; here one in memory, written as object stores are."""
    path = file(results="memory://studies/x")
    assert cli.main(["study", str(path)]) == 0
    assert cli.main(["study", str(path)]) == 0
    assert "0 done now, 9 found done" in capsys.readouterr().out
    in_memory, local = scores_of(path), file()
    assert cli.main(["study", str(local)]) == 0
    assert scores_of(local) == in_memory
    path = file(results="memory://studies/x")
    store = Store("memory://studies/x")
    key = plan_of(path).tasks[0].key
    store.files.rm(store.path("results", key, "edit.json"))  # a writer that was killed before the last file
    assert not store.has_result(key)
    assert cli.main(["study", str(path)]) == 0
    assert store.has_result(key)


# ------------------------------------------------------------------------------------------- workers and kills


def test_order_and_number_of_workers_make_no_difference(file, tmp_path, monkeypatch):
    """The same bytes from one worker, from two processes, and from jobs and tasks in another order."""
    grid = {"drag.lr": [0.01, 0.05], "lora.steps": [1, 2]}
    path = file(grid=grid)

    def shuffled(study):
        plan = expand(study)
        jobs = [random.Random(1).sample(job, len(job)) for job in plan.jobs]
        assert jobs != plan.jobs
        return dataclasses.replace(plan, jobs=jobs[::-1])

    tables = []
    for number, (workers, expanded) in enumerate(((1, expand), (2, expand), (1, shuffled))):
        monkeypatch.setattr("dragdiff.study.plan.expand", expanded)
        apart = [f"results={tmp_path / str(number)}", f"settings.cache.folder={tmp_path / f'stages{number}'}"]
        assert cli.main(["study", str(path), f"workers={workers}", *apart]) == 0
        tables.append(scores_of(path, *apart))
    assert tables[0] == tables[1] == tables[2]
    assert tables[0].count("\n") > 50


class Fragile:
    """A worker that dies at the given calls."""

    def __init__(self, study, deaths):
        self.place, self.deaths = executors.InProcess(study), deaths

    def submit(self, method, *arguments):
        if method == "run" and self.deaths and self.deaths.pop(0):
            future = Future()
            future.set_exception(WorkerDied("gone"))
            return future
        return self.place.submit(method, *arguments)

    def close(self):
        pass


def test_workers_that_die_as_they_start_are_given_up(file, monkeypatch, capsys):
    """Others go on; with none left, what was done is kept."""

    class Stillborn(Fragile):
        def submit(self, method, *arguments):
            future = Future()
            if method == "ping" and next(pings):
                future.set_exception(WorkerDied("gone"))
                return future
            return super().submit(method, *arguments)

    pings = itertools.count()  # the first worker's is answered
    places = nullcontext((3, lambda number: Stillborn(number, [])))
    monkeypatch.setattr(runner, "open_workers", lambda study: places)
    original = executors.InProcess
    monkeypatch.setattr(executors, "InProcess", lambda number: original(load_study(file())))
    assert cli.main(["study", str(file())]) == 0
    assert "9 done now" in capsys.readouterr().out

    pings = itertools.count()
    dying = nullcontext((1, lambda number: Stillborn(number, [0, 1])))
    monkeypatch.setattr(runner, "open_workers", lambda study: dying)
    path = file("other", grid={"drag.lr": [0.2]})
    assert "every worker died as it started" in refused_late(capsys, path)
    pings = itertools.count(1)
    assert "a worker died as it started: gone" in refused_late(capsys, path)
    monkeypatch.undo()
    assert cli.main(["study", str(path)]) == 0
    assert "2 done now, 7 found done" in capsys.readouterr().out


@pytest.mark.parametrize(("deaths", "failed"), [([1, 0, 1], 0), ([1, 1, 0], 0), ([0, 1, 1, 1], 1)])
def test_edit_of_a_dead_worker_is_done_by_another(deaths, failed, file, monkeypatch, capsys):
    monkeypatch.setattr(runner, "open_workers", lambda study: nullcontext((1, lambda number: Fragile(study, deaths))))
    assert cli.main(["study", str(file())]) == (1 if failed else 0)
    said = capsys.readouterr().out
    assert f"{9 - failed} done now, 0 found done, {failed} failed of 9" in said
    assert ("3 workers died over it" in said) == bool(failed)


def test_a_gpu_that_is_lost_fails_no_other_edit(file, monkeypatch, capsys):
    """An error of the device that stays makes every later call fail, until the process ends."""
    lost, original = [], Editor.edit_batch

    def edit(self, requests):
        if lost or len(edited) == 2:
            lost.append("CUDA error: device-side assert triggered")
            raise RuntimeError(lost[0])
        edited.append(requests)
        return original(self, requests)

    def check(self):
        with monkeypatch.context() as patch:  # elsewhere torch has no GPU
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "synchronize", synchronize)
            check_gpu(self)

    def synchronize(device):
        if lost:
            raise RuntimeError(lost[0])

    edited, check_gpu = [], Worker._check_gpu
    monkeypatch.setattr(Editor, "edit_batch", edit)
    monkeypatch.setattr(Worker, "_check_gpu", check)
    assert "the GPU has stopped working (CUDA error: device-side assert" in refused_late(capsys, file())
    monkeypatch.setattr(Editor, "edit_batch", original)
    lost.clear()
    assert cli.main(["study", str(file())]) == 0  # nothing was recorded as failed
    found = int(re.search(r"(\d) found done, 0 failed of 9", capsys.readouterr().out)[1])
    assert found >= 2


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), AssertionError("Invalid device id")])
def test_a_worker_whose_gpu_is_gone_dies_as_it_starts(file, monkeypatch, error):
    """So it is given up, and fails no edit."""

    def synchronize(device):
        assert device == "cuda:1"
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with pytest.raises(DeviceLost, match=str(error)):
        Worker(load_study(file()), "cuda:1").ping()
    Worker(load_study(file())).ping()


def test_there_is_room_for_as_many_edits_as_the_most_that_one_needed_lets(monkeypatch):
    """A LoRA from the cache leaves no trace in an edit's peak."""
    gib, state = 2**30, {"held": 4, "peak": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["held"] * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"] * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (state["held"] + 1) * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (19 * gib, 24 * gib))

    def after(editor, *, count, peak, kept=0):
        state["held"] = 4
        with room.measured(editor):
            editor.ran_together = count
            state["held"], state["peak"] = 4 + kept, peak
        return room.edits

    room = Room(0)
    editor = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cuda")))
    assert after(editor, count=1, peak=6) == 8  # 0.8 * 20 GiB by 2
    assert after(editor, count=2, peak=14) == 3  # 5 for each
    assert after(editor, count=0, peak=5) == 3  # nothing was done
    assert after(editor, count=4, peak=8) == 3  # from the cache
    assert after(editor, count=1, peak=100) == 1
    fixed = Room(2)
    with fixed.measured(editor):
        editor.ran_together = 9
    assert fixed.edits == 2


def test_a_process_whose_gpu_is_lost_counts_as_dead(file):
    worker = executors.SubProcess(load_study(file()), "cuda:99")
    with closing(worker), pytest.raises(WorkerDied, match="the GPU has stopped working"):
        worker.submit("ping").result()


def test_no_two_workers_are_at_the_same_picture(file, monkeypatch):
    """A batch reaches into other pictures' jobs; the rest of these waits until it is done."""

    plan, done = plan_of(file(grid={"drag.lr": [0.01, 0.05], "ddim.steps": [4, 5]})), []
    lock, at_work, most = threading.Lock(), [], []

    class Place:
        """A worker that takes a moment."""

        def submit(self, method, *arguments):
            future = Future()
            if method != "run":
                future.set_result({"unavailable": {}, "most_at_once": 3}.get(method))
                return future
            (tasks,) = arguments
            assert len(tasks) <= 3 and len({repr(task.batch_key) for task in tasks}) == 1
            pictures = {task.subject.name for task in tasks}
            with lock:
                assert not pictures & set().union(*at_work)
                at_work.append(pictures)
                most.append(len(at_work))

            def finish():
                with lock:
                    at_work.remove(pictures)
                done.extend(task.key for task in tasks)
                future.set_result([Outcome(task.key) for task in tasks])

            threading.Timer(0.02, finish).start()
            return future

        def close(self):
            pass

    monkeypatch.setattr(runner, "open_workers", lambda study: nullcontext((3, lambda number: Place())))
    summary = runner.run(plan)
    assert summary.done == len(plan.tasks) and not summary.failed
    assert sorted(done) == sorted(task.key for task in plan.tasks)
    assert max(most) > 1


def alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_workers_end_with_a_killed_parent(file, tmp_path):
    import psutil

    path = file(grid={"drag.lr": [0.01, 0.05]}, settings=load_study(file()).settings | {"drag.steps": 200})
    command = [sys.executable, "-m", "dragdiff", "study", str(path), "workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline, workers = time.monotonic() + 60, []
        while len(workers) < 2 and time.monotonic() < deadline:
            children = psutil.Process(process.pid).children()
            workers = [child.pid for child in children if any("spawn_main" in word for word in child.cmdline())]
            time.sleep(0.1)
        assert len(workers) == 2
        time.sleep(3)  # they are importing, loading or at work
    finally:
        process.kill()
        process.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_killed_process_is_replaced(file, tmp_path):
    """One of two worker processes is killed under way; what it did is done again, and all is as without the kill."""
    path = file(grid={"drag.lr": [0.01, 0.05]})
    plan = plan_of(path, "workers=2")
    killed = []

    def kill_one(stage, done, total, note):
        if stage == "edits" and done == 3 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    summary = runner.run(plan, report=kill_one)
    assert killed and summary.done == summary.total == 12 and not summary.failed
    other = plan_of(path, f"results={tmp_path / 'other'}")
    runner.run(other)
    assert scores_of(path) == scores_of(path, f"results={tmp_path / 'other'}")


@pytest.mark.slow
def test_kill_at_any_moment_loses_at_most_the_edit_in_hand(file, tmp_path):
    path = file(
        grid={"drag.lr": [0.01, 0.02, 0.05], "lora.steps": [0, 2]},
        settings=load_study(file()).settings | {"drag.steps": 6},
    )
    command = [sys.executable, "-m", "dragdiff", "study", str(path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    place, chance, seen = tmp_path / "results" / "results", random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(command, **quiet)
        while process.poll() is None and (not place.exists() or len(list(place.iterdir())) <= seen):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.6))
        process.kill()
        process.wait()
        whole = [folder for folder in place.iterdir() if not folder.name.endswith(".partial")]
        for folder in whole:
            assert json.loads((folder / "edit.json").read_text())
        assert len(whole) >= seen  # nothing that was done is lost
        seen = len(list(place.iterdir()))
    assert subprocess.run(command, **quiet).returncode == 0
    alone = f"results={tmp_path / 'alone'}"
    assert subprocess.run([*command, alone, f"settings.cache.folder={tmp_path / 'other'}"], **quiet).returncode == 0
    assert scores_of(path) == scores_of(path, alone)


# ------------------------------------------------------------------------------------------- Ray


def test_unreachable_cluster_is_one_line(file, capsys, monkeypatch):
    assert "no Ray cluster at address='127.0.0.1:1'" in refused_late(
        capsys, file(executor="ray", address="127.0.0.1:1")
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'dragdiff[ray]'" in refused_late(capsys, file(executor="ray"))


@pytest.mark.slow
def test_ray_gives_what_this_machine_gives_and_outlives_a_killed_actor(file, tmp_path):
    import psutil
    import ray

    slow = load_study(file()).settings | {"drag.steps": 60}  # so that both are still at work
    path = file(grid={"drag.lr": [0.01, 0.02, 0.05]}, settings=slow)
    plan = plan_of(path, "executor=ray", "workers=2")
    killed = []

    def kill_one(stage, done, total, note):
        actors = [process for process in psutil.process_iter(["cmdline"]) if is_actor(process)]
        if stage == "edits" and done >= 3 and len(actors) == 2 and not killed:
            killed.append(actors[0])
            actors[0].kill()

    def is_actor(process):
        return (process.info["cmdline"] or [""])[0].startswith("ray::Worker")

    summary = runner.run(plan, report=kill_one)
    assert not ray.is_initialized()
    assert killed and summary.done == summary.total == 15 and not summary.failed
    runner.run(plan_of(path, f"results={tmp_path / 'other'}"))
    assert scores_of(path) == scores_of(path, f"results={tmp_path / 'other'}")


# ------------------------------------------------------------------------------------------- the shipped studies


EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHIPPED = sorted(path for path in EXPERIMENTS.glob("*/*.yaml") if path.stem != "common")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_study_runs_at_a_tiny_point(path, tmp_path, tiny_pipeline):
    """One variant on one sample: with its own model on scenes, with a small random one in place of SD."""
    overrides = ["settings.ddim.steps=5", "settings.lora.batch_size=1", "metrics.ensemble=1", f"results={tmp_path}"]
    if path.parent.name == "scenes":
        overrides += ["data.scenes=1", "data.categories=[sun]"]
    else:
        model = [f"path={tiny_pipeline}", "revision=''", "device=cpu"]
        overrides += [f"{part}.{entry}" for part in ("settings.model", "metrics.distance") for entry in model]
        overrides += [f"data.path={SAMPLES}", "data.limit=1", "settings.data.max_size=64"]
        overrides += ["metrics.names=[distance, accuracy, outside]", "settings.lora.resolution=32", "published={}"]
    if path.stem != "optimiser_steps":
        overrides += ["settings.drag.steps=1"]
    if path.stem != "lora_steps":
        overrides += ["settings.lora.steps=0"]
    study = load_study(path, overrides)
    for variant in study.variants:  # whose own parts of a model are not here
        for key in ("model.vae", "model.unet"):
            variant.pop(key, None)
    whole = expand(study)
    assert study.reference in names(whole)
    one = {key: values[1:2] for key, values in study.grid.items()}
    plan = expand(dataclasses.replace(study, grid=one, variants=study.variants[1:2], seeds=[1], reference=""))
    summary = runner.run(plan)
    assert summary.done == summary.total == len(plan.variants) and not summary.unavailable
    data = measured(plan, Store(str(tmp_path)))
    assert data.failures.empty and {"distance", "true_distance"} & set(data.columns)


def test_every_study_has_both_forms():
    forms = {
        folder: {path.stem for path in SHIPPED if path.parent.name == folder} for folder in ("scenes", "dragbench")
    }
    assert forms["scenes"] == forms["dragbench"]
    assert len(forms["scenes"]) == 10


@pytest.mark.parametrize("form", ["scenes", "dragbench"])
def test_the_fast_presets_study_is_of_that_preset(form):
    """On scenes without its LoRA, which the embedded model has none of, and with its lr in proportion."""
    path = Path(__file__).parent.parent / "experiments" / form / "fast.yaml"
    study = load_study(path, ["data.path=scenes"])
    variant = next(variant for variant in study.variants if variant["name"] == "fast")
    model = "embedded" if form == "scenes" else "sd15"
    published, fast = load_config([model]), load_config([model, "fast"])
    asked = load_config([model, {key: value for key, value in variant.items() if key != "name"}])
    assert (asked.ddim, asked.drag.steps) == (fast.ddim, fast.drag.steps)
    assert asked.drag.lr / published.drag.lr == pytest.approx(fast.drag.lr / load_config(["sd15"]).drag.lr)
    assert asked.lora.steps == (published.lora.steps if form == "scenes" else fast.lora.steps)
