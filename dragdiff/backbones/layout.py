"""The names of a network's parts: those that a UNet's configuration tells before it is built, and before what builds it
is imported; and choosing from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dragdiff.errors import UserError

DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]  # diffusers' own defaults, where a configuration is silent
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
ATTENTION = ("CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class Structure:
    """The parts of a model that settings name; attributes as of `Diffusion`."""

    feature_strides: Mapping[str, int]
    self_attention_layers: Sequence[str]


def structure_of(unet: Mapping[str, Any]) -> Structure:
    """The blocks of a UNet, in execution order.

    Args:
        unet: what its `config.json` holds (diffusers' `UNet2DConditionModel`).

    Raises:
        TypeError, ValueError: it describes none.
    """
    down, up = list(unet.get("down_block_types", DOWN)), list(unet.get("up_block_types", UP))
    if not down or len(down) != len(up):
        raise ValueError(f"{len(down)} blocks down and {len(up)} up")
    layers = _each(unet.get("layers_per_block", 2), len(down))
    depths = _each(unet.get("transformer_layers_per_block", 1), len(down))
    up_depths = unet.get("reverse_transformer_layers_per_block") or depths[::-1]
    last = len(down) - 1
    blocks = [(f"down_blocks.{n}", kind, layers[n], depths[n], 2 ** min(n + 1, last)) for n, kind in enumerate(down)]
    blocks.append(("mid_block", unet.get("mid_block_type", ATTENTION[1]), 1, depths[-1], 2**last))
    for n, kind in enumerate(up):
        blocks.append((f"up_blocks.{n}", kind, layers[last - n] + 1, up_depths[n], 2 ** max(last - n - 1, 0)))
    attention = [
        f"{name}.attentions.{layer}.transformer_blocks.{depth}.attn1"
        for name, kind, count, depth_of, _ in blocks
        if kind in ATTENTION
        for layer in range(count)
        for depth in range(depth_of if isinstance(depth_of, int) else depth_of[layer])
    ]
    return Structure({name: stride for name, _, _, _, stride in blocks}, attention)


def _each(value: Any, count: int) -> list[Any]:
    """A value for each block, of one for all or a list."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} blocks")
    return values


def layers_from(layers: Sequence[str], start: str) -> list[str]:
    """The self-attention layers from `start` on.

    Args:
        layers: names in execution order.
        start: a name or the beginning of one, or a number in execution order ("10").

    Raises:
        UserError: no such layer; says which there are.
    """
    if start.isdigit() and int(start) < len(layers):
        return list(layers[int(start) :])
    for index, name in enumerate(layers):
        if name == start or name.startswith(f"{start}."):
            return list(layers[index:])
    raise UserError(
        f"control.start_layer is {start!r}: the model has self-attention in {', '.join(blocks_of(layers))} "
        f"(or a number from 0 to {len(layers) - 1})"
    )


def blocks_of(layers: Sequence[str]) -> list[str]:
    """The blocks in which layers are, by name."""
    return list(dict.fromkeys(name.partition(".attentions")[0] for name in layers))
