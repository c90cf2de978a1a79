"""A study's results that something has happened to on disk: they are made again, and a report names them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dragdiff import cli
from dragdiff.config import load_study
from dragdiff.study.plan import expand
from dragdiff.study.results import read_results
from dragdiff.study.store import Store
from dragdiff.study.table import measured
from dragdiff.study.worker import Worker, _png


@pytest.fixture
def study(tmp_path, tiny_pipeline, monkeypatch):
    """A study whose edits are made up at once, and baselines are what they are; it has been run."""
    settings = {"model": {"path": str(tiny_pipeline), "device": "cpu"}, "lora": {"steps": 0}}
    content = {
        "base": [],
        "settings": settings,
        "data": {"scenes": 12, "limit": 24},
        "metrics": {"names": ["outside", "cost"]},
        "results": str(tmp_path / "results"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(Worker, "pace", lambda self, task: None)
    monkeypatch.setattr(Worker, "most_at_once", lambda self, task: 1)
    made = Worker._pictures

    def pictures(self, tasks):
        found = made(self, [task for task in tasks if task.config is None or self._kept(task) is not None])
        for task in tasks:
            if task.key not in found:
                sample = task.subject.sample
                facts = {"steps": 1, "seconds": {"drag": 1.0}, "trajectory": [sample.handles.tolist()] * 2}
                self.store.write_result(
                    task.key, {"edited.png": _png(sample.image), "edit.json": json.dumps(facts).encode()}
                )
                found[task.key] = sample.image
        return found

    monkeypatch.setattr(Worker, "_pictures", pictures)
    assert cli.main(["study", str(path)]) == 0
    return path


def replaced(content: bytes):
    return lambda file: file.write_bytes(content)


def emptied(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "x").write_text("x")


def piped(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def resized(file: Path) -> None:
    Image.new("RGB", (20, 20)).save(file)


FACTS = b'{"steps": 1, "seconds": {"drag": 1}, "trajectory": %s}'
DAMAGE = {
    "a picture cut": ("edited.png", cut),
    "an empty picture": ("edited.png", replaced(b"")),
    "no picture": ("edited.png", Path.unlink),
    "a picture of another size": ("edited.png", resized),
    "a folder for a picture": ("edited.png", emptied),
    "a pipe for a picture": ("edited.png", piped),
    "a list of facts": ("edit.json", replaced(b"[]")),
    "a number for facts": ("edit.json", replaced(b"3")),
    "nested facts": ("edit.json", replaced(b"[" * 100_000)),
    "a text for a way": ("edit.json", replaced(FACTS % b'"text"')),
    "a way of another sample": ("edit.json", replaced(FACTS % b"[[[1, 2], [3, 4], [5, 6], [7, 8]]]")),
    "no steps": ("edit.json", replaced(b"{}")),
    "seconds that are none": ("edit.json", replaced(b'{"steps": 1, "seconds": {"drag": "long"}}')),
    "a folder for facts": ("edit.json", emptied),
    "a pipe for facts": ("edit.json", piped),
}


SCORES = [b"3", b'{"outside": 3}', b"[" * 100_000, None]
FAILURES = [b"{}", b"3", b'{"reason": null}', None]


def test_all_that_is_damaged_is_named_by_the_report_and_made_again(study, capsys):
    """One sample for each kind of damage, to a picture, facts, scores, a record of a failure; and a baseline's."""
    plan, place = expand(load_study(study)), study.parent / "results" / "results"
    store, before = Store(plan.study.results), scores_of(study)
    tasks = [task for task in plan.tasks if task.config]
    damaged = [next(task for task in plan.tasks if task.baseline)]
    cut(place / damaged[0].key / "edited.png")
    files = [place / damaged[0].key / "edited.png"]
    for name, damage in DAMAGE.values():
        task = tasks.pop()
        damaged.append(task)
        files.append(place / task.key / name)
        damage(files[-1])
    whole = read_results(store, plan.tasks).facts.keys()
    assert {task.key for task in plan.tasks} - whole == {task.key for task in damaged}
    kept = {}
    for content in SCORES:
        file = place / tasks.pop().key / "scores.json"
        files.append(file)
        kept[file.with_name("edited.png")] = file.with_name("edited.png").stat().st_mtime_ns
        metric = next(iter(json.loads(file.read_text())))
        emptied(file) if content is None else file.write_bytes(content.replace(b"outside", metric.encode()))
    (place.parent / "failures").mkdir(exist_ok=True)
    for content in FAILURES:
        key = tasks.pop().key
        shutil.rmtree(place / key)
        record = place.parent / "failures" / f"{key}.json"
        record.mkdir() if content is None else record.write_bytes(content)

    assert cli.main(["report", str(study)]) == 0
    reasons = "\n".join(measured(plan, store).failures["reason"])
    for file in files:
        assert f"{file} is damaged" in reasons or file.is_dir(), file
    assert str(files[1]) in (place.parent / "study" / "report" / "report.md").read_text().replace("\\", "")
    capsys.readouterr()
    assert cli.main(["study", str(study)]) == 0
    assert f"{len(files) + len(FAILURES)} done now" in capsys.readouterr().out
    assert scores_of(study) == before and not list((place.parent / "failures").iterdir())
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())  # only scored anew


def scores_of(path: Path) -> str:
    plan = expand(load_study(path))
    data = measured(plan, Store(plan.study.results))
    return data.scores.to_csv() + data.failures.to_csv()


def test_a_failure_is_written_where_a_folder_is(tmp_path):
    store = Store(str(tmp_path))
    (tmp_path / "failures" / "k.json" / "x").mkdir(parents=True)
    store.write_json("failures/k.json", {"reason": "why"})
    assert store.read_json("failures/k.json") == {"reason": "why"}


@pytest.mark.parametrize("content", [b"[]", b"3", b"", b"[" * 100_000, b'{"settings": 3}'])
def test_a_study_file_that_is_none(tmp_path, content, capsys):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_bytes(content)
    assert cli.main(["report", str(tmp_path / "study")]) == 2
    assert "no study in" in capsys.readouterr().err


def test_json_that_is_too_large_counts_as_missing(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write_json("a.json", {"x": "y" * 100})
    monkeypatch.setattr("dragdiff.study.store.MOST_JSON", 50)
    assert store.read_json("a.json") is None
