"""The LoRA as it was on the way: files and a checkpoint to go on from, or a copy at given steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import lightning as L

from dragdiff.backbones import lora_file
from dragdiff.modules.lora import LoRA


class LoRACheckpoint(L.Callback):
    """Writes `step-NNNN/pytorch_lora_weights.safetensors` every N steps from 0 on, and `last.ckpt` to go on from.

    The checkpoint holds the LoRA, its optimiser's state and the settings of the run, nothing of the network.
    """

    def __init__(self, current: Callable[[], LoRA], folder: Path, *, every: int) -> None:
        self.current, self.folder, self.every = current, folder, every

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._save_lora(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        if trainer.global_step % self.every == 0:
            self._save_lora(trainer)
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def _save_lora(self, trainer: L.Trainer) -> None:
        lora_file.save(self.current(), self.folder / f"step-{trainer.global_step:04d}")


class LoRASnapshots(L.Callback):
    """Calls `keep` with each of the given numbers of steps once it is done."""

    def __init__(self, at: Collection[int], keep: Callable[[int], None]) -> None:
        self.at, self.keep = at, keep

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        if trainer.global_step in self.at:
            self.keep(trainer.global_step)
