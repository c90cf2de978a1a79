"""Runs of the web page's visitors: a queue, and the one worker process that has the model."""

from __future__ import annotations

import multiprocessing
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dragdiff import methods
from dragdiff.aliases import Json
from dragdiff.config import Config
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.methods.method import origin_stages, total_forwards
from dragdiff.ui.process import work
from dragdiff.ui.tasks import PageTask, too_long

ENDED = ("done", "failed", "cancelled")
WAY_SHOWN = 400  # handle positions that the page is told of; a longer way is thinned out
DIED = "the model's process ended ({}), most likely for want of memory: it starts again with the next run"
PATIENCE = 60.0  # s that a step may take to obey; then the model's process is ended


@dataclass(eq=False)
class Run:
    """One wish of a visitor, and what has become of it.

    Attributes:
        way: (step, each handle's (x, y) in px of the picture).
        previews: steps of which there is a preview.
        together: ids of the runs that one press of a button has made, this one included: the same drag by several
            methods.
        version: grows with each change.
    """

    kind: str
    config: Config
    request: Json
    folder: Path
    cache: Path
    sample: EditSample | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    status: str = "queued"
    message: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    way: list[tuple[int, list[list[float]]]] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)
    together: list[str] = field(default_factory=list)
    facts: Json = field(default_factory=dict)
    version: int = 0
    _stage_began: float = 0.0
    _pace: float = 0.0  # seconds for what costs as much as a forward

    def __post_init__(self) -> None:
        self.together = self.together or [self.id]
        edit = methods.find(self.config.method).stages
        self._forwards = total_forwards((origin_stages if self.kind == "generate" else edit)(self.config))

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status in ENDED

    def told(self, message: Json, now: float) -> None:
        """Take in one message of the worker."""
        if "stage" in message:
            if message["stage"] != self.stage or message["done"] == 0:
                self._stage_began = now
            self.stage, self.done, self.total, self.note = (message[key] for key in ("stage", "done", "total", "note"))
            done = self._forwards.get(self.stage, 0.0) * self.done / max(self.total, 1)
            if done >= 1 and self.note != "from the cache":  # what takes no time tells no pace
                self._pace = (now - self._stage_began) / done
        else:
            self.way.append((message["step"], message["handles"]))
            if message["preview"]:
                self.previews.append(message["step"])
            if len(self.way) > WAY_SHOWN:
                del self.way[1:-1:2]
        self.version += 1

    def seconds_left(self) -> float | None:
        """At the pace so far, if all steps are done; None while nothing is known."""
        names = list(self._forwards)
        if not self._pace or self.stage not in names:
            return None
        here = self._forwards[self.stage] * (1 - self.done / max(self.total, 1))
        return self._pace * (here + sum(self._forwards[name] for name in names[names.index(self.stage) + 1 :]))

    def as_json(self, ahead: int) -> Json:
        """What the page shows of it.

        Args:
            ahead: runs that come first.
        """
        left = self.seconds_left() if self.status == "running" else None
        keys = ("id", "kind", "status", "message", "stage", "done", "total", "note", "way", "previews", "together")
        return {key: getattr(self, key) for key in keys} | {
            "request": self.request,
            "facts": self.facts,
            "ahead": ahead,
            "stages": list(self._forwards),
            "secondsLeft": left if left is None else round(left, 1),
            "size": [self.sample.width, self.sample.height] if self.sample else None,
        }


class Queue:
    """First come, first served, by one worker process, which is started again should it end."""

    def __init__(self, *, threads: int = 0, minutes: float = 0.0) -> None:
        self.threads, self.minutes = threads, minutes
        self.choices: dict[str, dict[str, list[str]]] = {}  # of settings, by model.path, once it was loaded
        self._changed = threading.Condition()
        self._waiting: list[Run] = []
        self._running: Run | None = None
        self._load: Config | None = None
        self._closed = False
        self._context = multiprocessing.get_context("spawn")
        self._cancel, self._finish = self._context.Event(), self._context.Event()
        self._cancelled_at = 0.0
        self._process: Any = None
        self._connection: Any = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self, load: Config | None = None) -> None:
        """Begin to serve; the model of a config is loaded before the first run comes."""
        self._load = load
        self._thread.start()

    def close(self) -> None:
        """End the worker; what waits is not done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10)

    def add(self, *runs: Run, most: int, most_each: int) -> None:
        """Let a visitor's runs wait, all or none of them.

        Raises:
            UserError: too many wait.
        """
        with self._changed:
            if len(runs) > min(most, most_each):
                raise UserError(f"{len(runs)} runs at once are too many here: at most {min(most, most_each)} may wait")
            if sum(other.cache == runs[0].cache for other in self._waiting) + len(runs) > most_each:
                raise UserError(f"{most_each} of your runs may wait: let one begin, or cancel one")
            if len(self._waiting) + len(runs) > most:
                raise UserError(f"{most} runs may wait, and so many do: try again later")
            self._waiting += runs
            self._changed.notify_all()

    def ahead(self, run: Run) -> int:
        """How many runs come before this one, that in hand included."""
        with self._changed:
            if run not in self._waiting:
                return 0
            return self._waiting.index(run) + (self._running is not None)

    def cancel(self, run: Run) -> None:
        """Take it out of the queue, or end it within one step."""
        with self._changed:
            if run in self._waiting:
                self._waiting.remove(run)
                run.status = "cancelled"
                run.version += 1
            elif run is self._running and not self._cancel.is_set():
                self._cancelled_at = time.monotonic()
                self._cancel.set()

    def finish(self, run: Run) -> None:
        """End its drag and denoise what there is."""
        with self._changed:
            if run is self._running:
                self._finish.set()

    # ------------------------------------------------------------------------------- the serving thread

    def _serve(self) -> None:
        if self._load is not None:
            self._do(PageTask("load", self._load), None)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    break
                run = self._running = self._waiting.pop(0)
                self._cancel.clear()
                self._finish.clear()
                run.status = "running"
                run.version += 1
            outcome = self._do(PageTask(run.kind, run.config, run.sample, run.folder, run.cache, self.minutes), run)
            with self._changed:
                self._running = None
                run.facts = {key: value for key, value in outcome.items() if key not in ("status", "message")}
                run.message, run.status = outcome.get("message", ""), outcome["status"]
                run.version += 1
        self._end_worker()

    def _do(self, task: PageTask, run: Run | None) -> Json:
        try:
            self._ensure_worker()
            self._connection.send(task)
            began = time.monotonic()
            while True:
                while not self._connection.poll(0.5):
                    if outcome := self._given_up(time.monotonic() - began if run else 0.0):
                        self._end_worker()
                        return outcome
                message = self._connection.recv()
                if "status" in message:
                    return message
                if "choices" in message:
                    self.choices[task.config.model.path] = message["choices"]
                elif run is not None:
                    run.told(message, time.monotonic())
        except (EOFError, OSError):
            return {"status": "failed", "message": DIED.format(f"exit code {self._end_worker()}")}

    def _given_up(self, seconds: float) -> Json | None:
        """What becomes of a run that has taken so long and says nothing; None = wait on."""
        if self._closed or (self._cancel.is_set() and time.monotonic() - self._cancelled_at > PATIENCE):
            return {"status": "cancelled"}
        if self.minutes and seconds > 60 * self.minutes + PATIENCE:
            return {"status": "failed", "message": too_long(self.minutes)}
        return None

    def _ensure_worker(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        self._connection, theirs = self._context.Pipe()
        arguments = (theirs, self._cancel, self._finish, self.threads)
        process = self._context.Process(target=work, args=arguments, daemon=True)
        process.start()
        self._process = process
        theirs.close()

    def _end_worker(self) -> int | None:
        """Its exit code."""
        if self._process is None:
            return None
        self._connection.close()
        self._process.join(1)  # when idle, or with a code that says why
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code
