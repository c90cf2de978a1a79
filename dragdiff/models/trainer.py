"""One way to run a LightningModule for a number of steps: quiet, on one device, with Ctrl-C left to the caller."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

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
) -> None:
    """Train a module for at most `steps` optimiser steps.

    Args:
        module: its training step is called with the step's number.
        device: where to run.
        autocast: "none", "fp16" (with loss scaling) or "bf16".
        resume: a Lightning checkpoint to go on from.

    Raises:
        KeyboardInterrupt: on Ctrl-C, as anywhere else in Python (Lightning alone would end the process).
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module="lightning"
        )  # workers, logging interval, checkpoint folder: none applies
        trainer = L.Trainer(
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision=PRECISION[autocast],  # type: ignore[arg-type]
            max_steps=steps,
            callbacks=list(callbacks),
            logger=logger or False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, DataLoader(range(steps), batch_size=None), ckpt_path=resume)  # type: ignore[arg-type]
        except SystemExit as error:
            raise KeyboardInterrupt from error
        finally:
            if main_thread:
                signal.signal(signal.SIGINT, handler)
