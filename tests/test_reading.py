"""What is no regular file, or has no end, is refused wherever a file is read; nothing waits for it."""

from __future__ import annotations

import os
import pickle
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragdiff import reading
from dragdiff.data import readers
from dragdiff.errors import UserError
from dragdiff.methods import from_file
from dragdiff.models.lora_finetune import check_resume
from dragdiff.reading import NotAFile, check_file, read_file, read_json, take_away


@contextmanager
def at_once():
    """What takes longer than ten seconds fails, also where it waits for a pipe."""

    def give_up(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


IRREGULAR = [pipe, device, link_to_pipe, circle, Path.mkdir]


@pytest.mark.parametrize("make", IRREGULAR)
def test_only_a_regular_file_is_one(tmp_path, make):
    make(tmp_path / "x")
    with at_once(), pytest.raises(NotAFile):
        read_file(tmp_path / "x")
    take_away(tmp_path / "x")
    assert not os.path.lexists(tmp_path / "x")


def test_a_file_behind_a_link_is_read_and_one_that_is_too_large_is_not(tmp_path, monkeypatch):
    (tmp_path / "file").write_text('\ufeff{"a": 1}', "utf-8")
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {"a": 1}
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")
    monkeypatch.setattr(reading, "MOST_JSON", 5)
    with pytest.raises(NotAFile, match="larger than"):
        read_json(tmp_path / "link")


def test_taking_a_link_away_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    (tmp_path / "link").symlink_to("folder")
    take_away(tmp_path / "link")
    take_away(tmp_path / "none")
    assert [*tmp_path.rglob("*")] == [tmp_path / "folder", tmp_path / "folder" / "mine"]


@pytest.mark.parametrize("name", ["edit.json", "meta_data.pkl", "points.json", "prompt.json", "edited.png"])
@pytest.mark.parametrize("make", IRREGULAR)
def test_a_sample_of_what_is_no_file_is_refused(tmp_path, make, name):
    make(tmp_path / name)
    for picture in ("image.png", "original_image.png", "original.jpg", "origin_image.png", "mask.png"):
        Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(tmp_path / picture)
    (tmp_path / "metrics.json").write_text("{}")
    with at_once(), pytest.raises(UserError) as caught:
        readers.read_sample(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_json_that_is_nested_too_deeply_or_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "edit.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON: nested too deeply"):
        readers.read_sample(tmp_path)
    monkeypatch.setattr(reading, "MOST_JSON", 1000)
    with pytest.raises(UserError, match="cannot be read: larger than"):
        readers.read_sample(tmp_path)


@pytest.mark.parametrize("make", IRREGULAR)
def test_a_checkpoint_or_a_methods_file_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "x.py")
    with at_once(), pytest.raises(UserError, match=r"give a last\.ckpt"):
        check_resume(tmp_path / "x.py", settings={}, steps=1)
    with at_once(), pytest.raises(UserError, match="can't be read"):
        from_file.read(str(tmp_path / "x.py"))


def test_a_pickle_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "meta_data.pkl").write_bytes(pickle.dumps(b"x" * 1000))
    monkeypatch.setattr("dragdiff.data.safe_pickle.MAX_BYTES", 100)
    with pytest.raises(UserError, match="larger than"):
        readers.read_sample(tmp_path)
