"""Where tasks run: in this process, in one process for each GPU, or in Ray actors. Each keeps its model loaded."""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from dragdiff.config import StudyConfig
from dragdiff.errors import DeviceLost, UserError, WorkerDied, one_line

if TYPE_CHECKING:
    from dragdiff.study.worker import Worker

ANSWER = 5.0  # s for a cluster to answer


class WorkerHandle(Protocol):
    """A worker, wherever it is."""

    def submit(self, method: str, *arguments: object) -> Future[object]:
        """Call a method of the `Worker`.

        Returns:
            What it returns; raises what it raises, or `WorkerDied` where the worker is gone or has lost its GPU.
        """

    def close(self) -> None:
        """End it, also amid a task."""


@contextmanager
def open_workers(study: StudyConfig) -> Iterator[tuple[int, Callable[[int], WorkerHandle]]]:
    """The workers of a study, where its `executor` says.

    Yields:
        How many there are, and what makes the one of a number (again, should it have died).

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
        yield 1, lambda number: InProcess(study)
    else:
        own = gpus and "auto" in (study.settings.get("model.device", "auto"), study.metrics.distance.device)
        yield count, lambda number: SubProcess(study, f"cuda:{number % gpus}" if own else "")


class InProcess:
    """In this process, at once."""

    def __init__(self, study: StudyConfig) -> None:
        from dragdiff.study.worker import Worker

        self._worker = Worker(study)

    def submit(self, method: str, *arguments: object) -> Future[object]:
        """Call a method of the worker; it is done when this returns."""
        future: Future[object] = Future()
        try:
            future.set_result(getattr(self._worker, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing is to be ended: the worker goes with this process."""


class SubProcess:
    """In a process of its own on this machine."""

    def __init__(self, study: StudyConfig, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        theirs, self._lifeline = spawn.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start, initargs=(study, device, theirs))

    def submit(self, method: str, *arguments: object) -> Future[object]:
        """Call a method of the worker, after those called before."""
        try:
            return _translated(self._pool.submit(_call, method, *arguments), BrokenProcessPool, DeviceLost)
        except BrokenProcessPool as error:
            dead: Future[object] = Future()
            dead.set_exception(_died(error))
            return dead

    def close(self) -> None:
        """End the process at once; what it was to do is cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._lifeline.close()


_worker: Worker | None = None  # of a worker's process


def _start(study: StudyConfig, device: str, lifeline: multiprocessing.connection.Connection) -> None:
    global _worker
    threading.Thread(target=_end_with, args=[lifeline], daemon=True).start()
    from dragdiff.study.worker import Worker  # torch, diffusers: seconds

    _worker = Worker(study, device)


def _end_with(lifeline: multiprocessing.connection.Connection) -> None:
    """End this process, whatever it is at, once the other end is closed, as it also is where its parent is killed."""
    multiprocessing.connection.wait([lifeline])
    os.kill(os.getpid(), 9)  # SIGKILL, which has no name on Windows


def _call(method: str, *arguments: object) -> object:
    return getattr(_worker, method)(*arguments)


def _died(error: BaseException) -> WorkerDied:
    lost = isinstance(error, DeviceLost)
    return WorkerDied(one_line(error) if lost else f"killed, or out of memory: {one_line(error)}")


def _translated(
    future: Future[object], *death: type[BaseException], wrapper: type[BaseException] | None = None
) -> Future[object]:
    """The same, with a worker that is dead, or of no more use, told from a failed call.

    Args:
        wrapper: an exception whose `cause` was raised in the worker.
    """
    told: Future[object] = Future()

    def tell(done: Future[object]) -> None:
        if done.cancelled():
            told.cancel()
            return
        error = done.exception()
        if wrapper and isinstance(error, wrapper):
            error = getattr(error, "cause", None) or error
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
def _cluster(study: StudyConfig) -> Iterator[tuple[int, Callable[[int], WorkerHandle]]]:
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

    try:
        if study.address:
            if ":" in study.address:  # Ray itself would wait for minutes
                host, port = study.address.removeprefix("ray://").rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=ANSWER).close()
            ray.init(address=study.address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # nobody else can reach it; Ray would write a token into the home folder
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            cpus = max(study.workers, os.cpu_count() or 1)
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
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

    def submit(self, method: str, *arguments: object) -> Future[object]:
        """Call a method of the actor, after those called before."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

        future = getattr(self._actor, method).remote(*arguments).future()
        death = (ActorDiedError, ActorUnavailableError, RayActorError, DeviceLost)
        return _translated(future, *death, wrapper=RayTaskError)

    def close(self) -> None:
        """End the actor at once, for good."""
        import ray

        ray.kill(self._actor)
