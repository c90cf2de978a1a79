"""Experiment tracking: none, CSV files or W&B, one run for each edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragdiff.config import Config
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

METHOD = "dragdiffusion"


@contextmanager
def open_logger(config: Config, *, name: str, folder: Path) -> Iterator[Logger | None]:
    """The logger that the config names, closed on leaving, so that two runs in one process are two W&B runs.

    Args:
        name: the run's name.
        folder: where CSV files and W&B's local files go.

    Raises:
        UserError: W&B is not logged in or does not answer.
    """
    settings = config.logger
    if settings.kind == "none":
        yield None
    elif settings.kind == "csv":
        from lightning.pytorch.loggers import CSVLogger

        logger = CSVLogger(folder, name="", version="log")
        yield logger
        logger.finalize("success")
    else:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        model = Path(config.model.path).name
        try:
            run = wandb.init(
                project=settings.project,
                name=name,
                dir=folder,
                group=settings.group or f"{METHOD}-{model}",
                tags=[METHOD, model, *settings.tags],
                config=dataclasses.asdict(config),
                mode="offline" if settings.offline else "online",
                reinit="finish_previous",
                settings=wandb.Settings(silent=True),
            )
        except Exception as error:  # W&B raises its own errors, and whatever the network raises
            raise UserError(
                f"W&B did not start: {str(error).splitlines()[0]}; run `wandb login`, or set logger.offline=true "
                "or logger.kind=none"
            ) from error
        try:
            yield WandbLogger(experiment=run)
        finally:
            run.finish()


def log_result(logger: Any, comparison: Any, metrics: dict[str, Any]) -> None:
    """Send an edit's final picture and numbers to W&B; other loggers have had all of theirs."""
    if hasattr(logger, "log_image"):
        logger.log_image("comparison", [comparison])
        after = [point["distance_after_px"] for point in metrics["points"]]
        logger.experiment.summary.update(
            {
                "distance_px": sum(after) / len(after),
                "steps": metrics["steps"],
                "stop_reason": metrics["stop_reason"],
            }
            | {f"seconds/{stage}": seconds for stage, seconds in metrics["seconds"].items()}
        )
