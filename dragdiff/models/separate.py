"""An optimiser, and under fp16 a loss scaler, for each of several runs that share a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch.amp import GradScaler


def own_scalers(trainer: L.Trainer, count: int) -> list[GradScaler]:
    """A loss scaler for each of `count` runs, like the Trainer's, in its place; where it has none they do nothing.

    With one for all, a gradient that overflows in one run would hold back the others, too.
    """
    plugin: Any = trainer.precision_plugin
    scaling = getattr(plugin, "scaler", None) is not None
    if scaling:
        plugin.scaler = GradScaler(enabled=False)
    return [GradScaler(trainer.strategy.root_device.type, enabled=scaling) for _ in range(count)]


class Separate(torch.optim.Optimizer):
    """Steps the optimiser of each run by itself, one with a gradient that overflowed not at all, as by torch's loss
    scaling; runs without gradients are left alone.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], scalers: Sequence[GradScaler]) -> None:
        """
        Args:
            optimizers: one for each run.
            scalers: what scaled each run's loss.
        """
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.pairs = list(zip(optimizers, scalers, strict=True))
        for optimizer in optimizers:
            optimizer.state = self.state  # where a Trainer looks, to free a GPU at its end

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, scaler in self.pairs:
            if any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"]):
                scaler.step(optimizer)
                scaler.update()
        return loss
