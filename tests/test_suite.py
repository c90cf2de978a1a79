"""The metrics of a study by name: what each column is, against the functions themselves and against formulas."""

from __future__ import annotations

import numpy as np
import pytest

from dragdiff.backbones.loading import load_backbone
from dragdiff.config import load_study
from dragdiff.data.sample import EditSample
from dragdiff.data.scenes import make_scene
from dragdiff.metrics import baselines, correspondence, fidelity
from dragdiff.metrics.suite import COLUMNS, FACTORIES, Suite, metric_key
from dragdiff.study.plan import Subject, baseline_picture


@pytest.fixture
def settings(tmp_path, tiny_pipeline):
    """Metrics' settings with a study's overrides, on a small random model."""

    def make(*overrides: str):
        (tmp_path / "study.yaml").write_text("question: none\n")
        model = [f"path={tiny_pipeline}", "revision=''", "device=cpu"]
        fixed = [*(f"metrics.distance.{entry}" for entry in model), "metrics.ensemble=2"]
        return load_study(tmp_path / "study.yaml", [*fixed, *overrides]).metrics

    return make


@pytest.fixture(scope="module")
def scene() -> Subject:
    made = make_scene("sun", 3)
    return Subject(made.sample, made.kind, "", made)


def test_scene(scene, settings):
    suite = Suite(settings(), ["scene"])
    truth = suite.score("scene", scene, baseline_picture("oracle", scene))
    assert truth["true_distance"][0] < 0.2 and truth["psnr_inside"] == [np.inf]
    assert truth["ssim_inside"][0] == pytest.approx(1)
    still = suite.score("scene", scene, baseline_picture("identity", scene))
    assert still["true_distance"][0] == pytest.approx(np.linalg.norm(scene.scene.displacement), abs=0.4)
    assert still["ssim_inside"][0] < 0.5
    assert suite.score("scene", Subject(scene.sample, "", ""), scene.sample.image) == {}  # no truth, no values


def test_outside(scene, settings):
    suite = Suite(settings(), ["outside"])
    edited = baselines.identity(scene.sample)
    assert suite.score("outside", scene, edited)["psnr_outside"] == [np.inf]
    fixed = ~np.array(scene.sample.mask)
    edited[~fixed] = 0  # what happens inside does not count
    assert suite.score("outside", scene, edited)["psnr_outside"] == [np.inf]
    row, column = np.argwhere(fixed)[0]
    edited[row, column, 0] ^= 16
    error = 16**2 / (3 * fixed.sum())
    assert suite.score("outside", scene, edited)["psnr_outside"] == [pytest.approx(10 * np.log10(255**2 / error))]
    without = Subject(EditSample(scene.sample.image, "", scene.sample.points), "", "")
    assert suite.score("outside", without, edited) == {}


def test_accuracy_by_a_naive_loop(scene, settings):
    edited = np.random.default_rng(0).integers(0, 256, scene.sample.image.shape, dtype=np.uint8)
    values = Suite(settings(), ["accuracy"]).score("accuracy", scene, edited)
    (hx, hy), (tx, ty) = scene.sample.points[0].astype(int).tolist()
    total = count = 0
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            inside = all(0 <= v < 64 for v in (hx + dx, hy + dy, tx + dx, ty + dy))
            if inside:
                a, b = scene.sample.image[hy + dy, hx + dx], edited[ty + dy, tx + dx]
                total, count = total + ((a.astype(float) - b) ** 2).sum() / 255**2, count + 1
    assert values["dai_5"] == [pytest.approx(total / count)]
    assert set(values) == {"dai_1", "dai_5", "dai_10", "dai_20"}


def test_distance_in_each_area(scene, settings):
    chosen = settings("metrics.areas=[image,mask,discs]")
    edited = np.random.default_rng(0).integers(0, 256, scene.sample.image.shape, dtype=np.uint8)
    values = Suite(chosen, ["distance"]).score("distance", scene, edited)
    backbone = load_backbone(chosen.distance)
    for area, column in (("image", "distance"), ("mask", "distance_mask"), ("discs", "distance_discs")):
        metric = correspondence.MeanDistance(
            backbone, t=261, block="up_blocks.1", ensemble=2, variant=area, seed=42, ordered=False
        )
        np.testing.assert_allclose(values[column], metric.distances(scene.sample, edited))


def test_pictures_scores_come_from_fidelity(scene, settings, monkeypatch):
    monkeypatch.setattr(fidelity, "image_fidelity", lambda: lambda source, edited: float(edited.mean() - source.mean()))
    monkeypatch.setattr(
        fidelity, "clip_similarity", lambda model, revision: lambda source, edited: len(model + revision)
    )
    suite = Suite(settings("metrics.clip_model=abc", "metrics.clip_revision=de"), ["fidelity", "clip"])
    edited = np.full_like(scene.sample.image, 200)
    assert suite.score("fidelity", scene, edited) == {"fidelity": [200 - scene.sample.image.mean()]}
    assert suite.score("clip", scene, edited) == {"clip": [5]}


def test_what_cannot_be_had_is_named_and_scores_nothing(scene, settings, tmp_path):
    suite = Suite(settings(f"metrics.distance.path={tmp_path / 'no'}"), ["distance", "accuracy"])
    assert list(suite.unavailable) == ["distance"]
    assert "no such file or folder" in suite.unavailable["distance"]
    assert suite.score("distance", scene, scene.sample.image) is None
    assert suite.score("accuracy", scene, scene.sample.image)["dai_1"] > [0]
    assert "block" in Suite(settings("metrics.block=up_blocks.7"), ["distance"]).unavailable["distance"]


def test_every_value_has_a_column(scene, settings):
    names = [name for name in FACTORIES if name not in ("fidelity", "clip")]
    suite = Suite(settings("metrics.areas=[image,mask,discs]"), names)
    assert not suite.unavailable
    columns = {column for name in names for column in suite.score(name, scene, baselines.copy_patch(scene.sample))}
    assert columns == set(COLUMNS) - {"fidelity", "clip", "forwards", "seconds"}


@pytest.mark.parametrize(
    ("name", "override", "changes"),
    [
        ("distance", "metrics.t=101", True),
        ("distance", "metrics.block=up_blocks.2", True),
        ("distance", "metrics.ensemble=3", True),
        ("distance", "metrics.seed=1", True),
        ("distance", "metrics.ordered=true", True),
        ("distance", "metrics.areas=[mask]", True),
        ("distance", "metrics.distance.revision=x", True),
        ("distance", "metrics.distance.device=auto", False),
        ("distance", "metrics.clip_model=x", False),
        ("clip", "metrics.clip_model=x", True),
        ("clip", "metrics.t=101", False),
        ("accuracy", "metrics.t=101", False),
    ],
)
def test_scores_key_changes_with_what_they_depend_on(name, override, changes, settings):
    assert (metric_key(name, settings()) != metric_key(name, settings(override))) == changes
