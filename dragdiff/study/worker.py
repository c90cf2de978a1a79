"""What runs one task: the edit, then its scores, into the store. Lives in the process that has the model loaded."""

from __future__ import annotations

import dataclasses
import io
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dragdiff import output
from dragdiff.config import Config, MetricsConfig, StudyConfig, to_files
from dragdiff.editor import Editor, OneModel
from dragdiff.errors import DeviceLost, UserError, one_line, out_of_memory
from dragdiff.job import EditResult, Request
from dragdiff.metrics.suite import COST, Suite, Values, metric_key
from dragdiff.study.plan import Subject, Task, baseline_picture
from dragdiff.study.results import PICTURE, picture_of, read_results, scores_of
from dragdiff.study.store import RESULT, SCORES, Store, StoreError

MOST = 8  # edits at once, where the study leaves it to the worker
SHARE = 0.8  # of a GPU's free memory that edits may take


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


class Failure(NamedTuple):
    """Why there is no picture; texts, as an exception keeps what was in memory where it was raised."""

    reason: str
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What is kept of an exception: a user's mistake by its text, anything else with its traceback."""
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        return cls(reason, "".join(traceback.format_exception(error)))


class Room:
    """How many edits fit into a GPU's memory together, found out from the most that one has needed.

    Attributes:
        edits: that many; elsewhere, and at first, one.
    """

    def __init__(self, batch: int) -> None:
        """
        Args:
            batch: how many the study says; 0 = it is to be found out.
        """
        self.edits = batch or 1
        self._given, self._needed = batch > 0, 1.0  # bytes, the most that an edit has taken

    @contextmanager
    def measured(self, editor: Editor) -> Iterator[None]:
        """Learns from a batch of an editor that is run meanwhile."""
        device = editor.backbone.device
        if self._given or device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(device)
        yield
        if editor.ran_together:
            needed = (torch.cuda.max_memory_allocated(device) - before) / editor.ran_together
            self._needed = max(self._needed, needed)
            held = torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
            self.edits = int(min(MOST, max(1, SHARE * free / self._needed)))


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
        self._gpu: torch.device | None = None  # that the model is on
        self._pictured: list[str] = []
        self._room = Room(study.batch)
        self._suite: Suite | None = None

    def ping(self) -> None:
        """Answers once the worker is there, with its GPU.

        Raises:
            DeviceLost: that does not work.
        """
        self._check_gpu()

    def unavailable(self) -> dict[str, str]:
        """Metrics that can't be had here, and what to do about it. Loads their models."""
        return self._metrics().unavailable

    def pace(self, task: Task) -> float | None:
        """What a forward of the denoiser takes for the picture of a task. Loads the model.

        Returns:
            Seconds, median of a few; None where the picture can't be had or is too large: its edit will say so.
        """
        assert task.config is not None
        editor = self._configured(task.config)
        backbone, seconds = editor.backbone, []
        try:
            shape = (1, backbone.latent_channels, *editor.size_class(task.subject.sample))
            latent = torch.zeros(shape, device=backbone.device)
            with _threads(self.study.threads), torch.no_grad():
                condition = backbone.condition([""])
                for _ in range(4):
                    start = time.perf_counter()
                    backbone.predict(latent, torch.tensor(500), condition).sum().item()
                    seconds.append(time.perf_counter() - start)
        except (UserError, RuntimeError, MemoryError) as error:
            if not isinstance(error, UserError) and not out_of_memory(error):
                raise
            return None
        return float(np.median(seconds[1:]))

    def most_at_once(self, task: Task) -> int:
        """How many edits to hand to this worker at once. Loads the model."""
        assert task.config is not None
        return self.study.batch or (MOST if self._configured(task.config).backbone.device.type == "cuda" else 1)

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Edit what has no result yet; score what has no scores. A failed edit is recorded, not raised.

        Args:
            tasks: one, or several whose edits fit into one batch (`Task.batch_key`).

        Raises:
            StoreError: the results can't be read or written.
            DeviceLost: the GPU no longer works.
        """
        scores = [scores_of(self.store.read_json(f"results/{task.key}/{SCORES}")) for task in tasks]
        left = [
            task
            for task, known in zip(tasks, scores, strict=True)
            if not self.store.has_result(task.key) or missing_scores(known, self.study.metrics)
        ]
        done = {task.key: Outcome(task.key, known) for task, known in zip(tasks, scores, strict=True)}
        with _threads(self.study.threads):
            pictures = self._pictures(left)
            done |= {task.key: self._scored(task, pictures[task.key]) for task in left}
        return [done[task.key] for task in tasks]

    def _scored(self, task: Task, picture: np.ndarray | Failure) -> Outcome:
        scores: dict[str, Values] = {}
        if not isinstance(picture, Failure):
            try:
                scores = self._score(task, picture)
            except StoreError:
                raise
            except Exception as error:
                self._check_gpu()
                picture = Failure.of(error)
        if isinstance(picture, Failure):
            record_failure(self.store, task, picture.reason, picture.details)
            return Outcome(task.key, failure=picture.reason)
        self.store.remove(f"failures/{task.key}.json")
        return Outcome(task.key, scores)

    def distances_in_order(self, edits: list[tuple[Subject, str]]) -> dict[str, Values]:
        """Mean distance with one noise generator for all edits.

        Args:
            edits: samples and their results' keys, in the order in which noise is drawn.

        Returns:
            By sample its values by column; those without a picture apart.
        """
        suite = Suite(self._metrics().settings, ["distance"])  # its generator begins anew
        found: dict[str, Values] = {}
        with _threads(self.study.threads):
            for subject, key in edits:
                with suppress(UserError):  # damaged meanwhile
                    picture = picture_of(self.store.read(f"results/{key}/{PICTURE}"), subject)
                    if (values := suite.score("distance", subject, picture)) is not None:
                        found[subject.name] = values
        return found

    def _pictures(self, tasks: Sequence[Task]) -> dict[str, np.ndarray | Failure]:
        """Each task's picture (H, W, 3) uint8, from its result or made now, or why there is none; by key."""
        pictures: dict[str, np.ndarray | Failure] = {}
        left = []
        for task in tasks:
            kept = self._kept(task)
            if kept is not None:
                pictures[task.key] = kept
            elif task.config is None:
                pictures[task.key] = self._baseline(task)
            else:
                left.append(task)
        while left:
            at_once, left = left[: self._room.edits], left[self._room.edits :]
            for task, result in zip(at_once, self._edited(at_once), strict=True):
                if isinstance(result, EditResult):
                    self.store.write_result(task.key, _files(result, task))
                    pictures[task.key] = result.image
                else:
                    pictures[task.key] = result if isinstance(result, Failure) else Failure(str(result))
        return pictures

    def _baseline(self, task: Task) -> np.ndarray | Failure:
        try:
            picture = baseline_picture(task.baseline, task.subject)
        except Exception as error:
            return Failure.of(error)
        files = {PICTURE: _png(picture), RESULT: _json({"baseline": task.baseline})}
        self.store.write_result(task.key, files)
        return picture

    def _kept(self, task: Task) -> np.ndarray | None:
        if task.key in read_results(self.store, [task]).facts:
            return picture_of(self.store.read(f"results/{task.key}/{PICTURE}"), task.subject)
        if self.store.has_result(task.key):  # damaged
            self.store.discard(task.key)
        return None

    def _edited(self, tasks: Sequence[Task]) -> Sequence[EditResult | UserError | Failure]:
        """The edits of one batch; where it fails as a whole, one by one."""
        assert tasks[0].config is not None
        names = sorted({task.subject.name for task in tasks})
        try:
            editor = self._configured(tasks[0].config)
            if names != self._pictured:
                editor.forget()
                self._pictured = names
            results = self._attempt(editor, tasks)
            if results is None:  # what is kept for the pictures' other edits may be what is too much
                results = self._edit(editor.without_memory(), tasks)
            return results
        except Exception as error:  # whatever an edit may run into: the study goes on
            self._check_gpu()
            if len(tasks) == 1:
                return [Failure.of(error)]
        return [result for task in tasks for result in self._edited([task])]

    def _check_gpu(self) -> None:
        """Raises DeviceLost where the GPU, if there is one, does not work: every edit would fail."""
        if not (self.device.startswith("cuda") or torch.cuda.is_initialized()):
            return
        try:
            torch.cuda.synchronize(self._gpu or self.device or None)
        except (RuntimeError, AssertionError) as error:
            raise DeviceLost(f"the GPU has stopped working ({one_line(error)})") from error

    def _attempt(self, editor: Editor, tasks: Sequence[Task]) -> list[EditResult | UserError] | None:
        """None where memory is too small; the error is gone then, and with it what it holds."""
        try:
            return self._edit(editor, tasks)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return None

    def _edit(self, editor: Editor, tasks: Sequence[Task]) -> list[EditResult | UserError]:
        for steps in {task.lora_steps for task in tasks if len(task.lora_steps) > 1}:
            samples = [task.subject.sample for task in tasks if task.lora_steps == steps]
            with self._room.measured(editor):
                editor.share_loras(samples, steps)
        model = editor.config.model  # with this worker's device
        requests = [
            Request(task.subject.sample, dataclasses.replace(task.config, model=model)) for task in tasks if task.config
        ]
        with self._room.measured(editor):
            return editor.edit_batch(requests)

    def _configured(self, config: Config) -> Editor:
        if self.device and config.model.device == "auto":
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, device=self.device))
        editor = self._model.editor(config)
        self._gpu = editor.backbone.device if editor.backbone.device.type == "cuda" else None
        return editor

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
        before = scores = scores_of(self.store.read_json(path))
        try:
            for name in missing_scores(before, self.study.metrics):
                values = self._metrics().score(name, task.subject, picture)
                if values is not None:
                    scores = scores | {metric_key(name, self.study.metrics): values}
        finally:  # one that fails takes nothing from the others
            if scores != before:
                self.store.write_json(path, scores)
        return scores


def missing_scores(scores: Mapping[str, Values], settings: MetricsConfig) -> list[str]:
    """The metrics for which a result has no scores yet, those apart that depend on other edits, too."""
    own = [n for n in settings.names if n != COST and not (n == "distance" and settings.ordered)]
    return [name for name in own if metric_key(name, settings) not in scores]


def record_failure(store: Store, task: Task, reason: str, details: str = "") -> None:
    """Say in the store why a task has no result."""
    store.write_json(f"failures/{task.key}.json", {"sample": task.subject.name, "reason": reason, "details": details})


def _files(result: EditResult, task: Task) -> dict[str, bytes]:
    facts = output.metrics(result)
    if result.trajectory is not None:
        facts["trajectory"] = np.round(result.trajectory, 2).tolist()
    assert task.config is not None
    repeats = to_files(dataclasses.replace(task.config, sample=task.subject.source))
    return {
        PICTURE: _png(result.image),
        **{name: content.encode() for name, content in repeats.items()},
        RESULT: _json(facts),
    }


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
