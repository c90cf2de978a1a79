"""The commands as a person uses them: runs, repeated runs, many samples, mistakes, Ctrl-C."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dragdiff import editor, methods, progress
from dragdiff.backbones.loading import load_backbone
from dragdiff.cli import main, main_edit, main_train
from dragdiff.config import Config, load_config
from dragdiff.data.readers import write_folder
from dragdiff.data.sample import EditSample
from dragdiff.options import walk

ROOT = Path(__file__).parent.parent
POINTS = "points=[[[8,8],[20,8]]]"
SIZE = 32
STAGES = ["LoRA", "inversion", "drag", "denoise", "decode"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with a picture and a mask."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save("pic.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[2:20] = 255
    Image.fromarray(mask).save("mask.png")
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_pipeline):
    """The small model, loaded once; an edit leaves it as it was."""
    return load_backbone(load_config(overrides=[f"model.path={tiny_pipeline}", "model.device=cpu"]).model)


@pytest.fixture
def settings(tiny_pipeline, loaded, monkeypatch):
    """What makes a run small; a run needs a picture and points besides."""
    load, here = editor.load_backbone, loaded
    monkeypatch.setattr(
        editor,
        "load_backbone",
        lambda config: here if config.path == str(tiny_pipeline) and not config.vae + config.unet else load(config),
    )
    return ["debug", f"model.path={tiny_pipeline}", "model.device=cpu", "lora.resolution=16", "drag.stop_distance=0"]


@pytest.fixture
def no_model(settings, monkeypatch):
    """A mistake must be found before a model is loaded."""
    monkeypatch.setattr("dragdiff.editor.load_backbone", lambda _: pytest.fail("a model was loaded"))


def the_line(capsys, *words):
    """The one line on stderr, which has these words."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("dragdiff: ")
    for word in words:
        assert word in line
    return line


def numbers_of(folder):
    """metrics.json without what differs between equal runs."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("seconds", "peak_memory_mb")}


def command(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, **options
    )


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([ROOT / "edit.py"], "python edit.py"),
        ([ROOT / "train.py"], "python train.py"),
        (["-m", "dragdiff", "edit"], "dragdiff edit"),
    ],
)
def test_help_lists_every_key_under_the_right_name(arguments, name, tmp_path):
    done = command(*map(str, arguments), "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name} [CONFIG.yaml ...] [key=value ...]\n")
    assert f"  {name} configs/sd15.yaml image=cat.jpg" in done.stdout
    if not name.endswith("train.py"):
        assert "method=NAME" in done.stdout and "`dragdiff methods`" in done.stdout
    for key, f, value in walk(Config()):
        assert f"  {key}={value if value != '' else repr('')}\n      {f.metadata['explanation']}" in done.stdout


def test_help_is_quick():
    """A second on a free machine; what is measured is what takes the time, imports."""
    code = (
        "import sys\nfrom dragdiff.cli import main\ntry: main(['edit', '--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'numpy', 'PIL', 'lightning', 'diffusers') if m in sys.modules])"
    )
    assert command("-c", code).stdout.endswith("heavy: []\n")


def test_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: dragdiff ")
    assert all(verb in text for verb in ("edit", "train", "methods", "convert"))
    for wrong in (["nonsense"], []):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2


# ------------------------------------------------------------------------------------------- methods


def test_methods_are_listed_with_what_they_cost(capsys):
    assert main(["methods"]) == 0
    head, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(methods.NAMES)
    for line, name in zip(lines, methods.NAMES, strict=True):
        method = methods.find(name)
        forwards = sum(stage.forwards for stage in method.stages(load_config(overrides=[f"method={name}"])))
        assert line.split()[1:3] == [str(method.year), f"arXiv:{method.paper}"]
        for title, entries in (("needs", method.needs), ("uses", method.uses)):  # in columns
            assert line[head.index(title) :].startswith(", ".join(entries) or "-")
        assert len(line) == len(head) and int(line.split()[-1]) == round(forwards)
    costs = {line.split()[0]: int(line.split()[-1]) for line in lines}
    # by hand: 80 steps of 4 rows at 2.3; 35 up; 80 at 2.3, 8 previews; 35 down for source and edit; a decoding of 3
    assert costs["dragdiffusion"] == 736 + 35 + 184 + 8 + 70 + 3
    assert costs["fastdrag"] == 7 + 14 + 3


def test_methods_hint_at_more(capsys):
    assert main(["methods"]) == 0
    assert "`dragdiff methods NAME` says more" in capsys.readouterr().out


@pytest.mark.parametrize("name", methods.NAMES)
def test_all_that_is_known_of_a_method(name, capsys):
    assert main(["methods", name]) == 0
    text, method = capsys.readouterr().out, methods.find(name)
    first, second, *_ = text.splitlines()
    assert first == f"{method.title} ({method.year})" and second == f"https://arxiv.org/abs/{method.paper}"
    assert all(part in text for part in (method.summary, method.note, *method.needs, *method.uses))
    defaults = {key: value for key, _, value in walk(Config())}
    for key, value in method.published.items():
        assert f"  {key}={value}  (default {defaults[key]})\n" in text
    assert ("published values" in text) == bool(method.published)
    config = load_config(overrides=[f"method={name}"])
    for key, f, value in walk(config.own) if method.settings else ():
        words = f"  [{f.metadata['check'].words}]" if f.metadata["check"] else ""
        assert f"  {name}.{key}={value}\n      {f.metadata['explanation']}{words}\n" in text
    assert ("settings of its own" in text) == (method.settings is not None)


def test_a_method_that_is_not_there(capsys):
    assert main(["methods", "gooddrg"]) == 2
    the_line(capsys, "'gooddrg'", "did you mean 'gooddrag'?", *methods.NAMES)
    assert main(["methods", "gooddrag", "--all"]) == 2
    the_line(capsys, "unknown option --all")


def test_methods_need_no_torch():
    code = (
        "import sys\nfrom dragdiff.cli import main\nmain(['methods'])\nmain(['methods', 'gooddrag'])\n"
        "print('heavy:', [m for m in ('torch', 'numpy', 'PIL', 'lightning', 'diffusers') if m in sys.modules])"
    )
    assert command("-c", code).stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("name", methods.NAMES)
def test_an_edit_by_each_method_and_again_from_its_config(name, settings, place):
    small = [entry for entry in settings if not entry.startswith("drag.")]
    run = [*small, f"method={name}", "image=pic.png", "prompt=a cat", POINTS, "mask=mask.png"]
    assert main_edit(run) == 0
    saved, own = load_config(["outputs/pic/config.yaml"]), load_config(["debug"], [f"method={name}"])
    assert (saved.method, saved.ddim, saved.drag, saved.own) == (name, own.ddim, own.drag, own.own)
    assert main_edit(["outputs/pic/config.yaml"]) == 0
    assert Path("outputs/pic/edited.png").read_bytes() == Path("outputs/pic-2/edited.png").read_bytes()
    if name != "dragdiffusion":
        assert main_edit([*run, "method=dragdiffusion"]) == 0
        assert Path("outputs/pic/edited.png").read_bytes() != Path("outputs/pic-3/edited.png").read_bytes()


# ------------------------------------------------------------------------------------------- one edit


def test_edit_end_to_end_and_again_from_its_config(settings, place, monkeypatch, capsys):
    """A real process leaves the console clean; its resolved config alone, from elsewhere, gives the same bits."""
    relative = os.path.relpath(settings[1].removeprefix("model.path="), place)
    settings[1] = f"model.path={relative}"
    done = command(
        str(ROOT / "edit.py"), *settings, "image=pic.png", "prompt=a cat", POINTS, "mask=mask.png", cwd=place
    )
    assert done.returncode == 0, done.stderr
    first = place / "outputs" / "pic"
    assert sorted(path.relative_to(first).as_posix() for path in first.rglob("*")) == [
        "comparison.png",
        "config.yaml",
        "edited.png",
        "frames",
        "frames/0000.png",
        "frames/0001.png",
        "mask.png",
        "metrics.json",
        "trajectory.gif",
    ]
    lines = done.stderr.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == STAGES, "nothing but a line for each stage"
    assert re.fullmatch(r" +drag: 2/2 steps, \d+\.\d px left \(\d+\.\d s\)", lines[2])
    after = numbers_of(first)["points"][0]["distance_after_px"]
    assert done.stdout.splitlines() == [
        "wrote outputs/pic/: edited.png, comparison.png, trajectory.gif, metrics.json, config.yaml",
        "drag: 2 steps, all steps done",
        f"point 1: 12.0 px from its target before, {after:.1f} px after (as tracked)",
    ]
    assert Image.open(first / "edited.png").size == (SIZE, SIZE)

    elsewhere = place / "else" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert main_edit([str(first / "config.yaml")]) == 0
    second = elsewhere / "outputs" / "pic"
    assert "wrote outputs/pic/" in capsys.readouterr().out
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    assert numbers_of(first) == numbers_of(second)
    for name in ("edited.png", "comparison.png", "trajectory.gif", "frames/0001.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_inside_a_job_of_a_cluster(settings, place, monkeypatch):
    """A run is one process whatever a scheduler's variables say."""
    for name, value in {"NTASKS": 2, "JOB_ID": 7, "JOB_NAME": "x", "PROCID": 0, "LOCALID": 0, "NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main_edit([*settings, "lora.steps=0", "image=pic.png", POINTS]) == 0


def test_a_note_is_said_once(settings, place, capsys):
    long = "a cat " * 9
    assert main_edit([*settings, "image=pic.png", POINTS, f"prompt={long}", "lora.steps=2"]) == 0
    assert capsys.readouterr().err.count("tokens, the model reads the first 16") == 1


def test_seed_and_settings_matter(settings, place):
    """Otherwise equal bits above would say nothing."""
    for name, changed in (("a", "seed=1"), ("b", "seed=2"), ("c", "drag.lr=0.3")):
        assert main_edit([*settings, "image=pic.png", POINTS, changed, f"output.name={name}"]) == 0
    assert len({Path(f"outputs/{name}/edited.png").read_bytes() for name in "abc"}) == 3


def test_every_path_of_the_resolved_config_is_absolute(settings, place, tiny_pipeline):
    assert main_train([*settings, "image=pic.png", "output.name=l", "output.folder=out"]) == 0
    relative = os.path.relpath(tiny_pipeline, place)
    parts = [f"model.path={relative}", f"model.vae={relative}/vae", f"model.unet={relative}"]
    own = ["lora.path=out/l", "image=./pic.png", "mask=mask.png"]
    assert main_edit([*settings, *parts, *own, POINTS, "output.folder=out"]) == 0
    config = load_config(["out/pic/config.yaml"])
    model = config.model
    for path in (config.image, config.mask, model.path, model.vae, model.unet, config.lora.path):
        assert Path(path).is_absolute() and Path(path).exists()


def test_runs_of_one_name_never_overwrite(settings, place):
    run = [*settings, "lora.steps=0", "image=pic.png", POINTS]
    assert main_edit(run) == 0
    before = {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    assert main_edit([*run, "drag.lr=0.2"]) == 0
    assert main_edit([*run, "output.name=mine"]) == 0
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["mine", "pic", "pic-2"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_lora_comes_from_the_cache_the_second_time(settings, place, capsys):
    run = [*settings, "cache.enabled=true", "cache.folder=kept", "image=pic.png", POINTS]
    assert main_edit(run) == 0
    assert "from the cache" not in capsys.readouterr().err
    assert main_edit(run) == 0
    assert "LoRA: 2/2 steps, from the cache" in capsys.readouterr().err
    assert Path("outputs/pic/edited.png").read_bytes() == Path("outputs/pic-2/edited.png").read_bytes()


def test_unwritable_cache_is_only_a_note(settings, place, capsys):
    run = [*settings, "cache.enabled=true", "cache.folder=pic.png/x", "image=pic.png", POINTS]
    assert main_edit(run) == 0
    assert "note: cannot write the cache" in capsys.readouterr().err


def test_divergence_is_said_and_the_last_good_latent_kept(settings, place, capsys):
    assert main_edit([*settings, "lora.steps=0", "image=pic.png", POINTS, "drag.lr=1000"]) == 0
    assert "drag: 0 steps, diverged at step 1" in capsys.readouterr().out
    numbers = numbers_of(Path("outputs/pic"))
    assert numbers["steps"] == 0
    assert "lower drag.lr" in numbers["stop_reason"]
    assert main_edit([*settings, "lora.steps=0", "image=pic.png", POINTS, "drag.steps=0"]) == 0
    assert numbers_of(Path("outputs/pic-2"))["stop_reason"] == "steps"
    assert Path("outputs/pic/edited.png").read_bytes() == Path("outputs/pic-2/edited.png").read_bytes()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "drag.motion_radius=1000",
            "radius is 1000: the feature grid of a picture of 32x32 px has 16x16 px",
        ),
        ("drag.tracking_radius=900", "drag.tracking_radius is 900"),
        ("drag.stop_distance=100", "drag.stop_distance is 100.0"),
        ("drag.grid_scale=0.02", "drag.grid_scale is 0.02: the feature grid of a picture of 32x32 px has 0x0 px"),
    ],
)
def test_what_does_not_fit_the_picture_is_said_before_the_model_is_loaded(
    settings, place, capsys, monkeypatch, setting, said
):
    monkeypatch.setattr(editor, "load_backbone", lambda *_: pytest.fail("loaded"))
    assert main_edit([*settings, "image=pic.png", POINTS, setting]) == 2
    assert said in capsys.readouterr().err


def test_handles_that_were_near_from_the_start_have_not_arrived(settings, place, capsys):
    assert main_edit([*settings, "lora.steps=0", "image=pic.png", POINTS, "drag.stop_distance=16"]) == 0
    said = capsys.readouterr().out
    assert "nearer to their targets than drag.stop_distance=16 grid px" in said and "arrived" not in said


def test_diverging_lora_is_an_error_and_not_cached(settings, place, capsys, monkeypatch):
    adam = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, **more: adam(weights, lr=1e30, **more))
    run = [*settings, "image=pic.png", POINTS, "lora.lr=1", "lora.steps=4", "cache.enabled=true", "cache.folder=c"]
    assert main_edit(run) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "dragdiff: the LoRA's training diverged: try a smaller lora.lr than 1"
    assert not list(Path("c").glob("lora/*")) and not list(Path("c").glob("inversion/*"))


# ------------------------------------------------------------------------------------------- generated pictures


def test_generated_picture(settings, place, capsys):
    run = [*settings, "generate.enabled=true", "prompt=a cat", "generate.height=32", "generate.width=48", "seed=5"]
    assert main_edit(run) == 0
    captured = capsys.readouterr()
    assert "wrote outputs/generated-5/generated.png; to drag it, add points=" in captured.out
    assert [line.split(":")[0].strip() for line in captured.err.splitlines()] == ["generate"]
    assert Image.open("outputs/generated-5/generated.png").size == (48, 32)

    assert main_edit([*run, "points=[[[8,8],[40,8]]]", "data.max_size=16", "generate.freeu=true"]) == 0
    captured = capsys.readouterr()
    stages = [line.split(":")[0].strip() for line in captured.err.splitlines()]
    assert stages == ["generate", "drag", "denoise", "decode"], "neither LoRA nor inversion, and generated once"
    assert Image.open("outputs/generated-5-2/edited.png").size == (48, 32)
    assert main_edit(["outputs/generated-5-2/config.yaml"]) == 0
    assert (
        Path("outputs/generated-5-2/edited.png").read_bytes() == Path("outputs/generated-5-3/edited.png").read_bytes()
    )


def test_point_outside_the_picture_to_be_generated(settings, place, no_model, capsys):
    assert main_edit([*settings, "generate.enabled=true", "generate.width=32", "points=[[[8,8],[40,8]]]"]) == 2
    the_line(capsys, "(40, 8)", "32x512")


# ------------------------------------------------------------------------------------------- many samples


@pytest.fixture
def album(place):
    """Two good samples and two broken ones, in folders of folders."""
    for name, seed in (("cats/one", 1), ("cats/two", 2), ("cats/broken", 3), ("dogs/one", 4)):
        picture = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        write_folder(EditSample(picture, "an animal", [[[8, 8], [20, 8]]]), place / "album" / name)
    (place / "album" / "cats" / "broken" / "image.png").write_text("no picture")
    edit = json.loads((place / "album" / "dogs" / "one" / "edit.json").read_text())
    edit["points"] = [[[8, 8], [99, 8]]]
    (place / "album" / "dogs" / "one" / "edit.json").write_text(json.dumps(edit))
    return Path("album")


def test_folder_of_samples(settings, album, capsys):
    assert main_edit([*settings, f"sample={album}", "lora.steps=0"]) == 2
    captured = capsys.readouterr()
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["cats-one", "cats-two"]
    assert captured.out.count("wrote ") == 2
    lines = [line for line in captured.err.splitlines() if " steps" not in line]
    assert lines[0].startswith("dragdiff: passing over cats-broken: ") and "not an image" in lines[0]
    assert lines[1].startswith("dragdiff: passing over dogs-one: ") and "(99, 8)" in lines[1]
    assert lines[2] == "dragdiff: 2 of 4 samples failed:"
    assert [line.split(":")[0].strip() for line in lines[3:]] == ["cats-broken", "dogs-one"]

    config = load_config(["outputs/cats-two/config.yaml"])
    assert config.sample == str(album.absolute() / "cats" / "two")


def test_sample_alone_gives_the_same_as_among_many(settings, album):
    assert main_edit([*settings, f"sample={album}", "lora.steps=0"]) == 2
    assert main_edit(["outputs/cats-two/config.yaml"]) == 0
    assert Path("outputs/cats-two/edited.png").read_bytes() == Path("outputs/cats-two-2/edited.png").read_bytes()
    assert numbers_of(Path("outputs/cats-two")) == numbers_of(Path("outputs/cats-two-2"))


def test_name_stands_before_the_samples_names(settings, album):
    assert main_edit([*settings, f"sample={album}", "lora.steps=0", "output.name=trial"]) == 2
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["trial-cats-one", "trial-cats-two"]
    assert load_config(["outputs/trial-cats-one/config.yaml"]).output.name == "trial-cats-one"


def test_failure_under_way_does_not_stop_the_others(settings, album, capsys):
    """A mask too small for the latent is found only when the model is known."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[1, 1] = 255
    Image.fromarray(mask).save(album / "cats" / "one" / "mask.png")
    assert main_edit([*settings, f"sample={album / 'cats'}", "lora.steps=0"]) == 2
    err = capsys.readouterr().err
    assert "passing over one: the mask's editable area vanishes" in err
    assert "dragdiff: 2 of 3 samples failed:" in err
    assert Path("outputs/two/edited.png").is_file()
    assert not Path("outputs/one/edited.png").exists()


CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU), MemoryError()])
def test_picture_too_large_for_the_memory_does_not_stop_the_others(settings, album, monkeypatch, capsys, error):
    drag = editor.Editor.edit

    def large(self, sample, **options):
        if sample.name == "one":
            raise error
        return drag(self, sample, **options)

    monkeypatch.setattr(editor.Editor, "edit", large)
    assert main_edit([*settings, f"sample={album / 'cats'}", "lora.steps=0"]) == 2
    assert "passing over one: the device's memory is too small" in capsys.readouterr().err
    assert Path("outputs/two/edited.png").is_file()


def test_one_sample_may_be_broken_only_if_there_are_more(settings, album, no_model, capsys):
    assert main_edit([*settings, f"sample={album / 'cats' / 'broken'}"]) == 2
    the_line(capsys, "image.png is not an image")
    assert main_edit([*settings, f"sample={album / 'dogs'}"]) == 2
    the_line(capsys, "(99, 8)")


def test_nothing_usable(settings, album, no_model, capsys):
    for name in ("one", "two"):
        (album / "cats" / name / "image.png").unlink()
    assert main_edit([*settings, f"sample={album}"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"dragdiff: none of the 4 samples in {album.absolute()} can be used"
    )


def test_points_prompt_and_mask_given_beside_a_sample_replace_its_own(settings, album):
    given = ["prompt=something else", "points=[[[4,4],[9,9]]]", "mask=mask.png"]
    assert main_edit([*settings, f"sample={album / 'cats' / 'one'}", "lora.steps=0", *given]) == 0
    assert numbers_of(Path("outputs/one"))["points"][0]["handle"] == [4, 4]
    assert main_edit(["outputs/one/config.yaml"]) == 0
    assert Path("outputs/one/edited.png").read_bytes() == Path("outputs/one-2/edited.png").read_bytes()


# ------------------------------------------------------------------------------------------- training


def test_train_then_edit_with_it(settings, place, capsys):
    assert main_train([*settings, "image=pic.png", "prompt=a cat", "lora.save_every=1"]) == 0
    assert "wrote outputs/pic-lora/pytorch_lora_weights.safetensors; use it with lora.path=outputs/pic-lora" in (
        capsys.readouterr().out
    )
    assert {"step-0001", "step-0002", "last.ckpt", "config.yaml"} <= {
        p.name for p in Path("outputs/pic-lora").iterdir()
    }
    assert main_edit([*settings, "image=pic.png", "prompt=a cat", POINTS, "lora.path=outputs/pic-lora"]) == 0
    assert "LoRA:" not in capsys.readouterr().err, "no training"
    assert main_edit([*settings, "image=pic.png", "prompt=a cat", POINTS]) == 0
    assert Path("outputs/pic/edited.png").read_bytes() == Path("outputs/pic-2/edited.png").read_bytes()


def test_train_again_from_its_config(settings, place):
    assert main_train([*settings, "image=pic.png"]) == 0
    assert load_config(["outputs/pic-lora/config.yaml"]).points == []
    assert main_train(["outputs/pic-lora/config.yaml"]) == 0
    first, second = (
        load_file(f"outputs/{name}/pytorch_lora_weights.safetensors") for name in ("pic-lora", "pic-lora-2")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_train_a_folder(settings, album):
    assert main_train([*settings, f"sample={album / 'cats'}"]) == 2  # one is broken
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["one-lora", "two-lora"]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (["lora.steps=0"], "lora.steps is 0"),
        (["lora.path=pic.png"], "leave it empty to train a new LoRA"),
        (["generate.enabled=true", "image="], "a generated picture needs no LoRA"),
    ],
)
def test_what_train_refuses(wrong, word, settings, place, no_model, capsys):
    assert main_train([*settings, "image=pic.png", *wrong]) == 2
    the_line(capsys, word)


# ------------------------------------------------------------------------------------------- mistakes


def _bomb(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.fixture
def broken_files(place):
    (place / "text.png").write_text("no picture")
    (place / "cut.png").write_bytes((place / "pic.png").read_bytes()[:300])
    (place / "config.yaml").write_text("drag: {lr: 1")
    (place / "folder").mkdir()
    (place / "model").mkdir()
    (place / "weights.ckpt").write_bytes(b"\x80\x02")
    _bomb(place / "bomb.png")
    Image.new("L", (16, 16), 255).save(place / "small-mask.png")
    Image.new("L", (SIZE, SIZE), 0).save(place / "black.png")
    return place


MISTAKES = {
    # image
    "missing": (["image=nope.png"], ["nope.png does not exist"]),
    "not an image": (["image=text.png"], ["text.png is not an image"]),
    "damaged": (["image=cut.png"], ["cut.png cannot be read as an image"]),
    "folder": (["image=folder"], ["folder is not a file"]),
    "bomb": (["image=bomb.png"], ["bomb.png has over", "pixels"]),
    # points
    "no points": (["points=[]"], ["there are no points, and dragdiffusion needs them: give pairs [[[x, y], [x, y]]"]),
    "odd points": (["points=[[1,2],[3,4],[5,6]]"], ["odd (3)"]),
    "half a point": (["points=[[[1],[3,4]]]"], ["malformed"]),
    "text for points": (["points=[[[a,b],[3,4]]]"], ["not all numbers"]),
    "handle outside": (["points=[[[-1,2],[3,4]]]"], ["handle of pair 1 of 1", "(-1, 2)", "32x32 px"]),
    "target outside": (["points=[[[1,2],[3,4]],[[1,2],[3,32]]]"], ["target of pair 2 of 2", "(3, 32)", "32x32 px"]),
    "point is NaN": (["points=[[[1,2],[.nan,4]]]"], ["target of pair 1 of 1", "nan"]),
    # mask
    "mask missing": (["mask=nope.png"], ["nope.png does not exist"]),
    "mask of another size": (["mask=small-mask.png"], ["16x16", "32x32"]),
    "black mask": (["mask=black.png"], ["marks nothing as editable"]),
    # sample
    "no sample there": (["image=", "sample=nope"], ["nope is not a folder"]),
    "no sample in it": (["image=", "sample=folder"], ["holds no sample"]),
    "no such example": (["image=", "sample=example:nope"], ["no example 'nope'"]),
    "no such scene": (["image=", "sample=scene:moon-3"], ["no scene 'moon-3'", "sun, tower"]),
    "scene without a number": (["image=", "sample=scene:sun"], ["no scene 'sun'"]),
    "sample and image": (["sample=folder"], ["both sample and image"]),
    "nothing to edit": (["image="], ["nothing to edit", "image=FILE"]),
    # model
    "no model": (["model.path=./nope"], ["model.path is", "nope'", "no such file or folder", "hub id"]),
    "folder without a model": (["model.path=model"], ["no model_index.json"]),
    "pickled model": (["model.path=weights.ckpt"], ["only .safetensors"]),
    "no VAE": (["model.vae=./nope"], ["model.vae is", "nope'", "no such file or folder"]),
    "no UNet": (["model.unet=./nope"], ["model.unet is", "nope'", "no such folder"]),
    "no such device": (["model.device=quantum"], ["model.device is 'quantum'"]),
    "device that is not here": (["model.device=cuda:99"], ["cuda:99"]),
    "fp16 autocast on CPU": (["model.autocast=fp16"], ["needs CUDA"]),
    "no such block": (["drag.features=[up_blocks.7]"], ["'up_blocks.7'", "down_blocks.0", "mid_block", "up_blocks.3"]),
    "no such layer": (["control.start_layer=up_blocks.9"], ["'up_blocks.9'", "up_blocks.3"]),
    "no LoRA": (["lora.path=nope"], ["lora.path is", "nope", "no such file"]),
    "not a LoRA": (["lora.path=text.png"], ["cannot read the LoRA", "text.png"]),
    "no checkpoint": (["lora.resume=nope"], ["lora.resume is", "no such file"]),
    # strategies and numbers
    "tracker": (["drag.tracker=telepathy"], ["drag.tracker is 'telepathy'", "nearest"]),
    "supervision": (["drag.supervision=none"], ["drag.supervision is 'none'", "one_step"]),
    "strength 0": (["ddim.strength=0"], ["ddim.strength is 0.0", "(0, 1]"]),
    "strength above 1": (["ddim.strength=1.1"], ["ddim.strength is 1.1", "(0, 1]"]),
    "strength NaN": (["ddim.strength=nan"], ["ddim.strength is nan"]),
    "wrong type": (["drag.lr=fast"], ["drag.lr is 'fast'", "a number"]),
    "max_size too small": (["data.max_size=4"], ["16 px"]),
    # settings
    "unknown key": (["drag.learning_rate=1"], ["unknown key 'drag.learning_rate'", "did you mean"]),
    "no such method": (["method=dragdiff"], ["method is 'dragdiff'", "gooddrag", "did you mean 'dragdiffusion'"]),
    "no config file": (["nope.yaml"], ["no config file 'nope.yaml'", "sd15"]),
    "malformed config": (["config.yaml"], ["cannot read config config.yaml"]),
    "option": (["--steps", "3"], ["unknown option --steps", "key=value"]),
    # output
    "output below a file": (["output.folder=pic.png/x"], ["cannot write to output.folder 'pic.png/x'", "pic.png"]),
    "output is a file": (["output.folder=pic.png"], ["cannot write to output.folder 'pic.png'"]),
    "name below a file": (["output.folder=.", "output.name=pic.png/x"], ["cannot write to output.folder '.'"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_any_model(name, settings, broken_files, no_model, capsys):
    wrong, words = MISTAKES[name]
    before = sorted(broken_files.rglob("*"))
    if "no_model_index" in name or name in ("no model", "folder without a model", "pickled model"):
        settings = [entry for entry in settings if not entry.startswith("model.path")]
    if name in ("no such device", "device that is not here"):
        settings = [entry for entry in settings if not entry.startswith("model.device")]
    if not any(entry.startswith("points=") for entry in wrong):
        wrong = [POINTS, *wrong]
    assert main_edit([*settings, "image=pic.png", *wrong]) == 2
    the_line(capsys, *words)
    assert sorted(broken_files.rglob("*")) == before, "nothing is left behind"


def test_each_method_says_what_it_needs(settings, place, no_model, capsys):
    assert main_edit([*settings, "image=pic.png", "method=fastdrag"]) == 2
    note, line = capsys.readouterr().err.splitlines()
    assert note == "note: fastdrag does not read drag.stop_distance: it changes nothing"
    assert line.startswith("dragdiff: there are no points, and fastdrag needs them: give pairs")


@pytest.mark.parametrize("damage", ["missing weights", "cut weights", "bad config"])
def test_damaged_model(damage, settings, place, tiny_pipeline, tmp_path, capsys):
    model = shutil.copytree(tiny_pipeline, tmp_path / "damaged")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "missing weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (model / "unet" / "config.json").write_text("{")
    assert main_edit([*settings, f"model.path={model}", "image=pic.png", POINTS]) == 2
    the_line(capsys, str(model))
    assert not Path("outputs").exists()


def test_model_of_the_hub_without_network(settings, place, no_model, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main_edit([*settings, "model.path=some-one/no-such-model", "image=pic.png", POINTS]) == 2
    the_line(capsys, "'some-one/no-such-model'", "no such file or folder", "`hf download some-one/no-such-model`")
    assert not Path("outputs").exists()


# ------------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def press_ctrl_c(monkeypatch):
    """Sends this process a real SIGINT when a stage reports a step."""

    def at(stage, step, time_round=1):
        report, seen = progress.Bars.__call__, []

        def interrupting(self, name, done, total, note):
            report(self, name, done, total, note)
            seen.append((name, done))
            if (name, done) == (stage, step) and seen.count((stage, step)) == time_round:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)  # the signal arrives here

        monkeypatch.setattr(progress.Bars, "__call__", interrupting)

    return at


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [
        ("LoRA", 1, "config.yaml"),
        ("inversion", 1, "config.yaml"),
        ("drag", 1, "config.yaml, frames"),
        ("denoise", 1, "config.yaml, frames"),
    ],
)
def test_interrupt(stage, step, kept, settings, place, press_ctrl_c, capsys):
    press_ctrl_c(stage, step)
    handler = signal.getsignal(signal.SIGINT)
    lora = 2 if stage == "LoRA" else 0
    assert main_edit([*settings, "image=pic.png", POINTS, f"lora.steps={lora}"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    *stages, line = captured.err.splitlines()
    assert line == f"dragdiff: interrupted in {stage}, step {step} of 2; outputs/pic/ keeps {kept}"
    assert [entry.split(":")[0].strip() for entry in stages] == STAGES[lora == 0 : STAGES.index(stage) + 1]
    assert all(path.suffix in (".yaml", ".png", "") for path in Path("outputs").rglob("*"))
    for picture in Path("outputs").rglob("*.png"):
        Image.open(picture).load()
    assert signal.getsignal(signal.SIGINT) is handler


def test_interrupt_while_results_are_written(settings, place, monkeypatch, capsys):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("dragdiff.output._save_gif", stop)
    assert main_edit([*settings, "lora.steps=0", "image=pic.png", POINTS]) == 130
    assert "outputs/pic/ keeps comparison.png, config.yaml, edited.png, frames" in capsys.readouterr().err


def test_interrupted_folder_of_samples(settings, album, press_ctrl_c, capsys):
    press_ctrl_c("drag", 1, time_round=2)
    assert main_edit([*settings, f"sample={album / 'cats'}", "lora.steps=0"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "dragdiff: interrupted in drag, step 1 of 2; outputs/two/ keeps config.yaml, frames; "
        "1 of 3 samples are finished"
    )
    assert Path("outputs/one/edited.png").is_file()


def test_interrupt_keeps_the_loras_so_far(settings, place, press_ctrl_c, capsys):
    press_ctrl_c("LoRA", 3)
    assert main_train([*settings, "image=pic.png", "lora.steps=4", "lora.save_every=2"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    kept = "config.yaml, last.ckpt, step-0000, step-0002"
    assert line == f"dragdiff: interrupted in LoRA, step 3 of 4; outputs/pic-lora/ keeps {kept}"


def test_interrupt_of_a_process(settings, place):
    """The whole command, in a process of its own."""
    endless = ["drag.steps=100000", "drag.tracking_radius=0"]  # a handle that stays where it is never arrives
    run = [*settings, "lora.steps=0", "image=pic.png", POINTS, "output.frames_every=0", *endless]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "edit.py"), *run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert b"inversion: 2/2" in process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert out == b""
    drag, line = err.decode().splitlines()
    assert re.match(r" +drag: \d+/100000 steps", drag)
    assert re.fullmatch(r"dragdiff: interrupted in drag, step \d+ of 100000; outputs/pic/ keeps config\.yaml", line)


# ------------------------------------------------------------------------------------------- the console


def test_bars_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = progress.Bars()
    bars("drag", 0, 3, "")
    for step in (1, 2):
        bars("drag", step, 3, f"{9 - step}.0 px left")
    bars("denoise", 0, 1, "")
    bars("denoise", 1, 1, "")
    assert str(bars) == "in denoise, step 1 of 1"
    bars.close()
    shown = capsys.readouterr().err
    drag, denoise = (re.split(r"\r", line)[-1] for line in shown.strip("\n").split("\n"))
    assert re.match(r" +drag:  67%\|.*\| 2/3 \[.*7\.0 px left\]", drag)
    assert re.match(r" +denoise: 100%\|.*\| 1/1 \[", denoise)


def test_long_stages_say_something_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bars = progress.Bars()
    for step in range(101):
        now[0] = step
        bars("drag", step, 100, "5.0 px left")
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"drag: {step}/100 steps, 5.0 px left ({step}.0 s)" for step in (31, 62, 93, 100)]


def test_a_full_disk_is_one_line(settings, place, monkeypatch, capsys):
    from dragdiff import output

    def full(*_):
        raise OSError(28, "No space left on device", "outputs/pic/edited.png")

    monkeypatch.setattr(output, "save", full)
    assert main_edit([*settings, "image=pic.png", POINTS]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line and "edited.png" in line and "Traceback" not in line


def test_bad_input_for_the_embedded_model_is_one_line_too(place, capsys):
    assert main_edit(["image=missing.png", "prompt=sun", POINTS]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"dragdiff: {Path('missing.png').absolute()} does not exist: check its path"
    ]
