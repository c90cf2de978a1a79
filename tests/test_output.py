"""What an edit leaves behind: folders, pictures, animation, numbers."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragdiff import output
from dragdiff.config import Config, OutputConfig, load_config
from dragdiff.data.readers import read_sample
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.job import EditResult

SAMPLES = Path(__file__).parent / "data" / "samples"
STEPS = 30


def sky(height=64, width=64, points=(((20, 20), (44, 20)),), mask=True):
    """A light grey picture; only its upper half may change."""
    editable = np.zeros((height, width), bool)
    editable[: height // 2] = True
    picture = np.full((height, width, 3), 200, np.uint8)
    return EditSample(picture, "sky", np.array(points), editable if mask else None, "sky")


def result_of(sample, frames=3):
    """A made-up result: the handles go straight, the edited picture is darker."""
    way = np.linspace(0, 1, STEPS)[:, None, None]
    trajectory = (sample.handles * (1 - way) + sample.targets * way).astype(np.float32)
    previews = [
        (step, np.full((sample.height // 2, sample.width // 2, 3), 180 - step, np.uint8), trajectory[step])
        for step in range(0, frames * 10, 10)
    ]
    return EditResult(
        sample, sample.image // 2, trajectory, STEPS, "steps", previews, {"drag": 1.23456}, 99.99, Config()
    )


def near(picture, x, y, colour, tolerance=30):
    """Whether a colour stands at (x, y) px."""
    return np.abs(np.asarray(picture)[round(y), round(x)].astype(int) - colour).max() <= tolerance


# ------------------------------------------------------------------------------------------- pictures


def test_comparison_shows_source_and_edit_side_by_side():
    result = result_of(sky())
    sheet = output.comparison(result)
    zoom = 6  # to 384 px
    assert sheet.height == 64 * zoom
    gap = sheet.width - 2 * 64 * zoom
    assert 0 < gap < 20
    left, right = np.asarray(sheet)[:, : 64 * zoom], np.asarray(sheet)[:, 64 * zoom + gap :]
    assert (right == 100).all()
    assert near(left, 5 * zoom, 5 * zoom, (200, 200, 200), 1), "inside the mask nothing is dimmed"
    assert near(left, 5 * zoom, 50 * zoom, (119, 119, 119), 2), "outside it is"
    assert near(left, 20 * zoom, 20 * zoom, output.HANDLE)
    assert near(left, 44 * zoom, 20 * zoom, output.TARGET)
    assert near(left, 30 * zoom, 20 * zoom, (255, 255, 255)), "the arrow's shaft"
    column = left[:, 30 * zoom].astype(int).min(axis=1)
    assert column.min() < 80, "with a dark outline, so that it shows on white"


def test_without_a_mask_nothing_is_dimmed():
    left = output.annotated(sky(mask=False))
    assert near(left, 5, 60, (200, 200, 200), 0)


def test_large_pictures_are_compared_as_they_are():
    result = result_of(sky(height=500, width=400))
    sheet = output.comparison(result)
    assert sheet.height == 500
    assert (np.asarray(sheet)[:, -400:] == 100).all()


def test_anchor_shows_both_colours():
    picture = output.annotated(sky(points=[((30, 30), (30, 30))]), scale=8)
    assert near(picture, 240, 240, output.HANDLE)
    blue = np.abs(np.asarray(picture).astype(int) - output.TARGET).max(axis=2) < 40
    assert blue[232:249, 232:249].any()


@pytest.mark.parametrize("points", [[((0, 0), (63, 63))], [((63, 0), (0, 63)), ((1, 1), (1.5, 1))]])
def test_points_at_the_border_are_drawn(points):
    assert output.annotated(sky(points=points), scale=6).size == (384, 384)


def test_drawing_changes_neither_sample_nor_result():
    result = result_of(sky())
    before = result.sample.image.copy(), result.trajectory.copy(), [frame[2].copy() for frame in result.frames]
    output.comparison(result), output.animation(result)
    after = result.sample.image, result.trajectory, [frame[2] for frame in result.frames]
    for old, new in zip(before[:2], after[:2], strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(before[2], after[2])


# ------------------------------------------------------------------------------------------- animation


def test_animation_shows_the_way_so_far():
    result = result_of(sky())
    first, *previews, arrived, last = output.animation(result)
    assert len(previews) == 3
    assert {picture.size for picture in (first, *previews, arrived, last)} == {(384, 384)}
    assert (np.asarray(last) == 100).all()
    assert near(arrived, *result.trajectory[-1, 0] * 6, output.HANDLE)
    assert near(arrived, 24 * 6, 20 * 6, output.HANDLE), "the whole way, on the edited picture"
    middle = previews[1]  # after 10 of 29 steps the handle is at 28.3
    assert near(middle, 24 * 6, 20 * 6, output.HANDLE), "the way that it has gone"
    assert near(middle, 28.3 * 6, 20 * 6, output.HANDLE)
    assert near(middle, 44 * 6, 20 * 6, output.TARGET)
    assert near(middle, 36 * 6, 20 * 6, (255, 255, 255)), "the way that is left"


@pytest.mark.parametrize("frames", [0, 3])
def test_gif_plays(frames, tmp_path):
    output.save(result_of(sky(), frames), tmp_path)
    with Image.open(tmp_path / "trajectory.gif") as gif:
        assert gif.format == "GIF" and gif.size == (384, 384)
        assert gif.n_frames == frames + 3
        assert gif.info["loop"] == 0
        durations = []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
        assert durations == [1000, *[400] * (frames + 1), 2000]
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - 100).max() <= 3


def test_colours_stand_still_in_the_gif(tmp_path):
    """One palette for all frames: what does not change does not flicker."""
    sample = read_sample(SAMPLES / "dragbench" / "animals" / "JH_2023-09-14-1839-58")
    still = replace(result_of(sample), frames=[(0, sample.image, sample.handles), (10, sample.image, sample.handles)])
    still = replace(still, image=sample.image, trajectory=np.repeat(sample.handles[None], STEPS, 0))
    output.save(still, tmp_path)
    with Image.open(tmp_path / "trajectory.gif") as gif:
        assert gif.n_frames == 3, "two equal frames are one"
        pictures = []
        for index in range(3):
            gif.seek(index)
            pictures.append(np.asarray(gif.convert("RGB")).astype(int))
    assert (pictures[1] != pictures[2]).any(axis=2).mean() < 0.15, "only the arrows and their surroundings differ"
    assert np.abs(pictures[2] - sample.image).mean() < 5


def test_large_animation_is_made_smaller():
    picture = output.animation(result_of(sky(height=300, width=1280)))[0]
    assert picture.size == (640, 150)


# ------------------------------------------------------------------------------------------- numbers


def test_metrics():
    sample = sky(points=[((20, 20), (44, 20)), ((10, 10), (10, 10))])
    result = replace(result_of(sample), trajectory=np.stack([sample.handles, sample.handles + np.float32([3, 4])]))
    numbers = output.metrics(result)
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["points"][0] == {
        "handle": [20, 20],
        "target": [44, 20],
        "tracked": [23, 24],
        "distance_before_px": 24.0,
        "distance_after_px": round(float(np.hypot(21, 4)), 3),
    }
    assert [point["distance_before_px"] for point in numbers["points"]] == [24.0, 0.0]
    assert (numbers["steps"], numbers["stop_reason"]) == (STEPS, "steps")
    assert (numbers["seconds"], numbers["peak_memory_mb"]) == ({"drag": 1.235}, 100.0)


def test_save_writes_all(tmp_path):
    result = result_of(sky())
    files = output.save(result, tmp_path)
    assert [file.stem for file in files] == ["edited", "comparison", "trajectory", "mask", "metrics", "config"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "edited.png")), result.image)
    assert json.loads((tmp_path / "metrics.json").read_text()) == output.metrics(result)


def test_a_large_comparison_is_made_smaller():
    sample = EditSample(np.zeros((900, 3000, 3), np.uint8), "", [[[10, 10], [2000, 500]]])
    sheet = output.comparison(result_of(sample))
    assert (sheet.width - max(4, 1200 // 60), sheet.height) == (2400, 360)


def test_results_and_samples_are_said_in_a_line_and_shown_in_notebooks(tmp_path):
    result = result_of(sky())
    for shown in (repr(result), repr(result.sample)):
        assert len(shown) < 200 and "array" not in shown and "px" in shown
    picture = Image.open(io.BytesIO(result._repr_png_()))
    assert np.array_equal(picture, output.comparison(result))
    assert result.save(tmp_path / "new" / "folder") == output.save(result, tmp_path / "new" / "folder")


# ------------------------------------------------------------------------------------------- files and folders


def config_for(folder, name="cat"):
    return Config(output=OutputConfig(folder=str(folder), name=name))


def test_new_folder_never_takes_one_that_is_there(tmp_path):
    config = config_for(tmp_path / "a" / "b")
    folders = [output.new_folder(config) for _ in range(3)]
    assert [folder.name for folder in folders] == ["cat", "cat-2", "cat-3"]
    (tmp_path / "a" / "b" / "cat-4").write_text("a file")
    assert output.new_folder(config).name == "cat-5"
    assert load_config([folders[1] / "config.yaml"]) == config


def test_new_folder_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output.new_folder(config_for("~/out")) == tmp_path / "out" / "cat"


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_unwritable_folder(below, tmp_path):
    (tmp_path / "file").write_text("")
    config = config_for(tmp_path / "file" / below)
    for attempt in (output.check_writable, output.new_folder):
        with pytest.raises(UserError, match=r"cannot write to output\.folder '.*file") as caught:
            attempt(config)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        output.check_writable(config_for(tmp_path / "x"))


def test_check_writable_leaves_nothing(tmp_path):
    output.check_writable(config_for(tmp_path / "new" / "folder"))
    output.check_writable(config_for(tmp_path, name="new/name"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.txt"
    with output.written(path) as file:
        file.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), output.written(path) as file:
        file.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]
