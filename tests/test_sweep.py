"""A study as a W&B sweep: what an agent of it would run is what the study runs. No model, no network."""

import itertools
import json

import numpy as np
import pytest
import yaml
from wandb import wandb_agent
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

from dragdiff import cli
from dragdiff.config import load_config, load_study
from dragdiff.data.readers import write_folder
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.options import walk
from dragdiff.study.plan import config_of, read_subjects, variants_of
from dragdiff.study.sweep import sweep


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a study's file."""
    monkeypatch.chdir(tmp_path)

    def make(**content):
        path = tmp_path / "asks.yaml"
        path.write_text(yaml.safe_dump({"data": {"scenes": 1}} | content))
        return path

    return make


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Gives the command that W&B's own agent starts for values of the parameters."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_ID", "")  # the agent sets these
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    started = []

    class Process:
        def __init__(self, command, **_):
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)

    def render(definition, values):
        agent = wandb_agent.Agent(api=None, queue=None)
        agent._sweep_command = list(definition["command"])
        arguments = {key: {"value": value} for key, value in sorted(values.items())}
        agent._command_run({"args": arguments, "program": definition["program"], "run_id": "r"})
        return started[-1]

    return render


def written(path, *overrides):
    """The definition as `wandb sweep` reads it from the file that the command writes."""
    assert cli.main(["study", str(path), *overrides, "--wandb-sweep", "sweep.yaml"]) == 0
    definition = yaml.safe_load(path.with_name("sweep.yaml").read_text())
    _validate_config_and_fill_distribution(definition)
    assert json.loads(json.dumps(definition)) == definition
    return definition


def parsed(command):
    """The config that edit.py has from a command's arguments, which are as the agent makes them."""
    assert command[:3] == ["/usr/bin/env", "python", "edit.py"]
    files = [text for text in command[3:] if "=" not in text]
    return load_config(files, [text for text in command[3:] if "=" in text])


def same(config):
    """What an agent's edit has in common with the study's."""
    keys = ("sample", "logger.", "output.", "cache.")
    return {key: value for key, _, value in walk(config) if not key.startswith(keys)}


def combinations(definition):
    values = {key: entry["values"] for key, entry in definition["parameters"].items()}
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


GRIDS = {
    "numbers": {"ddim.strength": [0.2, 1.0], "drag.lr": [0.00001, 0.05], "drag.steps": [10, 160]},
    "lists": {"drag.features": [["up_blocks.2"], ["mid_block", "up_blocks.1"]]},
    "texts": {
        "generate.negative_prompt": ["a cat, on a mat", "[x] it's: #1 = {so}", ""],
        "control.start_layer": ["up_blocks.1", "3"],
    },
    "bools": {"control.enabled": [True, False]},
    "sections": {"drag": [{"lr": 0.1, "steps": 2}, {"lr": 0.2, "steps": 2}]},
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_command_of_a_grid_is_the_studys_own(name, file, rendered):
    path = file(
        grid=GRIDS[name],
        seeds=[0, 7],
        settings={"lora": {"steps": 3}, "drag.mask_weight": 0.2, "drag.tracker": "nearest"},
        logger={"project": "drags and more", "tags": ["a b", "c"]},
    )
    definition, study = written(path), load_study(path)
    assert definition["method"] == "grid" and "run_cap" not in definition
    assert definition["metric"] == {"name": "distance_px", "goal": "minimize"}
    found = [parsed(rendered(definition, values)) for values in combinations(definition)]
    wanted = [config_of(study, variant, seed) for variant in variants_of(study) for seed in (0, 7)]
    assert {"lora.steps=3", "drag.mask_weight=0.2"} <= set(definition["command"])
    count = len(wanted)
    assert len(found) == 2 * count  # of two scenes
    for sample in ("scene:sun-0", "scene:tower-0"):
        ours = [same(config) for config in found if config.sample == sample]
        assert len(ours) == count
        assert all(same(config) in ours for config in wanted)
    for config in found:
        logger = config.logger
        assert (logger.kind, logger.project, logger.group) == ("wandb", "drags and more", "asks")
        assert logger.tags == ["a b", "c"]


def test_base_and_settings_are_the_studys(file, rendered, tmp_path):
    own = tmp_path / "my own.yaml"
    own.write_text("ddim: {steps: 20}")
    definition = written(file(base=["configs/sd15.yaml", "my own.yaml"], settings={"drag": {"steps": 9}}))
    command = rendered(definition, combinations(definition)[0])
    assert command[3:5] == ["sd15", str(own)]
    config = parsed(command)
    assert config.model.path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (config.ddim.steps, config.drag.steps) == (20, 9)


def test_samples_of_a_folder(file, rendered, tmp_path):
    for name in ("cats/one two", "cats/b", "dogs/a"):
        picture = np.zeros((32, 32, 3), np.uint8)
        write_folder(EditSample(picture, "x", [[[8, 8], [20, 8]]]), tmp_path / "my data" / name)
    (tmp_path / "my data" / "cats" / "b" / "edit.json").write_text("broken")
    path = file(data={"path": "my data", "categories": ["cats"]})
    definition = written(path)
    assert definition["parameters"]["sample"]["values"] == [str(tmp_path / "my data" / "cats" / "one two")]
    (values,) = combinations(definition)
    assert parsed(rendered(definition, values)).sample == str(tmp_path / "my data" / "cats" / "one two")
    definition = written(path, "data.categories=[]")
    assert [name.rpartition("/")[2] for name in definition["parameters"]["sample"]["values"]] == ["one two", "a"]


def test_subset_is_the_studys(file):
    study = load_study(file(data={"scenes": 5, "subset": 3, "limit": 2, "first_seed": 40}))
    names = [f"scene:{subject.name}" for subject in read_subjects(study.data)[0]]
    assert sweep(study)["parameters"]["sample"]["values"] == names and len(names) == 2


def test_variants_of_one_key_are_a_grid(file):
    variants = [{"name": "a", "drag.lr": 0.1}, {"name": "b", "drag": {"lr": 0.2}}]
    assert written(file(variants=variants))["parameters"]["drag.lr"] == {"values": [0.1, 0.2]}


def test_nothing_that_varies_is_a_sweep_over_samples(file):
    assert list(written(file())["parameters"]) == ["seed", "sample"]


@pytest.mark.parametrize(
    "variants",
    [
        [{"drag.lr": 0.1}, {"drag.steps": 3}],
        [{"drag.lr": 0.1, "drag.steps": 3}, {"drag.lr": 0.2, "drag.steps": 4}],
        [{}, {"drag.lr": 0.1}],
        [{"drag.lr": 0.1}, {}],
    ],
)
def test_other_variants_cannot_be_a_sweep(variants, file, tmp_path, capsys):
    assert cli.main(["study", str(file(variants=variants)), "--wandb-sweep", "sweep.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not all combinations" in line and "give a grid" in line and "without --wandb-sweep" in line
    assert not (tmp_path / "sweep.yaml").exists()


def test_random(file, rendered):
    space = {
        "drag.lr": {"low": 0.001, "high": 0.1, "log": True},
        "ddim.strength": {"low": 0.1, "high": 1},
        "drag.steps": {"low": 10, "high": 80},
        "lora.steps": {"low": 1, "high": 100, "log": True},
        "drag.features": [["up_blocks.2"], ["up_blocks.1", "up_blocks.2"]],
    }
    path = file(random=space, random_count=7)
    definition, study = written(path), load_study(path)
    assert (definition["method"], definition["run_cap"]) == ("random", 7)
    parameters = definition["parameters"]
    assert parameters["drag.lr"] == {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}
    assert parameters["ddim.strength"] == {"distribution": "uniform", "min": 0.1, "max": 1.0}
    assert isinstance(parameters["ddim.strength"]["max"], float)
    assert parameters["drag.steps"] == {"distribution": "int_uniform", "min": 10, "max": 80}
    assert parameters["lora.steps"] == {"distribution": "q_log_uniform_values", "q": 1, "min": 1, "max": 100}
    assert parameters["drag.features"] == {"values": ["[up_blocks.2]", "[up_blocks.1,up_blocks.2]"]}
    for variant in variants_of(study):  # values such as W&B draws
        features = variant.settings["drag.features"]
        drawn = variant.settings | {"drag.features": f"[{','.join(features)}]"}
        command = rendered(definition, drawn | {"seed": 42, "sample": "scene:sun-0"})
        assert same(parsed(command)) == same(config_of(study, variant, 42))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"data": {"scenes": 1, "size": 128}}, "data.size is 128: .* 64 px .* set data.size=64"),
        (
            {"grid": {"generate.negative_prompt": ['"a cat"', "b"]}},
            r"negative_prompt='\"a cat\"' would arrive in edit.py as 'a cat'",
        ),
        ({"grid": {"drag.features": [["a,b"], ["c"]]}}, r"drag.features=.* would arrive in edit.py as"),
        ({"grid": {"drag.lr": 0.1}}, "give a list of at least one value"),
        ({"grid": {"drag.lrr": [0.1]}}, "unknown key 'drag.lrr'"),
        ({"grid": {"drag.lr": [0.1]}, "settings": {"image": "cat.png"}}, "sets image: data of the study does that"),
        ({"data": {"path": "nowhere"}}, "nowhere is not a folder"),
    ],
)
def test_what_a_sweep_cannot_have(content, reason, file):
    with pytest.raises(UserError, match=reason):
        sweep(load_study(file(**content)))


def test_file_that_cannot_be_written(file, capsys):
    assert cli.main(["study", str(file()), "--wandb-sweep", "no/such/folder.yaml"]) == 2
    assert "cannot write the sweep to 'no/such/folder.yaml'" in capsys.readouterr().err


def test_the_command_does_nothing_else(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dragdiff.study.runner.run", lambda *_, **__: pytest.fail("the study ran"))
    written(file(results=str(tmp_path / "results"), grid={"drag.lr": [0.1]}))
    assert "wandb sweep sweep.yaml" in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["asks.yaml", "sweep.yaml"]
    assert not (tmp_path / "results").exists()
