"""A study in W&B: what its runs hold, and that nothing is lost or fails without network. No model runs."""

import io
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import wandb
import yaml
from PIL import Image
from test_loggers import leveldb_log

from dragdiff.config import load_study
from dragdiff.errors import UserError
from dragdiff.metrics.suite import metric_key
from dragdiff.output import SHOWN_SIDE
from dragdiff.study import wandb_runs
from dragdiff.study.plan import expand
from dragdiff.study.store import SCORES, Store, StoreError
from dragdiff.study.table import measured, summary
from dragdiff.study.wandb_runs import check_tracking, track

STUDY = {
    "question": "How far?",
    "data": {"scenes": 2, "categories": ["sun"]},
    "grid": {"ddim.strength": [0.5, 0.7]},
    "metrics": {"names": ["scene", "accuracy"]},
    "logger": {"kind": "wandb", "project": "drags", "tags": ["trial"]},
}
NAMES = ["ddim.strength=0.5", "ddim.strength=0.7", "identity", "copy-patch", "oracle"]


@pytest.fixture(autouse=True, scope="module")
def _nobody_logged_in(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "none"))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing answers there
        yield


def make(folder, *overrides):
    """A plan and its store."""
    file = folder / "far.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    plan = expand(load_study(file, [f"results={folder / 'results'}", *overrides]))
    return plan, Store(plan.study.results)


def write_results(plan, store, variants=NAMES):
    """Results as a worker leaves them; the distance of edit (variant v, sample s) is 10 v + s, and infinite PSNR."""
    for (variant, sample, _), key in plan.keys.items():
        if variant not in variants:
            continue
        v, s = NAMES.index(variant), ["sun-0", "sun-1"].index(sample)
        facts = {"baseline": variant}
        if variant.startswith("ddim"):  # sun-0 goes a quarter of the way in one step, sun-1 half in two
            points = next(subject for subject in plan.subjects if subject.name == sample).sample.points
            handles, targets = points[:, 0], points[:, 1]
            ways = [[handles, (3 * handles + targets) / 4], [handles, handles, (handles + targets) / 2]]
            facts = {"steps": 1 + s, "seconds": {"drag": 1.0}, "trajectory": np.stack(ways[s]).tolist()}
        store.write_result(key, {"edited.png": png((10 * v, s, 0)), "edit.json": json.dumps(facts).encode()})
        scores = {"true_distance": [10.0 * v + s], "psnr_inside": [float("inf")]}
        dai = {"dai_1": [0.1 * v, 0.3 * v]}
        metrics = plan.study.metrics
        store.write_json(
            f"results/{key}/{SCORES}", {metric_key("scene", metrics): scores, metric_key("accuracy", metrics): dai}
        )


def png(colour, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def records(file):
    """Of an offline run. W&B's process may still be writing them when the run is finished."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(200):
        found = [Record.FromString(data) for data in leveldb_log(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


def read_runs(folder):
    """By the name of each offline run below a folder: what its file holds."""
    runs = {}
    for file in folder.glob("wandb/offline-run-*/run-*.wandb"):
        found = {"folder": file.parent, "config": {}, "logged": {}, "summary": {}, "pictures": []}
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found["run"] = record.run
                found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind in ("history", "summary"):
                items = record.history.item if kind == "history" else record.summary.update
                values = {"/".join(item.nested_key or [item.key]): json.loads(item.value_json) for item in items}
                found["logged" if kind == "history" else "summary"] |= values
            elif kind == "artifact":
                found["pictures"] += [
                    Image.open(entry.local_path)
                    for entry in record.artifact.manifest.contents
                    if entry.path.endswith(".png")
                ]
        assert found["run"].display_name not in runs
        runs[found["run"].display_name] = found
    return runs


def table(run, name):
    """Columns and rows of a table that a run has logged."""
    content = json.loads((run["folder"] / "files" / run["logged"][f"{name}/path"]).read_text())
    return content["columns"], content["data"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The runs of a study whose variants all have results, but for one edit; and what was measured."""
    folder = tmp_path_factory.mktemp("tracked")
    plan, store = make(folder, "logger.offline=true")
    write_results(plan, store)
    store.remove(f"results/{plan.keys['oracle', 'sun-1', 42]}/{SCORES}")
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        track(plan, store, {"plots.png": png((1, 2, 3), (30, 20)), "means.csv": b"a,b"})
    assert {key: value for key, value in os.environ.items() if "WANDB" in key} == {
        key: value for key, value in before.items() if "WANDB" in key
    }
    assert wandb.run is None
    return read_runs(folder / "results" / "far"), measured(plan, store)


def test_a_run_for_each_variant_and_one_for_the_whole(tracked):
    runs, _ = tracked
    assert sorted(runs) == sorted([*NAMES, "summary"])
    assert len({entry["run"].run_id for entry in runs.values()}) == 6
    for name, entry in runs.items():
        run = entry["run"]
        assert (run.project, run.run_group) == ("drags", "far")
        kind = {"summary": "summary"}.get(name, "variant" if name.startswith("ddim") else "baseline")
        assert run.job_type == kind
        tags = ["dragdiffusion", "embedded", "trial"] if kind == "variant" else ["trial"]
        assert list(run.tags) == tags


def testconfig_of(tracked):
    runs, _ = tracked
    for name, strength in zip(NAMES[:2], (0.5, 0.7), strict=True):
        config = runs[name]["config"]
        assert config["ddim"]["strength"] == strength and config["drag"]["features"] == ["up_blocks.2"]
        assert (config["study"], config["variant"], config["seeds"]) == ("far", name, [42])
        assert "seed" not in config
    baseline = {key: value for key, value in runs["identity"]["config"].items() if not key.startswith("_")}
    assert baseline == {"study": "far", "variant": "identity"}


def test_summary_metrics(tracked):
    runs, data = tracked
    means = summary(data)
    for name in NAMES:
        shown = runs[name]["summary"]
        for row in means[means["variant"] == name].itertuples():
            for key, value in (("", row.value), ("/low", row.low), ("/high", row.high)):
                found = shown.get(f"{row.column}{key}", "nan")
                assert float(found) == pytest.approx(value, nan_ok=True), (name, row.column, key)
    assert runs["ddim.strength=0.7"]["summary"]["true_distance"] == 10.5
    assert runs["copy-patch"]["summary"]["psnr_inside"] == float("inf")
    assert (runs["identity"]["summary"]["edits"], runs["identity"]["summary"]["without result"]) == (2, 0)
    assert (runs["oracle"]["summary"]["edits"], runs["oracle"]["summary"]["without result"]) == (1, 1)


def test_samples_and_their_pictures(tracked):
    runs, _ = tracked
    columns, rows = table(runs["ddim.strength=0.7"], "samples")
    wanted = ["sample", "category", "seed", "source", "edited", "true_distance", "psnr_inside", "dai_1"]
    assert columns == wanted
    infinite = float("inf")
    assert [row[:5] for row in rows] == [[f"sun-{s}", "sun", 42, "Image", "Image"] for s in (0, 1)]
    assert [row[5:] for row in rows] == [[10.0, infinite, pytest.approx(0.2)], [11.0, infinite, pytest.approx(0.2)]]
    assert runs["ddim.strength=0.7"]["run"].notes == ""
    edits = [picture for picture in runs["ddim.strength=0.7"]["pictures"] if picture.size == (64, 64)]
    sources = [picture for picture in runs["ddim.strength=0.7"]["pictures"] if picture.size == (SHOWN_SIDE,) * 2]
    assert sorted(picture.getpixel((5, 5)) for picture in edits) == [(10, 0, 0), (10, 1, 0)]
    assert len(sources) == 2
    assert all((228, 26, 28) in {colour for _, colour in picture.getcolors(1 << 20)} for picture in sources)  # a handle


def test_pictures_lie_beside_the_run_that_shows_them(tracked):
    runs, _ = tracked
    entry = runs["ddim.strength=0.5"]
    assert entry["pictures"]
    assert all(Path(picture.filename).is_relative_to(entry["folder"]) for picture in entry["pictures"])


def test_trajectory_is_the_mean_over_edits_held_at_their_ends(tracked):
    runs, data = tracked
    near, far = (np.linalg.norm(s.sample.points[:, 0] - s.sample.points[:, 1], axis=1)[0] for s in data.plan.subjects)
    wanted = [(near + far) / 2, (0.75 * near + far) / 2, (0.75 * near + 0.5 * far) / 2]
    columns, rows = table(runs["ddim.strength=0.5"], "trajectory_table")
    assert columns == ["step", "distance"]
    assert [step for step, _ in rows] == [0, 1, 2]
    assert [distance for _, distance in rows] == pytest.approx(wanted)
    assert not any("trajectory" in key for key in runs["identity"]["logged"])


def test_run_of_the_whole(tracked):
    runs, data = tracked
    whole, means = runs["summary"], summary(data)
    assert whole["run"].notes == whole["config"]["question"] == "How far?"
    assert whole["config"]["grid"] == {"ddim.strength": [0.5, 0.7]}
    columns, rows = table(whole, "means")
    assert columns == list(means.columns) and len(rows) == len(means)
    assert [row[3] for row in rows] == pytest.approx(means["value"].tolist())
    assert Image.open(whole["folder"] / "files" / whole["logged"]["plots/plots/path"]).getpixel((0, 0)) == (1, 2, 3)
    assert {key.split("/")[0] for key in whole["logged"] if not key.startswith("_")} == {"means", "plots"}


def test_pictures_of_many_edits_are_a_spread_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_runs, "PICTURED", 1)
    plan, store = make(tmp_path, "logger.offline=true")
    write_results(plan, store)
    pages = {page.name: page for page in wandb_runs.pages(plan, store, {})}
    rows = pages["identity"].tables["samples"]
    assert rows["edited"].notna().tolist() == rows["source"].notna().tolist() == [True, False]
    assert pages["identity"].notes == "Pictures of 1 of the 2 edits."


def test_tracked_again_the_runs_are_the_same_ones(tmp_path, capsys):
    plan, store = make(tmp_path, "logger.offline=true")
    write_results(plan, store, NAMES[:1])
    folder = tmp_path / "results" / "far"
    track(plan, store, {})
    before = read_runs(folder)
    assert before["oracle"]["summary"]["edits"] == 0 and "true_distance" not in before["oracle"]["summary"]
    write_results(plan, store)
    track(plan, store, {})
    after = read_runs(folder)  # which fails where a name is there twice
    assert {name: entry["run"].run_id for name, entry in after.items()} == {
        name: entry["run"].run_id for name, entry in before.items()
    }
    assert after["oracle"]["summary"]["true_distance"] == 40.5
    assert capsys.readouterr() == ("", "")


def test_ids_tell_project_results_study_and_variant_apart(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    variants = [
        (tmp_path,),
        (tmp_path, "logger.project=p"),
        (other,),
        (tmp_path, "name=n"),
        (tmp_path, "logger.tags=[]"),
    ]
    ids = [[page.id for page in wandb_runs.pages(*make(*arguments), {})] for arguments in variants]
    assert ids[0] == ids[4]
    assert len({name for entry in ids[:4] for name in entry}) == 4 * 6


def test_without_tracking_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_runs, "measured", lambda *_: pytest.fail("the results were read"))
    plan, store = make(tmp_path, "logger.kind=none")
    check_tracking(plan.study)
    track(plan, store, {})
    assert not (tmp_path / "results").exists()


def test_csv_is_refused(tmp_path):
    plan, store = make(tmp_path, "logger.kind=csv")
    for call in (lambda: check_tracking(plan.study), lambda: track(plan, store, {})):
        with pytest.raises(UserError, match=r"logger.kind is 'csv': .* set logger.kind=none"):
            call()


def test_nobody_logged_in_is_said_and_all_is_kept(tmp_path):
    plan, store = make(tmp_path / "")
    write_results(plan, store, NAMES[:1])
    start = time.monotonic()
    with pytest.warns(UserWarning, match="nobody is logged in .*`wandb login`.* kept for `wandb sync`"):
        check_tracking(plan.study)
    assert time.monotonic() - start < 10
    with pytest.warns(UserWarning) as notes:
        track(plan, store, {})
    (note,) = [str(note.message) for note in notes if note.category is UserWarning]
    assert "nobody is logged in" in note and "\n" not in note
    assert f"wandb sync {tmp_path}/results/far/wandb/offline-run-*" in note
    assert sorted(read_runs(tmp_path / "results" / "far")) == sorted([*NAMES, "summary"])


def test_network_that_fails_under_way(tmp_path, monkeypatch):
    asked, init = [], wandb.init

    def dead(**arguments):
        asked.append((arguments["mode"], arguments["name"], arguments["resume"]))
        if arguments["mode"] is None:
            raise wandb.errors.CommError("the line\nis dead")
        return init(**arguments)

    monkeypatch.setattr(wandb_runs, "check_login", lambda _: None)
    monkeypatch.setattr(wandb, "init", dead)
    plan, store = make(tmp_path)
    write_results(plan, store, NAMES[:1])
    with pytest.warns(UserWarning, match="W&B did not start: the line is dead.*`wandb sync .*`"):
        track(plan, store, {})
    assert asked[0] == (None, NAMES[0], "allow")
    assert asked[1:] == [("offline", name, "allow") for name in [*NAMES, "summary"]]
    assert len(read_runs(tmp_path / "results" / "far")) == 6


def test_wandb_itself_without_an_answer(tmp_path, monkeypatch):
    """Its process holds on to the id of the run that it could not start."""
    monkeypatch.setattr(wandb_runs, "check_login", lambda _: None)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setitem(wandb_runs.TIMEOUTS, "init_timeout", 1.0)
    plan, store = make(tmp_path)
    write_results(plan, store, NAMES[:1])
    try:
        with pytest.warns(UserWarning, match="W&B did not start: .*`wandb sync .*`"):
            track(plan, store, {})
    finally:
        wandb.sdk.lib.wbauth.unauthenticate_session()  # else later tests are logged in
    assert len(read_runs(tmp_path / "results" / "far")) == 6


@pytest.mark.parametrize(("place", "name"), [(wandb, "init"), (wandb.sdk.wandb_run.Run, "log")])
def test_wandb_that_takes_nothing_at_all(place, name, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(place, name, broken)
    plan, store = make(tmp_path, "logger.offline=true")
    write_results(plan, store, NAMES[:1])
    with pytest.warns(UserWarning, match=r"W&B did not take ddim.strength=0.5; .*summary: .*no space left.*results"):
        track(plan, store, {})


def test_results_that_cannot_be_read_are_no_matter_of_wandb(tmp_path, monkeypatch):
    def broken(self, path):
        raise StoreError("cannot read it")

    plan, store = make(tmp_path, "logger.offline=true")
    write_results(plan, store, NAMES[:1])
    monkeypatch.setattr(Store, "read", broken)
    with pytest.raises(StoreError, match="cannot read it"):
        track(plan, store, {})


def test_results_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan, store = make(tmp_path, "results=memory://studies", "logger.offline=true", "logger.group=mine")
    write_results(plan, store, NAMES[:1])
    track(plan, store, {})
    runs = read_runs(tmp_path)
    assert len(runs) == 6 and {entry["run"].run_group for entry in runs.values()} == {"mine"}
