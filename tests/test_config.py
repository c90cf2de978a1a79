"""Settings: defaults, layers, mistakes, and what a resolved config says again."""

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dragdiff import methods
from dragdiff.config import (
    Config,
    check,
    config_class,
    config_folder,
    find_overlay,
    load_config,
    load_study,
    load_ui,
    to_yaml,
)
from dragdiff.errors import UserError
from dragdiff.options import describe, flat, read_yaml, walk
from dragdiff.study.plan import Variant, config_of

OLD_CONFIG = Path(__file__).parent / "data" / "config-without-method.yaml"
OVERLAYS = sorted(path.stem for path in config_folder().glob("*.yaml"))


def message(*overrides, files=()):
    """What is said of a mistake; always one line."""
    with pytest.raises(UserError) as caught:
        load_config(files, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- layers


def test_nothing_given_is_the_published_algorithm():
    config = load_config()
    assert config == Config()
    assert (config.lora.steps, config.lora.rank, config.lora.lr, config.lora.batch_size) == (80, 16, 5e-4, 4)
    assert (config.ddim.steps, config.ddim.strength) == (50, 0.7)
    assert (config.drag.steps, config.drag.lr, config.drag.mask_weight) == (80, 0.01, 0.1)
    assert (config.drag.motion_radius, config.drag.tracking_radius) == (1, 3)


def test_later_layers_win(tmp_path):
    first = written(tmp_path / "first.yaml", "drag:\n  lr: 0.1\n  steps: 10\nseed: 1\n")
    second = written(tmp_path / "second.yaml", "drag:\n  lr: 0.2\n")
    config = load_config([first, second], ["drag.steps=30", "drag.steps=20"])
    assert (config.drag.lr, config.drag.steps, config.seed) == (0.2, 20, 1)
    assert load_config([second, first]).drag.lr == 0.1


def test_a_list_is_replaced_not_merged(tmp_path):
    file = written(tmp_path / "x.yaml", "drag:\n  features: [mid_block, up_blocks.1]\n")
    assert load_config([file]).drag.features == ["mid_block", "up_blocks.1"]
    assert load_config([file], ["drag.features=[up_blocks.3]"]).drag.features == ["up_blocks.3"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_shipped_overlays_load_by_name_and_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        load_config([name]) == load_config([f"configs/{name}.yaml"]) == load_config([config_folder() / f"{name}.yaml"])
    )


def test_sd15_is_the_defaults():
    assert load_config(["sd15"]) == Config()


def test_own_file_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "sd15.yaml", "seed: 7\n")
    assert find_overlay("sd15.yaml") == Path("sd15.yaml")
    assert load_config(["sd15.yaml"]).seed == 7


def test_two_configs_share_no_list():
    load_config().drag.features.append("x")
    assert load_config().drag.features == ["up_blocks.2"]


# ------------------------------------------------------------------------------------------- methods


def options(config) -> dict[str, object]:
    return {key: value for key, _, value in walk(config)}


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_method_has_its_published_values_and_else_the_defaults(name):
    method, plain = methods.find(name), options(Config())
    found = options(load_config(overrides=[f"method={name}"]))
    own = {key for key in found if key.startswith(f"{name}.")}
    assert {key: found[key] for key in found if key not in own} == plain | {"method": name} | method.published
    assert own == {f"{name}.{f.name}" for f in (dataclasses.fields(method.settings) if method.settings else ())}
    assert all(method.reads_key(key) for key in method.published)


def test_a_method_may_be_named_by_any_layer_and_the_last_wins(tmp_path):
    file = written(tmp_path / "x.yaml", "method: gooddrag\n")
    assert load_config([file]).method == "gooddrag"
    assert load_config([file], ["method=fastdrag"]).method == "fastdrag"
    assert load_config([file, {"method": "dragnoise"}]).drag.lr == 0.02
    assert load_config([file], [{"method": "dragdiffusion"}]) == Config()


def test_an_overlays_plain_keys_are_for_the_default_method(tmp_path):
    """But for what is not a method's own."""
    text = (
        "seed: 7\ndrag: {lr: 0.5, steps: 9}\nlora.rank: 3\nmethods:\n  gooddrag: {drag: {steps: 4}, ddim.steps: 20}\n"
    )
    file = written(tmp_path / "x.yaml", text)
    plain, good, fast = (load_config([file], [f"method={name}"]) for name in ("dragdiffusion", "gooddrag", "fastdrag"))
    assert (plain.seed, plain.drag.lr, plain.drag.steps, plain.lora.rank, plain.ddim.steps) == (7, 0.5, 9, 3, 50)
    assert (good.seed, good.drag.lr, good.drag.steps, good.lora.rank, good.ddim.steps) == (7, 0.02, 4, 16, 20)
    assert (fast.seed, fast.drag.lr, fast.ddim.steps) == (7, 0.01, 10)
    assert load_config([file], ["method=gooddrag", "drag.lr=0.1"]).drag.lr == 0.1


def test_an_overlay_that_names_its_method_is_for_that_one(tmp_path):
    file = written(
        tmp_path / "x.yaml", "method: gooddrag\ngooddrag: {updates: 2}\ndrag: {lr: 0.3}\ndata: {max_size: 99}\n"
    )
    good = load_config([file])
    assert (good.gooddrag.updates, good.drag.lr, good.drag.motion_radius) == (2, 0.3, 4)
    with pytest.warns(UserWarning, match=r"say of drag, gooddrag is meant for gooddrag: fastdrag has its published"):
        fast = load_config([file], ["method=fastdrag"])
    assert (fast.drag.lr, fast.ddim.steps, fast.data.max_size) == (0.01, 10, 99)


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_resolved_config_is_whole_and_another_method_over_it_takes_its_own_values(name, tmp_path):
    other = "gooddrag" if name != "gooddrag" else "fastdrag"
    config = load_config(overrides=[f"method={name}", "drag.grid_scale=0.7", "seed=3"])
    file = written(tmp_path / "config.yaml", to_yaml(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config([file]) == config
    with pytest.warns(UserWarning, match=f"is meant for {name}: {other} has its published values"):
        changed = load_config([file], [f"method={other}"])
    assert changed == load_config(overrides=[f"method={other}", "seed=3"])


def test_a_key_that_the_method_does_not_read_is_noted():
    with pytest.warns(UserWarning, match=r"^fastdrag does not read drag\.lr: it changes nothing$"):
        assert load_config(overrides=["method=fastdrag", "drag.lr=0.3"]).drag.lr == 0.3
    with pytest.warns(UserWarning, match=r"gooddrag does not read drag\.steps"):
        load_config(overrides=["method=gooddrag", {"drag": {"steps": 3}}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(overrides=["method=fastdrag", "drag.grid_scale=0.3", "seed=1", "fastdrag.fill=noise"])


def test_settings_by_key_go_where_text_does():
    given = [{"drag": {"lr": 0.3}, "prompt": "a cat", "points": [[[1, 2], [3, 4]]]}, {"drag.steps": 5}]
    text = ["drag.lr=0.3", "prompt=a cat", "points=[[[1,2],[3,4]]]", "drag.steps=5"]
    assert load_config(overrides=[*given]) == load_config(overrides=text)
    assert load_config(overrides=[{"drag.lr": 1}, "drag.lr=2", {"drag": {"lr": 3}}]).drag.lr == 3


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_config_can_be_copied_and_sent_elsewhere(name):
    config = load_config(overrides=[f"method={name}", "seed=3"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert twin == config and twin is not config and type(twin) is config_class(methods.find(name))
    assert copy.deepcopy(config).drag.features is not config.drag.features


@pytest.mark.parametrize(
    ("files", "overrides", "said"),
    [
        ([], ["method=gooddrg"], "method is 'gooddrg': there are dragdiffusion, "),
        ([], ["method=gooddrg"], "did you mean 'gooddrag'?"),
        ([{"methods": {"gooddrg": {}}}], [], "did you mean 'gooddrag'?"),
        ([{"methods": {"gooddrag": {"drag.lrr": 1}}}], ["method=gooddrag"], "'drag.lrr' below methods.gooddrag in the"),
        (
            [{"methods": ["gooddrag"]}],
            [],
            "methods in the settings is ['gooddrag']: it must hold settings by the names",
        ),
        ([], ["gooddrag.levels=3"], "unknown key 'gooddrag.levels'"),
        ([], ["method=gooddrag", "gooddrag.level=3"], "did you mean 'gooddrag.levels'?"),
        ([], ["method=gooddrag", "gooddrag.levels=0"], "gooddrag.levels is 0: it must be in [1, 999]"),
        ([], ["method=fastdrag", "fastdrag.fill=paint"], "it must be neighbours | noise | keep"),
        ([], [{"drag": {"lr": "x"}}], "drag.lr is 'x' in the settings: it must be a number"),
        ([], ["method="], "method is ''"),
        ([], [{"method": 3}], "method is '3'"),
    ],
)
def test_mistakes_with_methods(files, overrides, said):
    assert said in message(*overrides, files=files)


def test_a_config_saved_before_there_were_methods_still_loads():
    """As the run of then was, key by key; and another method can be asked for over it."""
    saved = dict(flat(read_yaml(OLD_CONFIG)))
    config = load_config([OLD_CONFIG])
    found = options(config)
    assert config.method == "dragdiffusion" and saved.keys() < found.keys()
    assert {key: found[key] for key in saved} == saved
    assert {key: found[key] for key in found.keys() - saved.keys()} == {"method": "dragdiffusion", "model.unet": ""}
    good = load_config([OLD_CONFIG], ["method=gooddrag"])
    assert (good.drag.lr, good.lora.steps, good.model.path, good.seed) == (0.02, 70, "embedded", 42)


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("drag.lrr", "drag.lr"),
        ("strength", "ddim.strength"),
        ("lora.step", "lora.steps"),
        ("modle.path", "model.path"),
        ("drag.lr.x", "drag.lr"),
        ("output_folder", "output.folder"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest, tmp_path):
    text = message(f"{key}=1")
    assert repr(key) in text and f"did you mean {nearest!r}?" in text
    head, _, last = key.rpartition(".")
    lines = f"{head}:\n  {last}: 1\n" if head and "." not in head else f"{key}: 1\n"
    if head not in ("drag.lr", "modle"):
        assert f"did you mean {nearest!r}?" in message(files=[written(tmp_path / "x.yaml", lines)])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("drag.lr=abc", "drag.lr is 'abc' in 'drag.lr=abc': it must be a number"),
        ("drag.lr=", "drag.lr is None in 'drag.lr=': it must be a number"),
        ("drag.lr=nan", "drag.lr is nan: it must be a finite number"),
        ("drag.lr=.inf", "drag.lr is inf: it must be a finite number"),
        ("drag.steps=99999999999999999999", "drag.steps is 99999999999999999999: it is too large a number"),
        ("drag.lr=0", "drag.lr is 0.0: it must be in (0, 1000]"),
        ("drag.steps=3.7", "drag.steps is 3.7 in 'drag.steps=3.7': it must be a whole number"),
        ("drag.steps=true", "it must be a whole number"),
        ("drag.steps=-1", "drag.steps is -1: it must be in [0, 100000]"),
        ("lora.steps=null", "it must be a whole number"),
        ("lora.rank=0", "lora.rank is 0: it must be in [1, 1024]"),
        ("seed=-1", "seed is -1: it must be in [0, 4294967295]"),
        ("ddim.strength=0", "ddim.strength is 0.0: it must be in (0, 1]"),
        ("ddim.strength=1.01", "ddim.strength is 1.01: it must be in (0, 1]"),
        ("ddim.strength=nan", "ddim.strength is nan"),
        ("ddim.strength=0.001", "ddim.strength 0.001 of 50 steps leaves no step"),
        ("ddim.steps=1000", "in [1, 999]"),
        ("generate.enabled=maybe", "it must be true or false"),
        ("generate.guidance=0.5", "generate.guidance is 0.5: it must be in [1, 1000]"),
        ("model.dtype=fp8", "model.dtype is 'fp8': it must be fp32 | bf16 | fp16"),
        ("logger.kind=mlflow", "none | csv | wandb"),
        ("drag.features=up_blocks.2", "it must be a list"),
        ("drag.features=[]", "drag.features is empty"),
        ("points=5", "it must be a list"),
        ("points=[[[1,2],[3,4]", "cannot read 'points=[[[1,2],[3,4]'"),
        ("output.name=/x", "output.name is '/x': it must be a name"),
        ("output.name=../x", "output.name is '../x': it must be a name"),
        ("output.name=.", "output.name is '.': it must be a name"),
        ("drag=3", "drag in 'drag=3' is a section: set one of its keys, e.g. drag."),
        ("drag.lr", "settings are written key=value"),
        ("=3", "unknown key ''"),
        ("drag.lr=${nope}", "reference"),
    ],
)
def test_bad_overrides(override, said):
    assert said in message(override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drag:\n  lr: abc\n", "drag.lr is 'abc' in {file}: it must be a number"),
        ("drag: {lr: 0.3", "cannot read config {file}"),
        ("a: b: c\n", "cannot read config {file}"),
        ("drag:\n  lr: 1\n  lr: 2\n", "cannot read config {file}"),
        ("- a\n- b\n", "cannot read config {file}: it must hold key: value lines"),
        ("drag:\n", "drag in {file} is a section"),
        ("drag: [lr]\n", "drag in {file} is a section"),
        ("5: 3\n", "unknown key '5' in {file}"),
        ("prompt: [a]\n", "prompt is ['a'] in {file}: it must be text"),
    ],
)
def test_bad_files(text, said, tmp_path):
    file = written(tmp_path / "x.yaml", text)
    assert said.format(file=file) in message(files=[file])


def test_not_a_config_file(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    assert "cannot read config" in message(files=[tmp_path / "picture.png"])
    text = message(files=["nope.yaml"])
    assert "no config file 'nope.yaml'" in text
    assert all(name in text for name in OVERLAYS)
    assert "no config file" in message(files=[tmp_path])


@pytest.mark.parametrize("other", ["sample=x", "image=x.png"])
def test_generated_or_given_not_both(other):
    assert "generate.enabled" in message("generate.enabled=true", other)


def test_sample_or_image_not_both():
    assert "both sample and image" in message("sample=x", "image=x.png")


def test_a_config_made_in_python_is_checked_too():
    config = Config()
    config.drag.lr = float("nan")
    with pytest.raises(UserError, match=r"drag\.lr is nan"):
        check(config)


# ------------------------------------------------------------------------------------------- text as it stands

PROMPTS = [
    "no",
    "null",
    "~",
    "1e3",
    "a: b [c] # d, {e}",
    "a ${seed} ${",
    r"a\${b}",
    r"\\${",
    " padded ",
    "'quoted",
    'say "cheese"',
    "ünï 猫\nsecond line",
    "*a",
    "2001-01-01",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_needs_no_quoting(prompt, tmp_path):
    config = load_config(overrides=[f"prompt={prompt}"])
    assert config.prompt == prompt
    file = written(tmp_path / "config.yaml", to_yaml(config))
    assert load_config([file]).prompt == prompt


def test_quotes_around_text_are_taken_off():
    assert load_config(overrides=['prompt="a cat"', "mask='m.png'"]).prompt == "a cat"


@pytest.mark.parametrize("method", methods.NAMES)
def test_resolved_config_gives_the_same_config(method, tmp_path):
    changes = {bool: lambda v: not v, int: lambda v: v + 1, list: lambda v: [*v, "up_blocks.1"]}
    plain = load_config(overrides=[f"method={method}"])
    config = copy.deepcopy(plain)
    for key, f, value in walk(plain):
        *sections, name = key.split(".")
        holder = config
        for section in sections:
            holder = getattr(holder, section)
        allowed = f.metadata["check"]
        if key == "method":
            new = value
        elif isinstance(value, str):
            new = next((c for c in allowed.choices if c != value), value) if allowed else f"{value}x"
        elif isinstance(value, float):
            new = value * 0.9 if key != "generate.guidance" else 3.3
        else:
            new = changes[type(value)](value)
        setattr(holder, name, new)
    config.points = [[[1, 2.5], [3, 4]]]
    config.sample = ""
    config.image = ""
    config.model.memory = "normal"  # the other does not go with model.compile
    check(config)
    untouched = {key for (key, _, a), (_, _, b) in zip(walk(config), walk(plain), strict=True) if a == b}
    alone = {"drag.supervision", "drag.tracker"}  # there is one of each
    assert untouched == {"method", "sample", "image", "lora.alpha", "model.memory"} | alone
    file = written(tmp_path / "config.yaml", to_yaml(config))
    assert load_config([file]) == config


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_key_is_explained_and_its_default_allowed(method):
    config = config_class(methods.find(method))()
    check(config)
    text = describe(config)
    for key, f, value in walk(config):
        assert len(f.metadata["explanation"]) > 1, key
        assert f"  {key}={value if value != '' else repr('')}\n" in text
        assert f.metadata["explanation"] in text


def test_defaults_stand_in_dataclasses_only():
    """No field of a section goes without `option`, which carries explanation and check; nor does a method's own."""
    for name in methods.NAMES:
        config = config_class(methods.find(name))
        for section in [config, *(type(getattr(config(), f.name)) for f in dataclasses.fields(config))]:
            if dataclasses.is_dataclass(section):
                for f in dataclasses.fields(section):
                    assert "explanation" in f.metadata or dataclasses.is_dataclass(f.default_factory), f.name


def test_import_is_cheap():
    """Also of what every method says of itself."""
    code = (
        "import sys, dragdiff.config, dragdiff.cli, dragdiff.catalogue; from dragdiff import methods; "
        "[methods.find(name) for name in methods.NAMES]; "
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_free_text_that_visitors_of_the_page_may_set_names_no_file_or_device():
    """A new text option must be looked at here: mark it `local` if it names something of the machine."""
    every = [option for name in methods.NAMES for option in walk(config_class(methods.find(name))())]
    free = {k for k, f, v in every if isinstance(v, str) and not f.metadata["check"]}
    allowed = {k for k, f, _ in every if k in free and not f.metadata["local"]}
    assert allowed == {
        "prompt",
        "generate.negative_prompt",
        "control.start_layer",
    }


@pytest.mark.parametrize(
    "line, key",
    [
        ("prompt: 1E5", "prompt"),
        ("prompt: yes", "prompt"),
        ("prompt: 007", "prompt"),
        ("prompt: 12:30", "prompt"),
        ("prompt: .inf", "prompt"),
        ("output: {name: 1_000}", "output.name"),
        ("model.revision: 0x10", "model.revision"),
        ("logger: {tags: [a, 1E5]}", "logger.tags"),
    ],
)
def test_yaml_does_not_guess_what_a_text_means(tmp_path, line, key):
    file = tmp_path / "a.yaml"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=rf"{key} is read as .*, but it is text: put it in quotes"):
        load_config([file])
    name, _, value = line.partition(": ")
    if not value.startswith("{"):
        file.write_text(f"{name}: '{value}'\n")
        assert dict(flat(dataclasses.asdict(load_config([file]))))[key] == value


def test_text_on_the_command_line_needs_no_quotes():
    assert load_config(overrides=["prompt=1E5", "output.name=007"]).prompt == "1E5"


@pytest.mark.parametrize(
    "override",
    [
        *("drag.lr=1e38", "lora.lr=1e38", "lora.rank=100000", "lora.batch_size=1000000000", "lora.resolution=100000"),
        *("drag.motion_radius=10000", "drag.tracking_radius=5000", "generate.height=1000000", "generate.width=1000000"),
        *("drag.stop_distance=1e38", "drag.mask_weight=1e38", "lora.weight_decay=1e38", "generate.guidance=1e38"),
        *("lora.steps=1000000000", "drag.steps=1000000000", "lora.alpha=1e38", "generate.freeu_b1=1e38"),
    ],
)
def test_absurd_values_are_out_of_range(override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"{re.escape(key)} is .*: it must be in "):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    "text",
    [
        *("${oc.env:SECRET}", "${ oc.env:SECRET }", "a ${seed} ${oc.env:SECRET}", "${a.${oc.env:SECRET}}"),
        *("${oc.decode:${oc.env:SECRET}}", "\\\\${oc.env:SECRET}"),
    ],
)
def test_settings_never_read_the_environment(tmp_path, monkeypatch, text):
    """In YAML, in `key=value`, in a study and what it gives its edits: such a text stands as it is."""
    monkeypatch.setenv("SECRET", "secret")
    (tmp_path / "a.yaml").write_text(json.dumps({"prompt": text, "logger": {"tags": [text]}}))
    config = load_config([tmp_path / "a.yaml"])
    assert config.prompt == text and config.logger.tags == [text]
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "saved.yaml"]) == config
    assert load_config(overrides=[f"logger.tags={json.dumps([text])}"]).logger.tags == [text]
    (tmp_path / "page.yaml").write_text(json.dumps({"token": text}))
    assert load_ui([tmp_path / "page.yaml"]).token == text
    (tmp_path / "study.yaml").write_text(json.dumps({"base": [], "question": text, "settings": {"logger.group": text}}))
    study = load_study(tmp_path / "study.yaml")
    assert study.question == text
    assert config_of(study, Variant("a", {}), 1).logger.group == text


def test_an_escaped_reference_is_text_in_a_study_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "secret")
    (tmp_path / "study.yaml").write_text(json.dumps({"base": [], "settings": {"logger.group": "\\${oc.env:SECRET}"}}))
    assert config_of(load_study(tmp_path / "study.yaml"), Variant("a", {}), 1).logger.group == "${oc.env:SECRET}"


def test_a_reference_to_another_key_is_followed():
    assert load_config([{"prompt": "a ${seed}", "seed": 7}]).prompt == "a 7"
