"""Settings: defaults, layers, mistakes, and what a resolved config says again."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dragdiff.config import Config, check, config_folder, describe, find_overlay, load_config, to_yaml, walk
from dragdiff.errors import UserError

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
        ("drag.lr=0", "drag.lr is 0.0: it must be > 0"),
        ("drag.steps=3.7", "drag.steps is 3.7 in 'drag.steps=3.7': it must be a whole number"),
        ("drag.steps=true", "it must be a whole number"),
        ("drag.steps=-1", "drag.steps is -1: it must be >= 0"),
        ("lora.steps=null", "it must be a whole number"),
        ("lora.rank=0", "lora.rank is 0: it must be >= 1"),
        ("seed=-1", "seed is -1: it must be in [0, 4294967295]"),
        ("ddim.strength=0", "ddim.strength is 0.0: it must be in (0, 1]"),
        ("ddim.strength=1.01", "ddim.strength is 1.01: it must be in (0, 1]"),
        ("ddim.strength=nan", "ddim.strength is nan"),
        ("ddim.strength=0.001", "ddim.strength 0.001 of 50 steps leaves no step"),
        ("ddim.steps=1000", "in [1, 999]"),
        ("generate.enabled=maybe", "it must be true or false"),
        ("generate.guidance=0.5", "generate.guidance is 0.5: it must be >= 1"),
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


def test_resolved_config_gives_the_same_config(tmp_path):
    changes = {bool: lambda v: not v, int: lambda v: v + 1, list: lambda v: [*v, "up_blocks.1"]}
    config = Config()
    for key, f, value in walk(Config()):
        *sections, name = key.split(".")
        holder = config
        for section in sections:
            holder = getattr(holder, section)
        allowed = f.metadata["check"]
        if isinstance(value, str):
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
    untouched = {key for (key, _, a), (_, _, b) in zip(walk(config), walk(Config()), strict=True) if a == b}
    assert untouched == {"sample", "image", "lora.alpha", "model.memory"}
    file = written(tmp_path / "config.yaml", to_yaml(config))
    assert load_config([file]) == config


# ------------------------------------------------------------------------------------------- help


def test_every_key_is_explained_and_its_default_allowed():
    check(Config())
    text = describe()
    for key, f, value in walk(Config()):
        assert len(f.metadata["explanation"]) > 1, key
        assert f"  {key}={value if value != '' else repr('')}\n" in text
        assert f.metadata["explanation"] in text


def test_defaults_stand_in_dataclasses_only():
    """No field of a section goes without `option`, which carries explanation and check."""
    for section in [Config, *(type(getattr(Config(), f.name)) for f in dataclasses.fields(Config))]:
        if dataclasses.is_dataclass(section):
            for f in dataclasses.fields(section):
                assert "explanation" in f.metadata or dataclasses.is_dataclass(f.default_factory), f.name


def test_import_is_cheap():
    code = (
        "import sys, dragdiff.config, dragdiff.cli; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_free_text_that_visitors_of_the_page_may_set_names_no_file_or_device():
    """A new text option must be looked at here: mark it `local` if it names something of the machine."""
    free = {k for k, f, v in walk(Config()) if isinstance(v, str) and not f.metadata["check"]}
    allowed = {k for k, f, _ in walk(Config()) if k in free and not f.metadata["local"]}
    assert allowed == {
        "prompt",
        "generate.negative_prompt",
        "drag.supervision",
        "drag.tracker",
        "control.start_layer",
    }
