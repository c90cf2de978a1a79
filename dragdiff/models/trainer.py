"""One way to run a LightningModule for a number of steps: quiet, on one device, with Ctrl-C left to the caller."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from dragdiff.aliases import Json

PRECISION = {"none": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


def fit(
    module: L.LightningModule,
    *,
    steps: int,
    device: torch.device,
    autocast: str,
    callbacks: Sequence[L.Callback] = (),
    logger: Logger | None = None,
    resume: Path | None = None,
    own_scaling: bool = False,
) -> None:
    """Train a module for at most `steps` optimiser steps.

    Args:
        module: its training step is called with the step's number.
        device: where to run.
        autocast: "none", "fp16" (with loss scaling) or "bf16".
        resume: a Lightning checkpoint to go on from.
        own_scaling: under fp16 the module scales its losses itself.

    Raises:
        KeyboardInterrupt: on Ctrl-C, as anywhere else in Python (Lightning alone would end the process).
    """
    # a loader of its own generator draws no number from the global one
    data: Any = DataLoader(range(steps), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]
    precision: Json = {"precision": PRECISION[autocast]}
    plugins: list[Any] = [LightningEnvironment()]  # one process, also where a cluster's scheduler started it
    if own_scaling and autocast == "fp16":
        plugins.append(MixedPrecision("16-mixed", device.type, GradScaler(enabled=False)))
        precision = {}
    with _quiet(), _own_interrupt():
        trainer = L.Trainer(
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            plugins=plugins,
            **precision,
            max_steps=steps,
            callbacks=list(callbacks),
            logger=logger or False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=resume)


def of_run(number: int, name: str, count: int) -> str:
    """A value's name in a Trainer that serves `count` runs: `shared_logger` takes it to the run of that number."""
    return name if count == 1 else f"{number}:{name}"


class _SplitLogger(Logger):
    """Takes values named by `of_run` to the logger of their run, with what is common to all."""

    name, version = "split", 0

    def __init__(self, loggers: Sequence[Logger | None]) -> None:
        super().__init__()
        self.loggers = loggers

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        common = {name: value for name, value in metrics.items() if ":" not in name}  # the epoch
        for number, logger in enumerate(self.loggers):
            start = f"{number}:"
            own = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
            if logger is not None and own:
                logger.log_metrics({**own, **common}, step)

    def save(self) -> None:
        for logger in self.loggers:
            if logger is not None:
                logger.save()

    def finalize(self, status: str) -> None:
        for logger in self.loggers:
            if logger is not None:
                logger.finalize(status)

    def log_hyperparams(self, *_: object) -> None:
        """Nothing: a run's settings are given to its own logger."""


def shared_logger(loggers: Sequence[Logger | None]) -> Logger | None:
    """What a Trainer tells that serves so many runs."""
    if all(logger is None for logger in loggers):
        return None
    return loggers[0] if len(loggers) == 1 else _SplitLogger(loggers)


class Recording(Logger):
    """Keeps what it is told for a logger that is opened later: W&B has one run in a process at a time."""

    name, version = "recording", 0

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep them."""
        self._calls.append(("log_metrics", (dict(metrics), step), {}))

    def log_image(self, *args: object, **kwargs: object) -> None:
        """Keep it, for a logger that takes pictures."""
        self._calls.append(("log_image", args, kwargs))

    def log_hyperparams(self, *_: object) -> None:
        """Nothing: the settings are given to the other logger."""

    def clear(self) -> None:
        """Forget: what was told begins anew."""
        self._calls.clear()

    def replay(self, logger: object) -> None:
        """Tell it all to another logger."""
        for name, args, kwargs in self._calls:
            if hasattr(logger, name):
                getattr(logger, name)(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes: on workers, logging intervals, checkpoint folders, products."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Lightning answers Ctrl-C by ignoring further ones and ending the process; undo both."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
