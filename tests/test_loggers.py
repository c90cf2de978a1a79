"""Experiment tracking: CSV files, and W&B without network."""

import csv
import json
import os
import warnings

import numpy as np
import pytest
import wandb

from dragdiff import output
from dragdiff.cli import main_edit
from dragdiff.config import Config, LoggerConfig, load_config
from dragdiff.data.readers import write_folder
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.loggers import check_login, open_logger

QUICK = ["lora.steps=1", "lora.resolution=16", "drag.steps=2", "drag.stop_distance=0", "output.frames_every=1"]


@pytest.fixture(autouse=True)
def _nobody_logged_in(monkeypatch, tmp_path):
    wandb.teardown()  # it remembers the environment of its first use in this process, maybe in another file's test
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing answers there


@pytest.fixture
def two_samples(tmp_path):
    for name in ("one", "two"):
        picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        write_folder(EditSample(picture, "a cat", [[[8, 8], [20, 8]]]), tmp_path / "samples" / name)
    return tmp_path / "samples"


@pytest.fixture
def edit(tiny_pipeline, tmp_path):
    """Runs the command; gives the exit code."""

    def run(*settings):
        fixed = [f"model.path={tiny_pipeline}", f"output.folder={tmp_path / 'out'}", "model.device=cpu", *QUICK]
        return main_edit(["debug", *fixed, *settings])

    return run


def leveldb_log(content):
    """The records of W&B's file: LevelDB's log format (blocks of 32 kB) after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def run_record(folder):
    """What W&B's offline file of a run holds: its run record, config, history, summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run, config, history, summary = None, {}, [], {}
    for data in leveldb_log(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            history.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            )
        elif kind == "summary":
            summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
    return run, config, history, summary


def test_no_logger(tmp_path):
    with open_logger(Config(), name="x", folder=tmp_path) as logger:
        assert logger is None
    assert list(tmp_path.iterdir()) == []


def test_csv(edit, two_samples, tmp_path):
    assert edit(f"sample={two_samples / 'one'}", "logger.kind=csv") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "one" / "log" / "metrics.csv").open()))
    assert sum(bool(row["lora/loss"]) for row in rows) == 1
    for key in ("drag/loss", "drag/motion", "drag/mask", "drag/distance", "drag/distance_0"):
        assert [row["step"] for row in rows if row[key]] == ["0", "1"], key
        assert all(np.isfinite(float(row[key])) for row in rows if row[key])


def test_csv_keeps_what_there_is_when_interrupted(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        open_logger(Config(logger=LoggerConfig(kind="csv")), name="x", folder=tmp_path) as logger,
    ):
        logger.log_metrics({"a": 1.0}, step=0)
        raise KeyboardInterrupt
    assert "1.0" in (tmp_path / "log" / "metrics.csv").read_text()


def test_wandb_offline_two_edits_are_two_runs(edit, two_samples, tmp_path, tiny_pipeline, capsys):
    before = dict(os.environ)
    assert edit(f"sample={two_samples}", "logger.kind=wandb", "logger.offline=true", "logger.tags=[trial]") == 0
    assert "wandb" not in capsys.readouterr().err
    assert {key: value for key, value in os.environ.items() if "WANDB" in key} == {
        key: value for key, value in before.items() if "WANDB" in key
    }
    assert wandb.run is None

    ids = set()
    for name in ("one", "two"):
        run, config, history, summary = run_record(tmp_path / "out" / name)
        ids.add(run.run_id)
        assert run.display_name == name
        assert run.project == "dragdiff"
        assert run.run_group == f"dragdiffusion-{tiny_pipeline.name}"
        assert list(run.tags) == ["dragdiffusion", tiny_pipeline.name, "trial"]
        assert config["drag"]["steps"] == 2
        assert config["sample"] == str(two_samples / name)
        logged = set().union(*history)
        assert {"lora/loss", "drag/loss", "drag/distance", "drag/distance_0", "drag/frame", "comparison"} <= logged
        assert sum("drag/frame" in entry for entry in history) == 2
        numbers = json.loads((tmp_path / "out" / name / "metrics.json").read_text())
        assert summary["distance_px"] == pytest.approx(numbers["points"][0]["distance_after_px"])
        assert summary["stop_reason"] == "steps"
        assert summary["seconds/drag"] == numbers["seconds"]["drag"]
        media = list((tmp_path / "out" / name).glob("wandb/offline-run-*/files/media/images/**/*.png"))
        assert sorted(path.parent.name for path in media).count("drag") == 2
        assert any(path.name.startswith("comparison") for path in media)
    assert len(ids) == 2


def test_group_can_be_named_and_long_names_are_cut(monkeypatch, tmp_path):
    seen = {}

    class Run:
        def finish(self, **kwargs):
            seen["finished"] = kwargs

    monkeypatch.setattr(wandb, "init", lambda **kwargs: seen.update(kwargs) or Run())
    monkeypatch.setattr("dragdiff.loggers._tolerant_logger", lambda run: run)
    config = load_config(overrides=["logger.kind=wandb", "logger.group=study", f"model.path=org/{'m' * 100}"])
    with open_logger(config, name="x", folder=tmp_path):
        pass
    assert (seen["group"], seen["mode"], seen["name"]) == ("study", None, "x")
    assert max(map(len, seen["tags"])) <= 64
    assert seen["finished"] == {}
    with pytest.raises(ZeroDivisionError), open_logger(config, name="x", folder=tmp_path):
        raise ZeroDivisionError
    assert seen["finished"] == {"exit_code": 1}


def test_edit_goes_on_when_wandb_fails_under_way(edit, two_samples, tmp_path, monkeypatch, capsys):
    def lost(self, *args, **kwargs):
        raise wandb.errors.CommError("the line is dead")

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lost)
    assert edit(f"sample={two_samples / 'one'}", "logger.kind=wandb", "logger.offline=true") == 0
    assert "note: W&B lost something, the edit goes on: the line is dead" in capsys.readouterr().err
    assert (tmp_path / "out" / "one" / "edited.png").is_file()


def test_not_logged_in_is_said_before_any_work(edit, two_samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dragdiff.editor.load_backbone", lambda _: pytest.fail("a model was loaded"))
    assert edit(f"sample={two_samples / 'one'}", "logger.kind=wandb") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "nobody is logged in to W&B" in line and "wandb login" in line and "logger.offline=true" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [LoggerConfig(), LoggerConfig(kind="csv"), LoggerConfig(kind="wandb", offline=True)]
)
def test_no_login_needed(settings, monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asked for a login"))
    check_login(settings)


def test_no_login_needed_where_the_environment_says_offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asked for a login"))
    check_login(LoggerConfig(kind="wandb"))


@pytest.mark.parametrize("call", ["login", "init"])
def test_wandb_that_does_not_answer(call, monkeypatch, tmp_path):
    def dead(**_):
        raise wandb.errors.CommError("timed out\nsecond line")

    monkeypatch.setattr(wandb, call, dead)
    config = load_config(overrides=["logger.kind=wandb"])
    with pytest.raises(UserError, match="W&B did not start: timed out second line; run `wandb login`"):
        if call == "login":
            check_login(config.logger)
        else:
            with open_logger(config, name="x", folder=tmp_path):
                pass


def test_pictures_are_only_sent_where_they_can_be():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from dragdiff.loggers import log_result

        log_result(None, None, {})
        assert output is not None
