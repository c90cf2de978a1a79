"""What runs one task: the edit, then its scores, into the store. Lives in the process that has the model loaded."""

from __future__ import annotations

import dataclasses
import io
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from dragdiff import output
from dragdiff.config import Config, MetricsConfig, StudyConfig, to_yaml
from dragdiff.editor import Editor, EditResult, OneModel
from dragdiff.errors import UserError, one_line
from dragdiff.metrics.suite import Suite, Values, metric_key
from dragdiff.study.plan import Subject, Task, baseline_picture
from dragdiff.study.store import RESULT, SCORES, Store, StoreError


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        scores: by metric (as `metric_key` names it), then by column.
        failure: the reason, where there is no result.
    """

    key: str
    scores: dict[str, Values] = field(default_factory=dict)
    failure: str = ""


class Worker:
    """One model, kept loaded, and the metrics'."""

    def __init__(self, study: StudyConfig, device: str = "") -> None:
        """
        Args:
            device: in place of `model.device=auto`, where each worker has its own.
        """
        self.study, self.device = study, device
        self.store = Store(study.results)
        self._model = OneModel()
        self._pictured = ""
        self._suite: Suite | None = None

    def ping(self) -> None:
        """Answers once the worker is there."""

    def unavailable(self) -> dict[str, str]:
        """Metrics that can't be had here, and what to do about it. Loads their models."""
        return self._metrics().unavailable

    def pace(self, task: Task) -> float | None:
        """Seconds that a forward of the denoiser takes for the picture of a task, median of a few. Loads the model.

        None where that picture can't be had or is too large: then its edit will say so.
        """
        assert task.config is not None
        editor = self._configured(task.config)
        try:
            return self._pace(task, task.config, editor)
        except (UserError, torch.OutOfMemoryError):
            return None

    def _pace(self, task: Task, config: Config, editor: Editor) -> float:
        image = task.subject.sample.resized(config.data.max_size).image
        backbone = editor.backbone
        shape = (1, backbone.latent_channels, *backbone.latent_size(*image.shape[:2]))
        latent, seconds = torch.zeros(shape, device=backbone.device), []
        with _threads(self.study.threads), torch.no_grad():
            embedding = backbone.embed([""])
            for _ in range(4):
                start = time.perf_counter()
                backbone.predict(latent, torch.tensor(500), embedding).sum().item()
                seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:]))

    def run(self, task: Task) -> Outcome:
        """Edit, if there is no result yet; score it, if scores are missing. A failed edit is recorded, not raised.

        Raises:
            StoreError: the results can't be read or written.
        """
        scores = self.store.read_json(f"results/{task.key}/{SCORES}") or {}
        if self.store.has_result(task.key) and not missing_scores(scores, self.study.metrics):
            return Outcome(task.key, scores)
        try:
            with _threads(self.study.threads):
                picture = self._edit(task)
                scores = self._score(task, picture)
        except StoreError:
            raise
        except Exception as error:  # whatever an edit may run into: the study goes on
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            record_failure(self.store, task, reason, traceback.format_exc())
            return Outcome(task.key, failure=reason)
        self.store.remove(f"failures/{task.key}.json")
        return Outcome(task.key, scores)

    def distances_in_order(self, edits: list[tuple[Subject, str]]) -> dict[str, Values]:
        """Mean distance with one noise generator for all edits (samples and their results' keys), by sample."""
        suite = Suite(self._metrics().settings, ["distance"])  # its generator begins anew
        found: dict[str, Values] = {}
        with _threads(self.study.threads):
            for subject, key in edits:
                picture = self.store.read(f"results/{key}/edited.png")
                values = suite.score("distance", subject, _picture(picture)) if picture is not None else None
                if values is not None:
                    found[subject.name] = values
        return found

    def _edit(self, task: Task) -> np.ndarray:
        """The task's picture (H, W, 3) uint8, from its result or made now."""
        kept = self.store.read(f"results/{task.key}/edited.png") if self.store.has_result(task.key) else None
        if kept is not None:
            try:
                return _picture(kept)
            except (OSError, SyntaxError, ValueError):  # damaged
                self.store.discard(task.key)
        if task.config is None:
            picture = baseline_picture(task.baseline, task.subject)
            self.store.write_result(task.key, {"edited.png": _png(picture), RESULT: _json({"baseline": task.baseline})})
            return picture
        editor = self._configured(task.config)
        if task.subject.name != self._pictured:
            editor.forget()
            self._pictured = task.subject.name
        result = self._attempt(editor, task)
        if result is None:  # what is kept for the picture's other edits may be what is too much
            editor = editor.without_memory()
            editor.share_lora(task.subject.sample, task.lora_steps)
            result = editor.edit(task.subject.sample)
        self.store.write_result(task.key, _files(result, task))
        return result.image

    def _attempt(self, editor: Editor, task: Task) -> EditResult | None:
        """None where memory is too small; the error is gone then, and with it what it holds."""
        try:
            editor.share_lora(task.subject.sample, task.lora_steps)
            return editor.edit(task.subject.sample)
        except torch.OutOfMemoryError:
            return None

    def _configured(self, config: Config) -> Editor:
        if self.device and config.model.device == "auto":
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, device=self.device))
        return self._model.editor(config)

    def _metrics(self) -> Suite:
        if self._suite is None:
            settings = self.study.metrics
            if self.device and settings.distance.device == "auto":
                distance = dataclasses.replace(settings.distance, device=self.device)
                settings = dataclasses.replace(settings, distance=distance)
            self._suite = Suite(settings, settings.names)
        return self._suite

    def _score(self, task: Task, picture: np.ndarray) -> dict[str, Values]:
        path = f"results/{task.key}/{SCORES}"
        before = scores = self.store.read_json(path) or {}
        try:
            for name in missing_scores(before, self.study.metrics):
                values = self._metrics().score(name, task.subject, picture)
                if values is not None:
                    scores = scores | {metric_key(name, self.study.metrics): values}
        finally:  # one that fails takes nothing from the others
            if scores != before:
                self.store.write_json(path, scores)
        return scores


def pooled_metrics(settings: MetricsConfig) -> list[str]:
    """The metrics whose value for an edit depends on nothing but the edit."""
    return [name for name in settings.names if not (name == "distance" and settings.ordered)]


def missing_scores(scores: Mapping[str, Values], settings: MetricsConfig) -> list[str]:
    """The metrics for which a result has no scores yet."""
    return [name for name in pooled_metrics(settings) if metric_key(name, settings) not in scores]


def record_failure(store: Store, task: Task, reason: str, details: str = "") -> None:
    """Say in the store why a task has no result."""
    store.write_json(f"failures/{task.key}.json", {"sample": task.subject.name, "reason": reason, "details": details})


def _files(result: EditResult, task: Task) -> dict[str, bytes]:
    facts = output.metrics(result) | {"trajectory": np.round(result.trajectory, 2).tolist()}
    assert task.config is not None
    return {
        "edited.png": _png(result.image),
        "config.yaml": to_yaml(dataclasses.replace(task.config, sample=task.subject.source)).encode(),
        RESULT: _json(facts),
    }


def _picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
