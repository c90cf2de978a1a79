"""Reports of studies: numbers, tables, plots and the gallery, from results that are made up here."""

import base64
import dataclasses
import html
import io
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.text import Text
from PIL import Image

from dragdiff.cli import main
from dragdiff.config import load_study
from dragdiff.data.readers import write_folder
from dragdiff.data.sample import EditSample
from dragdiff.metrics.statistics import mean_over_images, mean_over_pairs, paired_difference
from dragdiff.metrics.suite import metric_key
from dragdiff.study import plots, sheets
from dragdiff.study.plan import expand
from dragdiff.study.report import text
from dragdiff.study.store import Store
from dragdiff.study.table import measured, number, summary

SETTINGS = {
    "question": "Which step is best?",
    "data": {"scenes": 2},
    "metrics": {"names": ["outside", "distance"]},
    "grid": {"drag.lr": [0.01, 0.02, 0.2]},
    "reference": "drag.lr=0.02",
}
FILES = {"report.md", "study.yaml", "summary.csv", "scores.csv", "scores.parquet", "gallery.html"}
FILES |= {"distances.png", "pictures.png", "distance_by_step.png", "fidelity_by_distance.png"}


def study_file(folder, **settings):
    """A study's file; its results go beside it."""
    path = folder / "lr.yaml"
    settings = {"results": str(folder / "results")} | SETTINGS | settings
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def distances(variant: int, subject: int) -> list[float]:
    """Made-up scores: two pairs in the first sample, so that means over pairs and over images differ."""
    return [1.5 + variant + 0.25 * subject * variant, 5.0] if subject == 0 else [float(2 + variant * subject)]


def picture(variant: int, subject: int) -> np.ndarray:
    return np.full((64, 64, 3), 10 * variant + subject, np.uint8)


def way(sample, steps: int) -> np.ndarray:
    """The handle goes straight and stops short of its target by a tenth."""
    share = np.linspace(0, 0.9, steps)[:, None, None]
    return sample.handles * (1 - share) + sample.targets * share


def fake(plan, *, skip=(), fail=(), backwards=False):
    """Results of a study; (variant, sample) in `skip` have none, those in `fail` failed."""
    store, names = Store(plan.study.results), [variant.name for variant in plan.variants]
    facts = {"settings": dataclasses.asdict(plan.study)}
    store.write_json(f"{plan.study.name}/study.json", facts)
    for (variant, name, _), key in sorted(plan.keys.items(), reverse=backwards):
        place = names.index(variant)
        index, subject = next((i, subject) for i, subject in enumerate(plan.subjects) if subject.name == name)
        if (variant, name) in skip:
            continue
        if (variant, name) in fail:
            store.write_json(f"failures/{key}.json", {"reason": "no <memory> | left", "details": "", "sample": name})
            continue
        psnr = math.inf if variant == "identity" else 30.0 + place + index
        scores = {"outside": {"psnr_outside": [psnr], "ssim_outside": [0.9]}}
        scores["distance"] = {"distance": distances(place, index)}
        scores = {
            metric_key(name, plan.study.metrics): scores[name] for name in plan.study.metrics.names if name in scores
        }
        edit = (
            {}
            if variant in ("identity", "copy-patch", "oracle")
            else {"steps": 3, "seconds": {"drag": 2.5, "decode": 1}}
        )
        if edit:
            edit["trajectory"] = way(subject.sample, 3 + index).tolist()
        buffer = io.BytesIO()
        size = subject.sample.width, subject.sample.height
        Image.fromarray(picture(place, index)).resize(size).save(buffer, "PNG")
        files = {"edited.png": buffer.getvalue(), "edit.json": json.dumps(edit).encode()}
        store.write_result(key, files | {"scores.json": json.dumps(scores).encode()})
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cells(markdown: str, heading: str, variant: str) -> list[str]:
    """A variant's row in the first table after a heading."""
    after = markdown.split(f"{heading}\n", 1)[1]
    row = next(line for line in after.splitlines() if line.startswith(f"| {text(variant)} |"))
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def gallery_data(page: str, name: str):
    return json.loads(re.search(rf"^const {name} = (.*?);(?:  //.*)?$", page, re.M)[1])


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A finished study and its report's folder."""
    folder = tmp_path_factory.mktemp("study")
    path = study_file(folder)
    plan = expand(load_study(path))
    fake(plan)
    assert main(["report", str(path)]) == 0
    return plan, folder / "results" / "lr" / "report"


# ------------------------------------------------------------------------------------------- numbers


def test_cost_and_the_papers_own_figures(tmp_path):
    """Forwards count the drag's steps that were taken, a training step as 2.3 forwards of its batch."""
    variants = [{"name": "ours", "lora.steps": 10}, {"name": "warp", "method": "fastdrag"}]
    published = {"ours": {"distance": "31.6-34.8"}, "identity": {"distance": 52.3}}
    path = study_file(
        tmp_path,
        grid=None,
        variants=variants,
        reference="ours",
        published=published,
        metrics={"names": ["outside", "distance", "cost"]},
    )
    fake(expand(load_study(path)))
    assert main(["report", str(path), "--brief"]) == 0
    files = contents(tmp_path / "results" / "lr" / "report")
    report = files["report.md"].decode()
    # LoRA 10 steps of 4 rows, inversion 35, drag 3 steps, denoising of two rows, decoding
    ours, warp = 2.3 * 40 + 35 + 2.3 * 3 + 70 + 3, 7 + 14 + 3
    assert cells(report, "### Cost", "ours")[2:] == [f"{round(ours)} [{round(ours)}, {round(ours)}]", "3.5 [3.5, 3.5]"]
    assert cells(report, "### Cost", "warp")[2].startswith(f"{warp} ")
    assert cells(report, "### Cost", "identity")[2:] == ["–", "–"]
    assert [cells(report, "### Distances", name)[3] for name in ("ours", "warp", "identity")] == [
        "31.6-34.8",
        "–",
        "52.3",
    ]
    assert "distance_by_forwards.png" in files and "(distance_by_forwards.png)" in report


@pytest.mark.parametrize(
    "published, said",
    [
        ({"nobody": {"distance": 3}}, "published names 'nobody'"),
        ({"identity": {"distanse": 3}}, "published.identity is"),
    ],
)
def test_figures_of_nothing(published, said, tmp_path, capsys):
    assert main(["study", str(study_file(tmp_path, published=published)), "--plan"]) == 2
    assert said in capsys.readouterr().err


def test_all_files_are_there(reported):
    assert set(contents(reported[1])) == FILES


@pytest.mark.parametrize("brief", [[], ["--brief"]])
def test_the_brief_report_is_what_a_repository_wants_and_no_link_is_dead(brief, tmp_path):
    path = study_file(tmp_path)
    fake(expand(load_study(path)))
    assert main(["report", str(path), *brief]) == 0
    files = contents(tmp_path / "results" / "lr" / "report")
    assert set(files) == FILES - ({"scores.csv", "scores.parquet", "gallery.html"} if brief else set())
    assert set(re.findall(r"\]\(([^)]*)\)", files["report.md"].decode())) == set(files) - {"report.md"}


def test_means_and_differences(reported):
    plan, folder = reported
    table = pd.read_csv(folder / "summary.csv").set_index(["category", "column", "variant"])
    for place, variant in enumerate(plan.variants):
        ours, theirs = ([np.array(distances(p, i)) for i in range(4)] for p in (place, 1))
        row = table.loc["all", "distance", variant.name]
        mean = mean_over_pairs(ours)
        assert row["value"] == pytest.approx(statistics.mean(np.concatenate(ours).tolist()), rel=1e-5)
        assert (row["low"], row["high"]) == pytest.approx((mean.low, mean.high), rel=1e-5)
        assert (row["images"], row["pairs"]) == (4, 5)
        apart = [statistics.mean(a.tolist()) - statistics.mean(b.tolist()) for a, b in zip(ours, theirs, strict=True)]
        if variant.name == plan.reference:
            assert row[["difference", "difference_low", "difference_high"]].isna().all()
        else:
            assert row["difference"] == pytest.approx(statistics.mean(apart), rel=1e-5)
            expected = paired_difference(ours, theirs)
            assert (row["difference_low"], row["difference_high"]) == pytest.approx(
                (expected.low, expected.high), rel=1e-5
            )
    psnr = table.loc["all", "psnr_outside", "drag.lr=0.2"]
    assert psnr["value"] == statistics.mean(32 + index for index in range(4))
    assert psnr["low"] == pytest.approx(mean_over_images([np.array([32.0 + i]) for i in range(4)]).low, rel=1e-5)


def test_categories(reported):
    plan, folder = reported
    table = pd.read_csv(folder / "summary.csv").set_index(["category", "column", "variant"])
    subjects = [index for index, subject in enumerate(plan.subjects) if subject.category == "tower"]
    values = [value for index in subjects for value in distances(2, index)]
    row = table.loc["tower", "distance", "drag.lr=0.2"]
    assert row["value"] == pytest.approx(statistics.mean(values), rel=1e-5)
    assert row["images"] == len(subjects) == 2
    shown = cells((folder / "report.md").read_text(), "### mean distance ↓, px", "drag.lr=0.2")
    assert shown[2].startswith(f"{row['value']:.2f} [")


def test_markdown_shows_the_numbers(reported):
    plan, folder = reported
    markdown = (folder / "report.md").read_text()
    assert "**Question:** Which step is best?" in markdown
    assert "4 samples of procedural scenes (2 sun, 2 tower), seed 42. Of 24 edits 24 are measured, 0 failed" in markdown
    mean = mean_over_pairs([np.array(distances(2, i)) for i in range(4)])
    shown = f"{mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}]"
    assert cells(markdown, "### Distances", "drag.lr=0.2") == ["drag.lr=0.2", "4", shown]
    assert cells(markdown, "### Likeness to source and truth", "identity")[2] == "∞"
    differences = markdown.split("## Differences")[1]
    assert cells(differences, "### Likeness to source and truth", "identity")[1] == "+∞"
    assert cells(differences, "### Likeness to source and truth", "drag.lr=0.2")[1] == "**+1.00 [+1.00, +1.00]**"
    assert f"| {plan.reference} |" not in differences.split("## By category")[0], "not compared with itself"
    for baseline in ("identity", "copy-patch", "oracle"):
        assert cells(markdown, "### Distances", baseline)[1] == "4"
    for link in re.findall(r"\]\((.*?)\)", markdown):
        assert (folder / link).is_file()


def test_long_table(reported):
    _, folder = reported
    table = pd.read_csv(folder / "scores.csv")
    pd.testing.assert_frame_equal(table, pd.read_parquet(folder / "scores.parquet"), check_dtype=False)
    assert list(table.columns) == ["variant", "category", "sample", "seed", "pair", "column", "value"]
    assert len(table) == 6 * (4 * 2 + 5)
    rows = table[(table["variant"] == "copy-patch") & (table["column"] == "distance")]
    assert rows["value"].tolist() == [value for index in range(4) for value in distances(4, index)]
    assert rows["pair"].tolist() == [0, 1, 0, 0, 0]
    assert np.isinf(table["value"][(table["variant"] == "identity") & (table["column"] == "psnr_outside")]).all()


@pytest.mark.parametrize(
    "value, sign, shown",
    [
        (1.236, "-", "1.24"),
        (-0.001, "-", "0.00"),
        (2, "+", "+2.00"),
        (-0.001, "+", "+0.00"),
        (math.inf, "-", "∞"),
        (math.inf, "+", "+∞"),
        (-math.inf, "+", "-∞"),
        (math.nan, "+", "–"),
    ],
)
def test_numbers_as_written(value, sign, shown):
    assert number("distance", value, sign) == shown


# ------------------------------------------------------------------------------------------- order and place


def test_neither_order_nor_workers_nor_place_show(reported, tmp_path):
    """A folder of another name, results written the other way round: the same bytes."""
    path = study_file(tmp_path, workers=2, attempts=5)
    plan = expand(load_study(path))
    fake(plan, backwards=True)
    assert main(["report", str(path)]) == 0
    ours, theirs = contents(tmp_path / "results" / "lr" / "report"), contents(reported[1])
    assert ours.keys() == theirs.keys()
    for name, content in ours.items():
        assert content == theirs[name], name
        assert str(tmp_path).encode() not in content


def test_by_the_folder_in_the_results(reported, tmp_path, monkeypatch, capsys):
    _, folder = reported
    before = contents(folder)
    moved = tmp_path / "moved"
    folder.parents[1].rename(moved)
    try:
        monkeypatch.chdir(moved)
        assert main(["report", "lr/"]) == 0
        assert contents(moved / "lr" / "report") == before
        assert main(["report", str(moved / "lr"), "seeds=[1]"]) == 2
        assert "leave out 'seeds=[1]'" in capsys.readouterr().err
    finally:
        moved.rename(folder.parents[1])


@pytest.mark.parametrize("content", [None, "[]", '{"question": "?"}', '{"settings": {"gone": 1}}'])
def test_a_folder_that_is_no_study(content, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    if content:
        (tmp_path / "x" / "study.json").write_text(content)
    assert main(["report", str(tmp_path / "x")]) == 2
    assert "give " in capsys.readouterr().err


def test_study_yaml_asks_for_the_same_edits(reported):
    plan, folder = reported
    again = expand(load_study(folder / "study.yaml"))
    assert again.keys == plan.keys
    assert again.study.metrics == plan.study.metrics and again.study.name == "lr"
    assert again.study.results == "outputs/studies"


# ------------------------------------------------------------------------------------------- what is not there


def test_partly_done(tmp_path):
    path = study_file(tmp_path)
    plan = expand(load_study(path))
    first, second, *_ = (subject.name for subject in plan.subjects)
    store = fake(plan, skip=[("drag.lr=0.01", first)], fail=[("drag.lr=0.02", first), ("drag.lr=0.02", second)])
    store.write_json("lr/unavailable.json", {"distance": "no model: pip | it", "clip": "not asked for"})
    assert main(["report", str(path)]) == 0
    folder = tmp_path / "results" / "lr" / "report"
    markdown = (folder / "report.md").read_text()
    assert "Of 24 edits 21 are measured, 2 failed, 1 are missing. **The study is not finished.**" in markdown
    assert cells(markdown, "## What was run", "drag.lr=0.01")[1:] == ["3", "0", "1"]
    assert cells(markdown, "## What was run", "drag.lr=0.02")[1:] == ["2", "2", "0"]
    failure = rf"| no \<memory\> \| left | drag.lr=0.02 | 2 | {first}, {second} |"
    assert failure in markdown
    assert "| distance | no model: pip \\| it |" in markdown and "not asked for" not in markdown
    assert cells(markdown, "### Distances", "drag.lr=0.02")[1] == "2"
    # the difference is over the two images that both have
    table = pd.read_csv(folder / "summary.csv").set_index(["category", "column", "variant"])
    apart = [statistics.mean(distances(0, i)) - statistics.mean(distances(1, i)) for i in (2, 3)]
    row = table.loc["all", "distance", "drag.lr=0.01"]
    assert row["difference"] == pytest.approx(statistics.mean(apart))
    page = (folder / "gallery.html").read_text()
    assert page.count("failed: no &lt;memory&gt; | left") == 2
    assert page.count(">not run yet<") == 1


def test_nothing_measured(tmp_path, capsys):
    path = study_file(tmp_path)
    assert main(["report", str(path)]) == 2
    assert "nothing of the study 'lr' is measured yet: run `dragdiff study`" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    plan = expand(load_study(path))
    fake(plan, fail=[(variant, name) for variant, name, _ in plan.keys])
    assert main(["report", str(path)]) == 2
    assert "(24 edits failed, e.g. no <memory> | left)" in capsys.readouterr().err


def test_one_sample_has_no_interval(tmp_path):
    path = study_file(tmp_path, data={"scenes": 1, "limit": 1}, metrics={"names": ["distance"]})
    fake(expand(load_study(path)))
    assert main(["report", str(path)]) == 0
    folder = tmp_path / "results" / "lr" / "report"
    markdown = (folder / "report.md").read_text()
    assert cells(markdown, "### Distances", "drag.lr=0.01") == ["drag.lr=0.01", "1", "3.25"]
    assert "By category" not in markdown
    assert set(contents(folder)) == FILES - {"pictures.png", "fidelity_by_distance.png"}


@pytest.mark.parametrize("package", ["matplotlib", "pandas", "pyarrow"])
def test_missing_package(package, tmp_path, monkeypatch, capsys):
    path = study_file(tmp_path, data={"scenes": 1, "limit": 1})
    fake(expand(load_study(path)))
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", str(path)]) == 2
    assert f"need {package}: pip install 'dragdiff[study]'" in capsys.readouterr().err


def test_odd_names(tmp_path):
    odd = "<script>alert(1)</script> | *$x_1$* `\n& [a](b)"
    variants = [{"name": odd}, {"name": "$", "drag.lr": 0.02}]
    path = study_file(tmp_path, grid=None, variants=variants, reference=odd, question="_why_ <b>?")
    fake(expand(load_study(path)))
    assert main(["report", str(path)]) == 0
    folder = tmp_path / "results" / "lr" / "report"
    markdown, page = ((folder / name).read_text() for name in ("report.md", "gallery.html"))
    assert "<script>alert" not in page and "<b>?" not in page
    assert html.escape(odd).replace("&#x27;", "&#39;") in page
    assert r"**Question:** \_why\_ \<b\>?" in markdown
    shown = r"\<script\>alert(1)\</script\> \| \*\$x_1\$\* \` \& \[a\](b)"
    for line in [line for line in markdown.splitlines() if shown in line]:
        assert "alert" in line and len(line.splitlines()) == 1
    assert f"| {shown} | default | 4 | 0 | 0 |" in markdown
    assert r"| \$ | drag.lr=0.02 | 4 | 0 | 0 |" in markdown
    assert pd.read_csv(folder / "scores.csv")["variant"].iloc[0] == odd


# ------------------------------------------------------------------------------------------- plots


def means_of(path):
    plan = expand(load_study(path))
    data = measured(plan, fake(plan))
    table = summary(data)
    return data, {(row.variant, row.column): row for row in table.itertuples()}


def sheet_of(path, columns=("distance", "psnr_outside")):
    data, means = means_of(path)
    figure = sheets.metric_sheet(data.plan, means, columns)
    figure.draw_without_rendering()
    return data, means, figure


def test_plots_are_pictures(reported):
    for path in reported[1].glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and "Software" not in image.info
            assert np.asarray(image.convert("L")).std() > 5, f"{path.name} is empty"


def test_curve_of_a_number(tmp_path):
    _, means, figure = sheet_of(study_file(tmp_path, grid={"drag.lr": [0.2, 0.01, 0.02]}, reference=None))
    first, second = figure.axes
    line = first.lines[0]
    assert line.get_xdata().tolist() == [0.01, 0.02, 0.2]
    expected = [means[f"drag.lr={value}", "distance"] for value in (0.01, 0.02, 0.2)]
    np.testing.assert_allclose(line.get_ydata(), [row.value for row in expected])
    bars = first.collections[0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [(row.low, row.high) for row in expected])
    levels = {line.get_label(): line.get_ydata()[0] for line in second.lines if len(line.get_xdata()) == 2}
    assert set(levels) == {"copy-patch", "oracle"}, "an infinite baseline has no line"
    assert levels["oracle"] == means["oracle", "psnr_outside"].value
    (legend,) = figure.legends
    assert {"identity", "copy-patch", "oracle", "reference"} < {entry.get_text() for entry in legend.get_texts()}


@pytest.mark.parametrize(
    "values, scale",
    [
        ([0.01, 0.02, 0.05, 0.1, 0.2], "log"),
        ([10, 20, 40, 80, 160], "log"),
        ([0.1, 0.2, 0.4, 0.8], "linear"),
        ([0, 20, 40, 80], "linear"),
        ([1, 4, 7, 10, 13], "linear"),
    ],
)
def test_axis_of_a_number(values, scale, tmp_path):
    key = "drag.steps" if max(values) > 1 else "drag.lr"
    path = study_file(tmp_path, grid={key: values}, reference=None, metrics={"names": ["distance"]})
    _, _, figure = sheet_of(path, ["distance"])
    (panel,) = figure.axes
    assert panel.get_xscale() == scale
    assert [label.get_text() for label in panel.get_xticklabels()] == [str(value) for value in values]


def test_names_stand_below_each_other(tmp_path):
    names = ["off", "from the second of the upsampling blocks on, as published"]
    path = study_file(
        tmp_path, grid=None, variants=[{"name": names[0]}, {"name": names[1], "drag.lr": 0.5}], reference=None
    )
    _, means, figure = sheet_of(path)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [" ".join(label.split("\n")) for label in labels] == names and "\n" in labels[1]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [means[name, "distance"].value for name in names]


def test_heat_map_of_two_parameters(tmp_path):
    grid = {"drag.lr": [0.01, 0.02], "drag.steps": [5, 10, 20]}
    path = study_file(tmp_path, grid=grid, reference="drag.lr=0.02, drag.steps=10")
    _, means, figure = sheet_of(path)
    panel = figure.axes[0]
    values = panel.images[0].get_array()
    shown = [item.get_text() for item in panel.texts]
    for row, lr in enumerate(grid["drag.lr"]):
        for column, steps in enumerate(grid["drag.steps"]):
            value = means[f"drag.lr={lr}, drag.steps={steps}", "distance"].value
            assert values[row, column] == value
            assert shown[3 * row + column] == f"{value:.2f}"
    frame = panel.lines[0].get_xydata()
    np.testing.assert_array_equal(frame.mean(axis=0).round(), [1, 1])
    assert "identity ∞" in figure.axes[1].get_title()


@pytest.mark.parametrize(
    "variants",
    [
        {"grid": {"drag.lr": [0.1, 0.2, 0.3, 0.4], "drag.steps": [1, 2, 3, 4, 5]}},
        {"grid": None, "random": {"drag.lr": {"low": 0.1, "high": 1.0}, "drag.steps": [5, 6]}, "random_count": 20},
    ],
)
def test_labels_do_not_overlap(variants, tmp_path):
    path = study_file(tmp_path, reference=None, **variants)
    data, _ = means_of(path)
    table = summary(data)
    table = table.assign(value=30 + np.arange(len(table)) / 100, low=29, high=31)
    crowd = {(row.variant, row.column): row for row in table.itertuples()}
    figure = plots.scatter(data, crowd, plots.trade_off(data))
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(note) for note in figure.axes[0].texts]
    assert len(boxes) == 20 + 3
    for one, two in itertools.combinations(boxes, 2):
        assert not one.overlaps(two)
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_distance_by_step(tmp_path):
    plan = expand(load_study(study_file(tmp_path, data={"scenes": 1})))
    one, two = plan.subjects
    ways = {("drag.lr=0.01", one.name, 42): way(one.sample, 3), ("drag.lr=0.01", two.name, 42): way(two.sample, 5)}
    lengths = [math.dist(*subject.sample.points[0].tolist()) for subject in (one, two)]
    left = [[1, 0.55, 0.1, 0.1, 0.1], [1, 0.775, 0.55, 0.325, 0.1]]
    expected = [(lengths[0] * a + lengths[1] * b) / 2 for a, b in zip(*left, strict=True)]
    np.testing.assert_allclose(plots.distance_by_step(plan, ways, "drag.lr=0.01"), expected, rtol=1e-5)
    assert len(plots.distance_by_step(plan, ways, "drag.lr=0.2")) == 0


@pytest.mark.parametrize(
    "measures, columns",
    [(["distance", "outside"], ("distance", "psnr_outside")), (["outside"], None), (["distance"], None)],
)
def test_which_columns_are_weighed(measures, columns, tmp_path):
    data, _ = means_of(study_file(tmp_path, metrics={"names": measures}, data={"scenes": 1}))
    assert plots.trade_off(data) == columns


# ------------------------------------------------------------------------------------------- gallery


def test_gallery_is_one_file(reported):
    page = (reported[1] / "gallery.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "url(" not in page and "@import" not in page and "fetch(" not in page


def test_gallery_keeps_each_picture_once(reported):
    plan, folder = reported
    page = (folder / "gallery.html").read_text()
    pictures = gallery_data(page, "pictures")
    assert len(pictures) == len(set(pictures)) == 4 * (1 + 6 + 1)  # source, variants, truth
    shown = [int(number) for number in re.findall(r'data-picture="(\d+)"', page)]
    assert sorted(set(shown)) == list(range(len(pictures)))
    images = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in pictures]
    first = re.search(rf'data-picture="(\d+)" alt="drag.lr=0.02: {plan.subjects[1].name}"', page)
    np.testing.assert_array_equal(np.asarray(images[int(first[1])]), picture(1, 1))
    source = re.search(rf'data-picture="(\d+)" alt="source of {plan.subjects[1].name}"', page)
    assert images[int(source[1])].size == (256, 256)


def test_gallery_scores(reported):
    plan, folder = reported
    page = (folder / "gallery.html").read_text()
    columns = [column["label"] for column in gallery_data(page, "columns")]
    scores = gallery_data(page, "scores")
    assert len(scores) == 4 * 6
    figures = re.findall(r'<figure data-shot="(\d+)">.*?alt="(.*?): (.*?)"', page, re.S)
    for shot, variant, sample in figures:
        place = [v.name for v in plan.variants].index(variant)
        index = [s.name for s in plan.subjects].index(sample)
        value = scores[int(shot)][columns.index("mean distance")]
        assert value == pytest.approx(statistics.mean(distances(place, index)), rel=1e-4)
    assert len(figures) == 24


def test_gallery_draws_the_way(reported):
    plan, folder = reported
    page = (folder / "gallery.html").read_text()
    lines = re.findall(r'<polyline class="way" points="(.*?) "/>', page)
    assert len(lines) == 3 * 4, "of each edit by a model"
    points = [[float(number) for number in point.split(",")] for point in lines[0].split()]
    np.testing.assert_allclose(points, way(plan.subjects[0].sample, 3)[:, 0], atol=0.051)


def test_large_pictures_and_seeds(tmp_path):
    """A picture of 600 px is made smaller; seeds with different results stand in one cell."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    write_folder(EditSample(noise, "x", [[[10, 10], [20, 20]]], None, "a"), tmp_path / "data" / "cats" / "a")
    path = study_file(
        tmp_path, data={"path": str(tmp_path / "data")}, seeds=[0, 1], grid={"lora.steps": [0, 2]}, reference=None
    )
    plan = expand(load_study(path))
    (name,) = {name for _, name, _ in plan.keys}
    assert plan.keys["lora.steps=0", name, 0] == plan.keys["lora.steps=0", name, 1]
    fake(plan)
    assert main(["report", str(path)]) == 0
    folder = tmp_path / "results" / "lr" / "report"
    page = (folder / "gallery.html").read_text()
    sizes = {
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in gallery_data(page, "pictures")
    }
    assert sizes == {(256, 128)}
    assert "<small>seeds 0, 1</small>" in page, "one picture where they agree"
    assert "<small>seed 0</small>" in page and "<small>seed 1</small>" in page
    assert ">truth<" not in page
    assert str(tmp_path) not in "".join((folder / name).read_text() for name in ("report.md", "study.yaml"))
    assert "data.path=FOLDER_OF_THE_SAMPLES" in (folder / "report.md").read_text()
