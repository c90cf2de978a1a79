"""An optimiser, and under fp16 a loss scaler, for each of several runs that share a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler


class Separate(torch.optim.Optimizer):
    """Steps the optimiser of each run by itself, under `scaling` (fp16) one with a gradient that overflowed not at all,
    as by torch's loss scaling; runs without gradients are left alone.

    With one scaler for all, a gradient that overflows in one run would hold back the others, too.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, scaling: bool) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        device = self.param_groups[0]["params"][0].device.type
        self.runs = [(optimizer, GradScaler(device, enabled=scaling)) for optimizer in optimizers]
        for optimizer in optimizers:
            optimizer.state = self.state  # where a Trainer looks, to free a GPU at its end

    def scaled(self, losses: dict[int, Tensor]) -> Tensor:
        """The sum of the losses of some runs, by number, each scaled as its run's gradient will be unscaled."""
        scaled = [self.runs[number][1].scale(loss) for number, loss in losses.items()]
        return torch.stack(scaled).sum() if len(scaled) > 1 else scaled[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every run that has gradients; as of torch's optimisers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, scaler in self.runs:
            if any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"]):
                scaler.step(optimizer)
                scaler.update()
        return loss
