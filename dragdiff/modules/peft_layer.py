"""peft's linear layer, computed faster."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn

from dragdiff.modules.compilation import is_plain
from dragdiff.modules.low_rank import can_merge, project


class MergedLinear(Linear):
    """peft's linear layer with its one adapter, computed by `project` where that may merge."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        (adapter,) = self.active_adapters
        layers: Any = self.lora_A[adapter], self.lora_B[adapter]
        down, up = (layer.weight[None] for layer in layers)
        plain = type(base) is nn.Linear and is_plain(base) and not args and not kwargs
        if plain and can_merge(x, base.weight, base.bias, down):
            return project(x, base.weight, base.bias, down, up, self.scaling[adapter])
        return super().forward(x, *args, **kwargs)
