"""Reference-latent control: the edited picture's self-attention looks at the source (MasaCtrl, arXiv 2304.08465)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from einops import repeat
from torch import Tensor, nn

from dragdiff.errors import UserError


class _Steps:
    """Forwards of the network seen since the control was installed."""

    count = 0


class MutualSelfAttention:
    """Delegates to the processor that it wraps, with the source's hidden states as keys and values.

    Rows of a batch are [source, edited] within each guidance group; the source row sees itself and is unchanged.
    """

    def __init__(self, processor: Any, steps: _Steps, start_step: int) -> None:
        self.processor, self.steps, self.start_step = processor, steps, start_step

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None and self.steps.count > self.start_step:
            encoder_hidden_states = repeat(hidden_states[::2], "group ... -> (group row) ...", row=2)
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def layers_from(layers: Sequence[str], start: str) -> list[str]:
    """The self-attention layers from `start` on.

    Args:
        layers: names in execution order.
        start: a name or the beginning of one ("up_blocks.2"), or a number in execution order ("10").

    Raises:
        UserError: no such layer; says which there are.
    """
    if start.isdigit() and int(start) < len(layers):
        return list(layers[int(start) :])
    for index, name in enumerate(layers):
        if name == start or name.startswith(f"{start}."):
            return list(layers[index:])
    blocks = list(dict.fromkeys(name.split(".attentions")[0] for name in layers))
    raise UserError(
        f"control.start_layer is {start!r}: the model has self-attention in {', '.join(blocks)} "
        f"(or a number from 0 to {len(layers) - 1})"
    )


@contextmanager
def mutual_self_attention(network: nn.Module, layers: Sequence[str], *, start_step: int) -> Iterator[None]:
    """Install the control on the named self-attention layers; put the model back on leaving, also after an error.

    Args:
        network: the denoiser; its batch rows are [source, edited] (guidance 1), or the negative group's pair and then
            the positive group's.
        layers: names of self-attention modules (diffusers `Attention`).
        start_step: the first controlled forward of the network, counted from 0 inside this context.

    Raises:
        UserError: the model's attention projections are fused.
    """
    steps = _Steps()

    def count(*_: object) -> None:
        steps.count += 1

    modules = [network.get_submodule(name) for name in layers]
    if any(getattr(module, "fused_projections", False) for module in modules):
        raise UserError("the model's attention projections are fused: call unfuse_qkv_projections() before editing")
    originals: list[Any] = [module.processor for module in modules]
    counter = network.register_forward_pre_hook(count)
    try:
        for module, original in zip(modules, originals, strict=True):
            module.set_processor(MutualSelfAttention(original, steps, start_step))  # type: ignore[operator]
        yield
    finally:
        counter.remove()
        for module, original in zip(modules, originals, strict=True):
            module.set_processor(original)  # type: ignore[operator]
