"""Where tasks run: in this process, in one process for each GPU, or in Ray actors. Each keeps its model loaded."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from dragdiff.config import StudyConfig
from dragdiff.errors import UserError, one_line

ANSWER = 5.0  # s for a cluster to answer


class WorkerDied(Exception):
    """A worker's process or machine is gone, and with it what it was doing."""


class DeviceLost(UserError):
    """A GPU answers every call with an error; until the process that has it ends, nothing can be done there."""


class Place(Protocol):
    """A worker, wherever it is."""

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the `Worker`; the future raises `WorkerDied` where it is gone."""

    def close(self) -> None:
        """End it."""


@contextmanager
def open_places(study: StudyConfig) -> Iterator[tuple[int, Callable[[int], Place]]]:
    """How many workers the study has, and what makes the one of a number (again, should it have died).

    Raises:
        UserError: no Ray, or no cluster at its address.
    """
    if study.executor == "ray":
        with _cluster(study) as room:
            yield room
        return
    import torch

    gpus = torch.cuda.device_count()
    count = study.workers or max(1, gpus)
    if count == 1 and not gpus:  # a GPU that fails takes its process with it
        yield 1, lambda number: Here(study)
    else:
        own = gpus and "auto" in (study.settings.get("model.device", "auto"), study.metrics.distance.device)
        yield count, lambda number: Process(study, f"cuda:{number % gpus}" if own else "")


class Here:
    """In this process, at once."""

    def __init__(self, study: StudyConfig) -> None:
        from dragdiff.study.worker import Worker

        self._worker = Worker(study)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self._worker, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Process:
    """In a process of its own on this machine."""

    def __init__(self, study: StudyConfig, device: str) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(study, device)
        )

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        try:
            return _translated(self._pool.submit(_call, method, *arguments), BrokenProcessPool, DeviceLost)
        except BrokenProcessPool as error:
            dead: Future[Any] = Future()
            dead.set_exception(_died(error))
            return dead

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


_worker: Any = None  # of a worker's process


def _start(study: StudyConfig, device: str) -> None:
    global _worker
    from dragdiff.study.worker import Worker

    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(study, device)


def _end_with_parent() -> None:
    """A parent that is killed can't end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_worker, method)(*arguments)


def _died(error: BaseException) -> WorkerDied:
    lost = isinstance(error, DeviceLost)
    return WorkerDied(one_line(error) if lost else f"killed, or out of memory: {one_line(error)}")


def _translated(future: Future[Any], *death: type[BaseException]) -> Future[Any]:
    """The same, with a worker that is dead, or of no more use, told from a failed call."""
    told: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        if done.cancelled():
            told.cancel()
            return
        error = done.exception()
        if isinstance(error, death):
            told.set_exception(_died(error))
        elif error is not None:
            told.set_exception(error)
        else:
            told.set_result(done.result())

    future.add_done_callback(tell)
    return told


# ------------------------------------------------------------------------------------------- Ray


@contextmanager
def _cluster(study: StudyConfig) -> Iterator[tuple[int, Callable[[int], Place]]]:
    try:
        import ray
    except ImportError as error:
        raise UserError("executor is 'ray', which is not installed: pip install 'dragdiff[ray]'") from error
    started = not ray.is_initialized()
    if started:
        _connect(study)
    try:
        room = ray.cluster_resources()
        gpus = int(room.get("GPU", 0))
        slots = max(1, gpus or int(room.get("CPU", 1)))
        yield min(study.workers or max(1, gpus), slots), lambda number: RayActor(study, gpus > 0)
    finally:
        if started:
            ray.shutdown()


def _connect(study: StudyConfig) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if study.address:
            if ":" in study.address:  # Ray itself would wait for minutes
                host, port = study.address.removeprefix("ray://").rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=ANSWER).close()
            ray.init(address=study.address, **quiet)
        else:
            # nobody else can reach it; Ray would write a token into the home folder
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            cpus = max(study.workers, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # OSError, ValueError, RuntimeError, ...
        raise UserError(
            f"no Ray cluster at address={study.address!r} ({one_line(error)}): start one with `ray start --head`, "
            "or leave address empty to run on this machine"
        ) from error


class RayActor:
    """In an actor on some node of a Ray cluster, with a GPU of its own where there are any."""

    def __init__(self, study: StudyConfig, on_gpu: bool) -> None:
        import ray

        from dragdiff.study.worker import Worker

        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if on_gpu else 0)
        self._actor: Any = actor.remote(study, "cuda" if on_gpu else "")

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

        future = _cause(getattr(self._actor, method).remote(*arguments).future(), RayTaskError)
        return _translated(future, ActorDiedError, ActorUnavailableError, RayActorError, DeviceLost)

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


def _cause(future: Future[Any], wrapper: type[BaseException]) -> Future[Any]:
    """The same, raising what was raised in the actor."""
    bare: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            bare.set_result(done.result())
        else:
            bare.set_exception(getattr(error, "cause", None) or error if isinstance(error, wrapper) else error)

    future.add_done_callback(tell)
    return bare
