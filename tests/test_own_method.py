"""Methods that users bring: docs/methods.md's own, by the command line, in studies and in Python; what goes wrong in
one; several methods on one sample; dragging on."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragdiff import Editor, cli, methods
from dragdiff.config import load_config
from dragdiff.data.scenes import named_scene
from dragdiff.errors import UserError
from dragdiff.study.plan import expand
from dragdiff.study.store import Store
from dragdiff.study.table import measured

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text("utf-8")
SHIFT, IN_PYTHON, UNIT_CASES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
QUICK = ["ddim.steps=4", "ddim.strength=.5", "cache.enabled=false"]


def line(start: str) -> str:
    """Where the page's method has a line that starts so."""
    return next(f"shift.py:{n}: " for n, text in enumerate(SHIFT.splitlines(), 1) if text.strip().startswith(start))


OPTION = 'option(10.0, "of what is moved with a handle, px of the picture", more_than(0))'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with the page's method."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shift.py").write_text(SHIFT, "utf-8")
    return tmp_path


def edit(*arguments: str) -> int:
    return cli.main(["edit", "embedded", *arguments])


def test_command(here, capsys):
    """It runs by its file's name; the folder that it leaves repeats the run without that file."""
    assert edit("method=shift.py", "shift.radius=12", "output.name=one", *QUICK) == 0
    assert "shift: done" in capsys.readouterr().out
    assert (here / "outputs/one/shift.py").read_text("utf-8") == SHIFT
    assert json.loads((here / "outputs/one/metrics.json").read_text())["method"] == "shift"
    (here / "shift.py").unlink()
    assert cli.main(["edit", "outputs/one/config.yaml", "output.name=two"]) == 0
    assert "note: outputs/one/config.yaml names the method of" in capsys.readouterr().err
    one, two, source = (
        np.asarray(Image.open(file))
        for file in ("outputs/one/edited.png", "outputs/two/edited.png", methods_example("sun"))
    )
    assert np.array_equal(one, two) and not np.array_equal(one, source)
    assert "radius: 12.0" in (here / "outputs/two/config.yaml").read_text()


def methods_example(name: str) -> Path:
    from dragdiff.assets import example_folder

    return example_folder(name) / "image.png"


def test_described(here, capsys):
    assert cli.main(["methods", "shift.py"]) == 0
    assert "shift.radius=10.0" in capsys.readouterr().out


def test_moves_what_it_should(here, monkeypatch):
    """The disc's content arrives shifted by the points' difference, against a loop over its places."""
    import torch

    found = torch.arange(2 * 8 * 8).reshape(2, 8, 8).float() + 100
    monkeypatch.syspath_prepend(str(here))
    shifted = importlib.import_module("shift").shifted
    moved = shifted(*_parts([[[8, 8], [24, 8]]], radius=6.0), found)
    for y in range(8):
        for x in range(8):
            inside = (x - 4 + 0.5 - 2) ** 2 + (y + 0.5 - 2) ** 2 <= 1.5**2
            left = (x + 0.5 - 2) ** 2 + (y + 0.5 - 2) ** 2 <= 1.5**2
            if inside:
                assert torch.equal(moved[:, y, x], found[:, y, x - 4])
            elif left:
                assert (moved[:, y, x].abs() < 10).all()  # noise
            else:
                assert torch.equal(moved[:, y, x], found[:, y, x])


def _parts(points, *, radius):
    from types import SimpleNamespace as Some

    import torch

    edit = Some(working=Some(points=np.array(points, float)), random=torch.Generator().manual_seed(0))
    return Some(config=Some(own=Some(radius=radius)), model=Some(latent_stride=4)), edit


def test_unit_cases_of_the_page(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    subprocess.run([sys.executable, "-c", UNIT_CASES], check=True, cwd=here)
    cases = np.load(here / "shift.npz")
    assert np.array_equal(cases["right:moved"][:, 1, 5], cases["right:latent"][:, 1, 1])


@pytest.mark.slow
def test_study(here, capsys):
    """On 8 scenes, with two workers, it leaves less of the drag than no edit does: by more than chance."""
    (here / "mine").mkdir()
    (here / "shift.py").rename(here / "mine/shift.py")
    variants = "variants: [{method: mine/shift.py}]\nsettings: {ddim.steps: 20}\n"
    data = "data: {scenes: 4, first_seed: 3000}\nmetrics: {names: [scene]}\n"
    (here / "study.yaml").write_text(variants + data)
    assert cli.main(["study", "study.yaml", "workers=2"]) == 0
    plan = expand(load_study_of("study.yaml"))
    store = Store(plan.study.results)
    distance = {name: measured(plan, store).values(name, "true_distance") for name in ("method=shift.py", "identity")}
    difference = np.subtract(
        *(np.array([*distance[name].values()]).ravel() for name in ("identity", "method=shift.py"))
    )
    assert len(difference) == 8 and difference.mean() > 2 * difference.std() / 8**0.5 > 0
    result = Path(plan.study.results) / "results" / plan.keys["method=shift.py", "sun-3000", 42]
    assert (result / "shift.py").read_text() == SHIFT
    assert cli.main(["report", "study.yaml"]) == 0
    report = Path(plan.study.results) / "study/report"
    assert "Method: shift." in (report / "report.md").read_text() and (report / "shift.py").exists()
    (here / "again").mkdir()
    for name in ("study.yaml", "shift.py"):
        (report / name).rename(here / "again" / name)
    assert expand(load_study_of("again/study.yaml")).keys == plan.keys
    capsys.readouterr()
    assert cli.main(["report", "outputs/studies/study"]) == 2  # a folder's settings run no file that is elsewhere
    assert "give the study's YAML file" in capsys.readouterr().err
    capsys.readouterr()


def load_study_of(file):
    from dragdiff.config import load_study

    return load_study(file)


def test_hash(here):
    """A result's hash holds the text of the file, not its place."""
    (here / "study.yaml").write_text("variants: [{method: shift.py}, {method: fastdrag}]\ndata: {limit: 1}\n")
    (here / "moved").mkdir()
    for name in ("study.yaml", "shift.py"):
        (here / "moved" / name).write_text((here / name).read_text())
    before, moved = (list(expand(load_study_of(f"{folder}/study.yaml")).keys.values()) for folder in (".", "moved"))
    assert before == moved
    (here / "shift.py").write_text(SHIFT + "\n")
    after = list(expand(load_study_of("study.yaml")).keys.values())
    assert after[0] != before[0] and after[1:] == before[1:]


def test_other_process(here):
    """What a worker on another machine gets holds the file's text and the method's settings."""
    import pickle

    config = load_config(["embedded"], ["method=shift.py", "shift.radius=7"])
    (here / "config").write_bytes(pickle.dumps(config))
    (here / "shift.py").unlink()
    code = (
        "import pickle; from dragdiff import methods; config = pickle.load(open('config', 'rb')); "
        "print(config.own.radius, config.reads('drag.lr'), methods.find(config.method).stages(config)[0].name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, check=True)
    assert done.stdout.split() == ["7.0", "False", "inversion"]


@pytest.mark.slow
def test_python(here, monkeypatch):
    """The page's lines, and a method given to an editor of settings that were made for another."""
    monkeypatch.syspath_prepend(str(here))
    namespace: dict = {}
    exec(IN_PYTHON, namespace)
    result, method = namespace["result"], namespace["METHOD"]
    assert result.config.method == "shift" and result.config.own.radius == 12
    scene = named_scene("sun-3000")
    assert (
        np.abs(result.image.astype(int) - scene.truth).mean()
        < np.abs(scene.sample.image - scene.truth.astype(int)).mean()
    )
    made = result.save(here / "kept")
    assert cli.main(["edit", str(here / "kept/config.yaml"), "sample=scene:sun-3000", "output.name=again"]) == 0
    assert here / "kept/shift.py" in made
    assert np.array_equal(Image.open(here / "outputs/again/edited.png"), result.image)
    with pytest.warns(UserWarning, match="shift has its published values"):
        other = Editor(load_config(["embedded"], ["ddim.steps=4", "seed=3"]), method=method)
    assert (other.config.method, other.config.seed, other.config.ddim.steps) == ("shift", 3, 50)


def test_only_below_a_settings_file(here, capsys):
    """A YAML file runs no file elsewhere."""
    (here / "inner").mkdir()
    for named in ("../shift.py", str(here / "shift.py")):
        (here / "inner/my.yaml").write_text(f"model: {{path: embedded}}\nmethod: {named}\n")
        assert cli.main(["edit", "inner/my.yaml"]) == 2
        assert "may only name a method's file below its own folder" in capsys.readouterr().err
    (here / "inner/link.py").symlink_to(here / "shift.py")
    (here / "inner/my.yaml").write_text("model: {path: embedded}\nmethod: link.py\n")
    assert cli.main(["edit", "inner/my.yaml"]) == 2
    (here / "inner/my.yaml").write_text("model: {path: embedded}\nmethods: {../shift.py: {lora.steps: 1}}\n")
    capsys.readouterr()
    assert cli.main(["edit", "inner/my.yaml"]) == 2
    assert "below the name that the file gives it" in capsys.readouterr().err
    (here / "inner/page.yaml").write_text("methods: [dragdiffusion, ../shift.py]\n")
    assert cli.main(["ui", "inner/page.yaml", "port=0"]) == 2
    (here / "inner/study.yaml").write_text("grid: {method: [fastdrag, ../shift.py]}\n")
    assert cli.main(["study", "inner/study.yaml", "--plan"]) == 2


@pytest.mark.parametrize(
    "change, said",
    [
        (("run(job):\n", "run(job):\n    broken = 1 / 0\n"), ["shift.py:18: broken = 1 / 0", "ZeroDivisionError"]),
        (("edit.working.points / stride", "edit.working.pionts"), ["edit.working.pionts:", "no attribute 'pionts'"]),
        (("import torch\n", "import torhc\n"), ["shift.py:5: import torhc", "No module named 'torhc'"]),
        (("def plan(config):", "def plan(config) return"), [line("def plan"), "def plan(config) return"]),
        (("METHOD = Method(", "MY_METHOD = Method("), ["shift.py has no METHOD"]),
        (('name="shift"', 'name="my shift"'), ["METHOD.name is 'my shift'"]),
        (('needs=("points",)', 'needs=("pionts",)'), ["METHOD.needs names 'pionts'"]),
        (('reads=("lora", "ddim",', 'reads=("lora", "dim",'), ["METHOD.reads names 'dim'"]),
        (("source.down(layers=layers))", "source.down(layers=layers), left=-1)"), ["left is -1", "shift.py:2"]),
        (('name="shift"', 'name="drag"'), ["METHOD.name is 'drag', which is taken"]),
        (('name="shift"', 'name="gooddrag"'), ["which is taken"]),
        (('"lora.steps": 0', '"lora.stpes": 0'), ["lora.stpes", "in the file of shift", "lora.steps"]),
        (("option(10.0, ", 'option("far", '), ["shift.py:14: ShiftSettings.radius", "far"]),
        (("option(10.0, ", "option(-1.0, "), ["shift.py:14: the default radius is -1.0: it must be > 0"]),
        ((OPTION, "10.0"), ["shift.py:14: ShiftSettings.radius is no option"]),
        (("settings=ShiftSettings,", "settings=ShiftSettings(),"), ["METHOD.settings is", "must be a dataclass"]),
        (("return stages.decode(", "return [3] or ("), ["run must return a list with a picture"]),
        (("(config), Stage", "(config), Stag"), [line("return [*origin"), "'Stag' is not defined"]),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(here, capsys, change, said):
    """Each is answered with the file and the line, and exit code 2."""
    assert change[0] in SHIFT
    (here / "shift.py").write_text(SHIFT.replace(*change), "utf-8")
    assert edit("method=shift.py", *QUICK) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error
    assert "Traceback" not in error and len(error.splitlines()) <= 4


def test_missing(here, capsys):
    assert edit("method=shfit.py") == 2
    assert "shfit.py" in capsys.readouterr().err
    assert edit("method=shfit") == 2
    assert "or a file my_method.py" in capsys.readouterr().err
    assert edit("method=shift.py", "shift.raduis=3") == 2
    assert "did you mean 'shift.radius'" in capsys.readouterr().err
    assert edit("method=shift.py", "shift.radius=far") == 2
    assert "shift.radius is 'far'" in capsys.readouterr().err


def test_installed(here, monkeypatch, capsys):
    """A package's method is listed and found by its name; one that can't be imported says which package."""
    info = here / "dragshift-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dragshift\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dragdiff.methods]\nslide = slide:METHOD\nlost = nowhere:METHOD\n")
    (here / "slide.py").write_text(SHIFT.replace('name="shift"', 'name="slide"'))
    monkeypatch.syspath_prepend(str(here))
    assert methods.offered() == ["slide", "lost"]
    config = load_config(["embedded"], ["method=slide", "slide.radius=3"])
    assert config.own.radius == 3 and methods.find("slide").source.startswith('"""Move what')
    assert edit("method=lost") == 2
    assert "method 'lost' of dragshift, nowhere:METHOD: ModuleNotFoundError" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- several; dragging on


def test_several(here, capsys):
    """Each method has its folder; one picture shows them beside the source. One that fails takes none with it."""
    (here / "shift.py").write_text(SHIFT.replace("run(job):\n", "run(job):\n    broken = 1 / 0\n"))
    quick = ["debug", "method=[dragdiffusion, fastdrag,shift.py]", "ddim.steps=4"]
    assert edit(*quick) == 2
    said = capsys.readouterr()
    assert "outputs/sun/comparison.png: 2 of 3 methods side by side" in said.out
    assert "passing over shift: " in said.err and "1 of 3" in said.err
    for name in ("dragdiffusion", "fastdrag"):
        assert (here / "outputs/sun" / name / "edited.png").exists()
    sheet = Image.open(here / "outputs/sun/comparison.png")
    assert 3 * 384 < sheet.width < 3 * 420 and sheet.height > 384
    shown = np.asarray(sheet)[:384, -384:]
    alone = np.asarray(Image.open(here / "outputs/sun/fastdrag/comparison.png"))[:384, -384:]
    assert np.array_equal(shown, alone)
    assert edit("debug", "method=[fastdrag,dragnoise]") == 0
    assert (here / "outputs/sun-2/dragnoise/config.yaml").exists()


def test_settings_of_each_of_several(here, capsys):
    """On the command line and in a study, one method's own settings are no mistake for the others."""
    several = ["debug", "method=[shift.py,fastdrag]", "shift.radius=7", "fastdrag.fill=keep", "ddim.steps=4"]
    assert edit(*several) == 0
    assert "radius: 7.0" in (here / "outputs/sun/shift/config.yaml").read_text()
    assert "fill: keep" in (here / "outputs/sun/fastdrag/config.yaml").read_text()
    variants = "variants: [{method: shift.py}, {method: fastdrag}]\nsettings: {shift.radius: 7, fastdrag.fill: keep}\n"
    (here / "study.yaml").write_text(variants + "data: {limit: 1}\n")
    configs = [task.config for task in expand(load_study_of("study.yaml")).tasks if task.config]
    assert {config.own.radius if config.method.endswith(".py") else config.own.fill for config in configs} == {
        7,
        "keep",
    }
    assert edit("debug", "method=[shift.py,fastdrag]", "shift.raduis=7") == 2
    (here / "mine.yaml").write_text("methods: {shift: {shift.radius: 3}, nobody: {lora.steps: 1}}\n")
    assert edit("debug", "mine.yaml", "method=shift.py", "ddim.steps=4", "output.name=layered") == 0
    assert "radius: 3.0" in (here / "outputs/layered/config.yaml").read_text()
    assert "'nobody', which is no method here" in capsys.readouterr().err


def test_several_wrong(here, capsys):
    assert edit("method=[fastdrag,goodrag]") == 2
    assert "'gooddrag'" in capsys.readouterr().err
    assert edit("method=[fastdrag,fastdrag]") == 2
    assert "names a method twice" in capsys.readouterr().err
    assert not (here / "outputs").exists()


def test_drag_on(here, capsys):
    """A result is a source, with its prompt and mask, and wants points."""
    assert edit("debug", "method=fastdrag", "output.name=first") == 0
    assert edit("debug", "method=fastdrag", "sample=outputs/first") == 2
    assert "there are no points" in capsys.readouterr().err
    points = "points=[[[28,17],[36,20]]]"
    assert edit("debug", "method=fastdrag", "sample=outputs/first", points, "output.name=second") == 0
    first = np.asarray(Image.open("outputs/first/edited.png").resize((384, 384), Image.Resampling.BICUBIC))
    shown = np.asarray(Image.open("outputs/second/comparison.png"))[300:384, :384]  # below the mask and the arrow
    dimmed = (first[300:384] * 0.55 + 0.45 * 20).astype(int)
    assert np.abs(shown - dimmed).max() <= 2
    facts = [json.loads(Path(f"outputs/{name}/metrics.json").read_text()) for name in ("first", "second")]
    assert facts[0]["prompt"] == facts[1]["prompt"] != ""
    assert Path("outputs/first/mask.png").read_bytes() == Path("outputs/second/mask.png").read_bytes()


def test_which_can(here, capsys):
    """`dragdiff methods` with a sample says what each lacks."""
    assert cli.main(["methods", "sample=example:sun"]) == 0
    assert capsys.readouterr().out.count("can run: ") == len(methods.NAMES)
    assert (
        cli.main(["methods", "shift.py", "fastdrag", "sample=example:sun", "shift.radius=7", "fastdrag.fill=keep"]) == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in said[1:]] == ["shift", "fastdrag"] and all("can run" in row for row in said[1:])
    (here / "bare").mkdir()
    Image.new("RGB", (64, 64)).save(here / "bare/image.png")
    (here / "bare/edit.json").write_text('{"prompt": "a sun", "points": []}')
    assert cli.main(["methods", "sample=bare"]) == 0
    assert "fastdrag         -  can't: there are no points" in re.sub(" +", " ", capsys.readouterr().out).replace(
        "fastdrag - can't", "fastdrag         -  can't"
    )
    assert cli.main(["methods", "sample=example:sun", "drag.features=[up_blocks.9]"]) == 0
    said = capsys.readouterr().out
    assert "drag.features names 'up_blocks.9'" in said and re.search(r"fastdrag +\d+ +can run", said)
    assert cli.main(["methods", "sample=nowhere"]) == 2


def test_bring_refuses():
    assert methods.bring("fastdrag") == "fastdrag"
    with pytest.raises(UserError, match="which is taken"):
        methods.bring(methods.find("fastdrag"))
