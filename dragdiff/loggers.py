"""Experiment tracking: none, CSV files or W&B, one run for each edit."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragdiff import methods
from dragdiff.aliases import Json
from dragdiff.config import Config, LoggerConfig
from dragdiff.errors import UserError, one_line

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from PIL.Image import Image
    from wandb import Run

WANDB_TAG = 64  # characters that W&B allows
MENDING = "run `wandb login`, or set logger.offline=true or logger.kind=none"


def check_login(settings: LoggerConfig) -> None:
    """Find out before any work whether W&B will take the run.

    Raises:
        UserError: W&B is to be online, and nobody is logged in or it does not answer.
    """
    mode = "offline" if settings.offline else os.environ.get("WANDB_MODE", "online")
    if settings.kind != "wandb" or mode != "online":
        return
    import wandb

    with environment(WANDB_SILENT="true"), _starting():
        if not wandb.login(prompt=False):
            raise UserError(f"logger.kind is 'wandb', but nobody is logged in to W&B: {MENDING}")


@contextmanager
def open_logger(config: Config, *, name: str, folder: Path) -> Iterator[Logger | None]:
    """The logger that the config names, closed on leaving, so that two runs in one process are two W&B runs.

    Args:
        name: the run's name.
        folder: where CSV files (`log/metrics.csv`) and W&B's local files (`wandb/`) go.

    Raises:
        UserError: W&B does not start.
    """
    if config.logger.kind == "none":
        yield None
    elif config.logger.kind == "csv":
        from lightning.pytorch.loggers import CSVLogger

        logger = CSVLogger(folder, name="", version="log")
        try:
            yield logger
        finally:
            logger.save()
    else:
        tags = wandb_tags(config)
        with wandb_run(
            config.logger,
            folder,
            name=name,
            group=config.logger.group or "-".join(tags),
            tags=[*tags, *config.logger.tags],
            config=dataclasses.asdict(config),
        ) as run:
            yield _tolerant_logger(run)


def wandb_tags(config: Config) -> list[str]:
    """Method and model."""
    return [methods.find(config.method).name, Path(config.model.path).name[:WANDB_TAG]]


@contextmanager
def wandb_run(
    settings: LoggerConfig, folder: Path, *, timeouts: Mapping[str, Any] | None = None, **arguments: Any
) -> Iterator[Run]:
    """A W&B run, finished on leaving.

    Args:
        folder: W&B's local files go to `wandb/` in it.
        timeouts: W&B's `init_timeout` and `finish_timeout`, seconds, where they are not W&B's own.
        arguments: as of `wandb.init`.

    Raises:
        UserError: W&B does not start.
        TimeoutError: all is not sent within the `finish_timeout`.
    """
    import wandb

    with environment():
        with _starting():
            # not WandbLogger(offline=True), which would set WANDB_MODE for the whole process
            run = wandb.init(
                project=settings.project,
                dir=folder,
                mode="offline" if settings.offline else None,
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, finish_timeout_raises=True, **(timeouts or {})),
                **arguments,
            )
        try:
            yield run
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for a while, and afterwards all as before: W&B leaves some of its own."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # W&B's own, and whatever the network raises
        raise UserError(f"W&B did not start: {one_line(error)}; {MENDING}") from error


def _tolerant_logger(run: Run) -> Logger:
    """A W&B logger that lets an edit go on when W&B fails under way."""
    from lightning.pytorch.loggers import WandbLogger

    class Tolerant(WandbLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().log_metrics(*args, **kwargs)
            except Exception as error:
                warnings.warn(f"W&B lost something, the edit goes on: {error}", stacklevel=2)

    return Tolerant(experiment=run)


def log_result(logger: Logger | None, comparison: Image, metrics: Json) -> None:
    """Send an edit's final picture and numbers to W&B; other loggers have had all of theirs.

    Args:
        comparison: as of `output.comparison`.
        metrics: as of `output.metrics`.
    """
    from lightning.pytorch.loggers import WandbLogger

    if isinstance(logger, WandbLogger):
        logger.log_image("comparison", [comparison])
        logger.log_metrics({"steps": metrics["steps"]})
        if after := [point["distance_after_px"] for point in metrics["points"] if "distance_after_px" in point]:
            logger.log_metrics({"distance_px": sum(after) / len(after)})
        logger.log_metrics({f"seconds/{stage}": seconds for stage, seconds in metrics["seconds"].items()})
        logger.experiment.summary["stop_reason"] = metrics["stop_reason"]
