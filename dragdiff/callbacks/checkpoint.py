"""The LoRA as it was on the way: files and a checkpoint to go on from, or a copy at given steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import lightning as L
from torch import nn

from dragdiff.modules import lora


class LoRACheckpoint(L.Callback):
    """Writes `step-NNNN/pytorch_lora_weights.safetensors` every N steps from 0 on, and `last.ckpt` to go on from.

    The checkpoint holds the LoRA, its optimiser's state and the settings of the run, nothing of the network.
    """

    def __init__(self, network: nn.Module, folder: Path, *, every: int, scale: float) -> None:
        """
        Args:
            network: with LoRA layers injected.
            folder: where the files go.
            every: steps between files.
            scale: alpha / rank.
        """
        self.network, self.folder, self.every, self.scale = network, folder, every, scale

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._save_lora(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        if trainer.global_step % self.every == 0:
            self._save_lora(trainer)
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def _save_lora(self, trainer: L.Trainer) -> None:
        weights = lora.extract(lora.parameters(self.network), scale=self.scale)
        lora.save(weights, self.folder / f"step-{trainer.global_step:04d}")


class LoRASnapshots(L.Callback):
    """Hands over a copy of the LoRA after each of the given steps."""

    def __init__(
        self, network: nn.Module, at: Collection[int], keep: Callable[[int, lora.LoRA], None], *, scale: float
    ) -> None:
        """
        Args:
            network: with LoRA layers injected.
            at: steps done.
            keep: called with the steps done and the LoRA.
            scale: alpha / rank.
        """
        self.network, self.at, self.keep, self.scale = network, at, keep, scale

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        if trainer.global_step in self.at:
            self.keep(trainer.global_step, lora.extract(lora.parameters(self.network), scale=self.scale))
