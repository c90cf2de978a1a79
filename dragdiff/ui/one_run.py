"""One task of the web page through `Editor`. Imports torch: only the worker's process does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image

from dragdiff import output
from dragdiff.backbones.diffusion import Diffusion
from dragdiff.backbones.layout import blocks_of
from dragdiff.callbacks import DragCallback
from dragdiff.editor import OneModel, enough_memory
from dragdiff.errors import UserError
from dragdiff.models.point_drag import Drag
from dragdiff.modules.features import FeatureMap
from dragdiff.ui.tasks import Cancelled, PageTask, too_long


class FinishOnRequest(DragCallback):
    """Ends the drag where the person says that it is good as it is."""

    def __init__(self, finish: Event) -> None:
        self.finish = finish

    def on_features(self, trainer: L.Trainer, drag: Drag, features: FeatureMap) -> None:
        if self.finish.is_set():
            drag.stop("stopped")


def choices(backbone: Diffusion) -> dict[str, list[str]]:
    """What may be chosen for settings that name something of the model, by key."""
    return {
        "drag.features": list(backbone.feature_strides),
        "control.start_layer": blocks_of(backbone.self_attention_layers),
    }


class Runner:
    """Runs tasks on one loaded model."""

    def __init__(self, send: Callable[[dict[str, Any]], None], cancel: Event, finish: Event, threads: int) -> None:
        """
        Args:
            send: told where a task is: {"stage", "done", "total", "note"} or {"step", "handles", "preview"}; and, once
                its model is there, what settings may be with it: {"choices"}.
            cancel, finish, threads: as for `process.work`.
        """
        self.send, self.cancel, self.finish = send, cancel, finish
        self._model = OneModel()
        if threads:
            torch.set_num_threads(threads)

    def run(self, task: PageTask) -> dict[str, Any]:
        """
        Returns:
            Facts about the result, as plain values.

        Raises:
            Cancelled: within one step of the wish.
            UserError: says what is wrong.
        """
        ends = time.monotonic() + 60 * task.minutes if task.minutes else float("inf")

        def report(stage: str, done: int, total: int, note: str) -> None:
            if self.cancel.is_set():
                raise Cancelled
            if time.monotonic() > ends:
                raise UserError(too_long(task.minutes))
            self.send({"stage": stage, "done": done, "total": total, "note": note})

        config = dataclasses.replace(task.config, cache=dataclasses.replace(task.config.cache, folder=str(task.cache)))
        with enough_memory():
            report("model", 0, 1, "")
            editor = self._model.editor(config if task.kind != "load" else task.config, report=report)
            report("model", 1, 1, "")
            self.send({"choices": choices(editor.backbone)})
            if task.kind == "generate":
                picture, _ = editor.generate(config.prompt)
                Image.fromarray(picture).save(task.folder / "generated.png")
                return {}
            if task.sample is None:
                return {}

            def watch(step: int, handles: np.ndarray, preview: np.ndarray | None) -> None:
                if preview is not None:
                    Image.fromarray(preview).save(task.folder / f"preview-{step:04d}.png")
                self.send({"step": step, "handles": handles.round(1).tolist(), "preview": preview is not None})

            result = editor.edit_and_save(
                task.sample, task.folder, callbacks=[FinishOnRequest(self.finish)], watch=watch
            )
        return output.metrics(result)
