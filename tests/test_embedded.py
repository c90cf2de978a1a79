"""The embedded model and its examples, through the user's command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from dragdiff.assets import EXAMPLES
from dragdiff.backbones.loading import EMBEDDED_MODEL
from dragdiff.cli import main_edit
from dragdiff.data.readers import read_sample
from dragdiff.data.scenes import KINDS, make_scene
from dragdiff.metrics.truth import score

ROOT = Path(__file__).parents[1]


def scene_of(example: Path):
    """The procedural scene that an example was made from: its name ends with the seed."""
    kind, seed = json.loads((example / "scene.json").read_text()).values()
    return make_scene(kind, seed)


def test_the_weights_are_small_half_precision_safetensors() -> None:
    files = [file for file in EMBEDDED_MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 3
    for file in weights:
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_slice(key).get_dtype() for key in opened.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.parametrize("example", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_examples_are_scenes_of_the_kinds_that_ship(example: Path) -> None:
    sample, scene = read_sample(example), scene_of(example)
    assert scene.kind in KINDS
    assert np.array_equal(sample.image, scene.sample.image)
    assert np.array_equal(sample.points, scene.sample.points)
    assert np.array_equal(np.array(sample.mask), np.array(scene.sample.mask))


def test_the_first_command_drags_the_example_and_its_config_repeats_it_bit_for_bit(tmp_path: Path) -> None:
    """`python edit.py` with no arguments, from another folder; then the resolved config alone, from a third."""
    run = [sys.executable, str(ROOT / "edit.py")]
    first = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert {"edited.png", "comparison.png", "trajectory.gif", "metrics.json", "config.yaml"} <= {
        path.name for path in folder.iterdir()
    }
    assert str(folder.name) in first.stdout and "after" in first.stdout
    assert "Traceback" not in first.stderr

    example = EXAMPLES / folder.name
    edited = np.array(Image.open(folder / "edited.png"))
    result = score(scene_of(example), edited)
    assert result.distance_after < 0.5 * result.distance_before
    assert result.psnr_outside >= 27
    assert result.psnr_inside > result.psnr_inside_source

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = subprocess.run(
        [*run, str(folder / "config.yaml")], cwd=elsewhere, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    (repeated,) = (elsewhere / "outputs").iterdir()
    assert (repeated / "edited.png").read_bytes() == (folder / "edited.png").read_bytes()
    assert (repeated / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()


def test_any_scene_can_be_named(tmp_path: Path) -> None:
    settings = [f"output.folder={tmp_path}", "ddim.steps=2", "drag.steps=1", "output.frames_every=0"]
    assert main_edit(["sample=scene:tower-2003", *settings]) == 0
    (point,) = json.loads((tmp_path / "tower-2003" / "metrics.json").read_text())["points"]
    assert [point["handle"], point["target"]] == make_scene("tower", 2003).sample.points[0].tolist()


@pytest.mark.parametrize("example", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_each_example_moves_its_part_and_keeps_the_rest(example: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    assert main_edit([f"sample=example:{example.name}", f"output.folder={folder}", "output.frames_every=0"]) == 0
    scene = scene_of(example)
    result = score(scene, np.array(Image.open(folder / example.name / "edited.png")))
    assert result.distance_after < 0.5 * result.distance_before
    assert result.psnr_inside > result.psnr_inside_source
    assert result.psnr_outside >= 27
