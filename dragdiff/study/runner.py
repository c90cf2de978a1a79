"""Runs a plan: hands its jobs to workers, records what fails, goes on where an earlier run was stopped."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dragdiff import methods
from dragdiff.aliases import Report
from dragdiff.config import MetricsConfig
from dragdiff.errors import UserError, WorkerDied, one_line
from dragdiff.metrics.suite import COLUMNS, metric_key
from dragdiff.options import walk
from dragdiff.study.executors import WorkerHandle, open_workers
from dragdiff.study.plan import Plan, Task
from dragdiff.study.results import Results, read_results
from dragdiff.study.store import Store
from dragdiff.study.table import ordered_path
from dragdiff.study.worker import Outcome, missing_scores, record_failure

SHOWN = 10  # failures that are listed at the end


@dataclass
class Summary:
    """What a run of a study has done.

    Attributes:
        total: tasks of the study.
        done, found: tasks done now, and done before.
        failed: key and reason of those that could not be done.
        unavailable: metrics that could not be had, and what to do about it.
        values: of the edits done now, each its mean over pairs, by column; baselines apart.
    """

    total: int
    done: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)


def _open_study(plan: Plan) -> Store:
    """The study's place in the store; writes what the study is.

    Raises:
        UserError: another study of that name is there.
        StoreError: the place can't be read or written.
    """
    study = plan.study
    store = Store(study.results)
    path = f"{study.name}/study.json"
    before, identity = store.read_json(path), {"question": study.question, "data": study.data.path}
    if before is not None:
        for key, value in identity.items():
            if before.get(key) != value:
                raise UserError(
                    f"{store.path(study.name)} holds another study ({key}: {before.get(key)!r}, here {value!r}): "
                    "set another name or results"
                )
    store.write_json(path, identity | {"settings": asdict(study)})
    return store


def run(plan: Plan, *, retry_failed: bool = False, report: Report = lambda *_: None) -> Summary:
    """Do what is missing of a study.

    Args:
        retry_failed: also what failed before.
        report: called after each edit.

    Raises:
        UserError: settings, a model or a place for workers that can't be had.
        StoreError: the results can't be written; what is there stays.
    """
    store = _open_study(plan)
    summary = Summary(total=len(plan.tasks))
    unscored = _unscored(_whole(store, plan.tasks), plan.study.metrics)
    failures = {} if retry_failed else store.read_jsons([f"failures/{task.key}.json" for task in plan.tasks])
    jobs: list[list[Task]] = []
    for job in plan.jobs:
        left = []
        for task in job:
            if unscored.get(task.key) == []:
                summary.found += 1
            elif isinstance(reason := failures.get(f"failures/{task.key}.json", {}).get("reason"), str):
                summary.failed[task.key] = reason
            else:
                left.append(task)
        if left:
            jobs.append(left)
    if jobs or plan.study.metrics.ordered:
        _Run(plan, store, jobs, summary, report).loop()
    return summary


def _whole(store: Store, tasks: Sequence[Task]) -> Results:
    """The results that there are; a damaged one is taken away, so that it is made again."""
    results = read_results(store, tasks)
    for key in results.faults.keys() - results.facts.keys():
        if store.has_result(key):  # else it may be under way to an object store
            store.discard(key)
    return results


def _unscored(results: Results, metrics: MetricsConfig) -> dict[str, list[str]]:
    """Of those that there are, by key, the metrics without scores."""
    return {key: missing_scores(results.scores.get(key, {}), metrics) for key in results.facts}


class _Run:
    """The state of a run: which worker is at which task of which job."""

    def __init__(self, plan: Plan, store: Store, jobs: list[list[Task]], summary: Summary, report: Report) -> None:
        self.plan, self.store, self.summary, self.report = plan, store, summary, report
        self.jobs = deque(deque(job) for job in jobs)
        self.places: dict[int, WorkerHandle] = {}
        self.busy: dict[Future[object], tuple[int, list[Task], list[deque[Task]]]] = {}
        self.deaths: Counter[str] = Counter()
        self.most = 1  # edits that a worker gets at once

    def loop(self) -> None:
        study = replace(self.plan.study, results=self.store.url)  # workers may be in another folder
        with open_workers(study) as (count, self.open):
            try:
                self.places[0] = self.open(0)
                self._prepare(count)
                for number in range(1, min(count, len(self.jobs))):
                    self._start(number)
                self._next(0)
                while any(tasks for _, tasks, _ in self.busy.values()) or (self.jobs and self.busy):
                    for future in wait(self.busy, return_when=FIRST_COMPLETED).done:
                        self._settle(future, *self.busy.pop(future))
                if self.jobs:
                    raise UserError("every worker died as it started: is there enough memory?")
                self._score_in_order()
            finally:
                for place in self.places.values():
                    place.close()

    def _prepare(self, count: int) -> None:
        """Load the first worker's models: which metrics can't be had, and how long it will take."""
        self.report("models", 0, 1, "")
        self._wait_for_room()
        self.summary.unavailable = self._ask("unavailable")
        self.store.write_json(f"{self.plan.study.name}/unavailable.json", self.summary.unavailable)
        self._leave_out_done()
        left = [task for job in self.jobs for task in job]
        self.work = _amortised(left)
        note = "nothing to edit"
        if edits := [task for task in left if task.config and not self.store.has_result(task.key)]:
            pace = self._ask("pace", edits[0])
            self.most = self._ask("most_at_once", edits[0])
            seconds = (pace or 0) * sum(_amortised(edits).values()) / min(count, len(self.jobs))
            how_long = f", {_duration(seconds)} at most if all drags take all their steps" if pace else ""
            note = f"{len(edits)} edits to do{how_long}"
        self.report("models", 1, 1, note)
        self.began, self.work_done = time.monotonic(), 0.0
        self._say()

    def _score_in_order(self) -> None:
        """Scores that depend on the order of the samples: those of a variant at once, in the order of their names."""
        plan = self.plan
        metrics = plan.study.metrics
        if not ("distance" in metrics.names and metrics.ordered) or "distance" in self.summary.unavailable:
            return
        runs = [(variant.name, seed) for variant in plan.variants for seed in plan.seeds(variant)]
        for number, (name, seed) in enumerate(runs):
            self.report("distance", number, len(runs), name)
            edits = [(subject, plan.keys[name, subject.name, seed]) for subject in plan.subjects]
            path, inputs = ordered_path(plan, name, seed), [key for _, key in edits if self.store.has_result(key)]
            if (self.store.read_json(path) or {}).get("inputs") != inputs:
                found = self._ask("distances_in_order", edits)
                self.store.write_json(path, {"inputs": inputs, "distances": found})
        self.report("distance", len(runs), len(runs), "")

    def _wait_for_room(self) -> None:
        """A cluster may have no room for the first worker yet."""
        ping = self.places[0].submit("ping")
        while not wait([ping], timeout=10).done:
            self.report("models", 0, 1, "waiting for room for a worker")
        self._answer(ping)

    def _ask(self, method: str, *arguments: Any) -> Any:
        waiting = {number for number, _, _ in self.busy.values()}
        number = next((number for number in self.places if number not in waiting), None)
        if number is None:
            number = max(self.places, default=0) + 1
            self.places[number] = self.open(number)
        return self._answer(self.places[number].submit(method, *arguments))

    @staticmethod
    def _answer(future: Future[Any]) -> Any:
        try:
            return future.result()
        except WorkerDied as error:
            raise UserError(f"a worker died as it started: {one_line(error)}") from error

    def _leave_out_done(self) -> None:
        """Where only scores are missing that can't be had, there is nothing to do."""
        if not self.summary.unavailable:
            return
        left = [task for job in self.jobs for task in job]
        unscored = _unscored(_whole(self.store, left), self.plan.study.metrics)
        for job in self.jobs:
            for task in list(job):
                if task.key in unscored and set(unscored[task.key]) <= set(self.summary.unavailable):
                    self.store.remove(f"failures/{task.key}.json")
                    job.remove(task)
                    self.summary.found += 1
        self.jobs = deque(job for job in self.jobs if job)

    def _start(self, number: int) -> None:
        """A worker that gets its first task once it is there: a cluster may have no room for it for a while."""
        self.places[number] = self.open(number)
        self.busy[self.places[number].submit("ping")] = (number, [], [])

    def _next(self, number: int) -> None:
        """Give a worker the next task of a job, and what can be edited with it, also of other jobs.

        Nobody else gets the rest of these jobs meanwhile: it needs what these tasks are about to compute.
        """
        if not self.jobs:
            return
        tasks, held, others = [self.jobs[0].popleft()], [self.jobs[0]], deque[deque[Task]]()
        self._take(tasks, self.jobs.popleft())
        for job in self.jobs:
            (held if self._take(tasks, job) else others).append(job)
        self.jobs = others
        self.busy[self.places[number].submit("run", tasks)] = (number, tasks, held)

    def _take(self, tasks: list[Task], job: deque[Task]) -> bool:
        """Move those of a job that can be edited with the tasks to them, as far as a worker gets so many; any?"""
        before = len(tasks)
        for task in list(job):
            if len(tasks) >= self.most or tasks[0].key in self.deaths:
                break
            if task.key not in self.deaths and task.batch_key == tasks[0].batch_key:
                job.remove(task)
                tasks.append(task)
        return len(tasks) > before

    def _settle(self, future: Future[Any], number: int, tasks: list[Task], held: list[deque[Task]]) -> None:
        """Note what became of tasks (none: the worker has started) and give the worker others."""
        try:
            outcomes = future.result()
        except WorkerDied as error:
            self._replace(number, tasks, held, error)
            return
        for task, outcome in zip(tasks, outcomes or [], strict=True):
            self._count(task, outcome)
        self.jobs.extendleft(job for job in reversed(held) if job)
        self._next(number)
        waiting = {number for number, _, _ in self.busy.values()}
        for idle in [number for number in self.places if number not in waiting]:  # what was held may be for them
            self._next(idle)

    def _replace(self, number: int, tasks: list[Task], held: list[deque[Task]], error: WorkerDied) -> None:
        """A new worker for one that died. A task that so many died of counts as failed; each is tried by itself."""
        attempts = self.plan.study.attempts
        causes = [task.key for task in tasks] or [f"start of worker {number}"]
        self.deaths.update(causes)
        hopeless = len(causes) == 1 and self.deaths[causes[0]] >= attempts
        if hopeless and tasks:
            reason = f"{self.deaths[causes[0]]} workers died over it: {one_line(error)}"
            record_failure(self.store, tasks[0], reason)
            self._count(tasks[0], Outcome(causes[0], failure=reason))
            tasks = []
        self.jobs.extendleft(job for job in reversed([deque(tasks), *held]) if job)
        self.places.pop(number).close()
        if self.jobs and not (hopeless and causes[0].startswith("start")):
            self._start(number)

    def _count(self, task: Task, outcome: Outcome) -> None:
        self.work_done += self.work[task.key]
        if outcome.failure:
            self.summary.failed[task.key] = outcome.failure
        else:
            self.summary.done += 1
        wanted = {metric_key(name, self.plan.study.metrics) for name in self.plan.study.metrics.names}
        for metric in sorted(wanted & outcome.scores.keys()) if task.config else ():
            for column, numbers in outcome.scores[metric].items():
                self.summary.values.setdefault(column, []).append(float(np.mean(numbers)))
        self._say()

    def _say(self) -> None:
        summary = self.summary
        settled = summary.found + summary.done + len(summary.failed)
        notes = [f"{len(summary.failed)} failed", f"{summary.total - settled} left"]
        if self.work_done >= 1:  # baselines tell no pace
            left = sum(self.work.values()) - self.work_done
            notes.append(f"about {_duration((time.monotonic() - self.began) / self.work_done * left)}")
        for column, values in [(name, summary.values[name]) for name in COLUMNS if name in summary.values][:2]:
            notes.append(f"{COLUMNS[column].label} {np.mean(values):.2f}")
        self.report("edits", settled, summary.total, ", ".join(notes))


# ------------------------------------------------------------------------------------------- what it takes

Work = dict[str, dict[object, tuple[float, list[str]]]]  # part -> what it is for -> forwards, keys of the tasks


def _work_of(tasks: Sequence[Task]) -> Work:
    """What is computed, in forwards of the denoiser, and for which tasks; parts that edits share are there once."""
    found: Work = {}

    def add(part: str, identity: object, forwards: float, key: str) -> None:
        entries = found.setdefault(part, {})
        before, keys = entries.get(identity, (0.0, []))
        entries[identity] = max(before, forwards), [*keys, key]

    for task in tasks:
        config = task.config
        if config is None:
            add("edit", task.key, 0.01, task.key)
            continue
        own, seed = 0.0, config.seed if task.lora_steps else None
        for stage in methods.find(config.method).stages(config):
            if not stage.shared_by:
                own += stage.forwards
                continue
            # one training gives the LoRAs of fewer steps, too
            unlike = "lora.steps" if stage.name == "LoRA" else ""
            shared = [
                (key, repr(value))
                for key, _, value in walk(config)
                if key.startswith(stage.shared_by) and key != unlike
            ]
            picture = (task.subject.name, repr(config.model), config.data.max_size, seed)
            add("source" if stage.name == "denoise" else stage.name, (picture, *shared), stage.forwards, task.key)
        add("edit", task.key, own, task.key)
    return found


def _amortised(tasks: Sequence[Task]) -> dict[str, float]:
    """About how many forwards each task takes at most; what several share is divided among them."""
    work = {task.key: 0.0 for task in tasks}
    for shared in _work_of(tasks).values():
        for forwards, keys in shared.values():
            for key in keys:
                work[key] += forwards / len(keys)
    return work


def _duration(seconds: float) -> str:
    """As a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe(plan: Plan) -> str:
    """What a study will do, in a few lines."""
    study, counts = plan.study, {part: len(shared) for part, shared in _work_of(plan.tasks).items()}
    baselines = sum(1 for variant in plan.variants if variant.baseline)
    lines = [
        f"study {study.name}: {study.question}".rstrip(": "),
        f"{len(plan.variants) - baselines} variants x {len(plan.subjects)} samples x {len(study.seeds)} seeds and "
        f"{baselines} baselines: {sum(1 for task in plan.tasks if task.config)} different edits",
        f"they share {counts.get('LoRA', 0)} trainings of a LoRA, {counts.get('inversion', 0)} inversions and "
        f"{counts.get('source', 0)} denoisings of a source",
    ]
    return "\n".join(lines)


def outcome(plan: Plan, summary: Summary) -> str:
    """What a run has done, in a few lines."""
    lines = [f"{summary.done} done now, {summary.found} found done, {len(summary.failed)} failed of {summary.total}"]
    names = {task.key: task.subject.name for task in plan.tasks}
    reasons = dict.fromkeys(f"failed: {names[key]}: {reason}" for key, reason in summary.failed.items())
    lines += [*list(reasons)[:SHOWN], *([f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else [])]
    lines += [f"not measured: {name}: {reason}" for name, reason in summary.unavailable.items()]
    return "\n".join(lines)
