"""Reference-latent control: the edited picture's self-attention looks at the source (MasaCtrl, arXiv 2304.08465)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dragdiff.errors import UserError

States = dict[str, Tensor]
"""Hidden states (rows, tokens, channels) that enter self-attention layers, by the layers' names."""


class RecordedAttention:
    """Delegates to the processor that it wraps; notes the hidden states from which keys and values come."""

    def __init__(self, processor: Any, name: str, states: States) -> None:
        self.processor, self.name, self.states = processor, name, states

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if encoder_hidden_states is None:
            self.states[self.name] = hidden_states
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kw)


class MutualSelfAttention(RecordedAttention):
    """Delegates to the processor that it wraps, with the source's hidden states as keys and values."""

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if encoder_hidden_states is None:
            encoder_hidden_states = self.states.get(self.name)
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kw)


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
def recorded(network: nn.Module, layers: Sequence[str]) -> Iterator[States]:
    """What enters the named self-attention layers in the network's forward inside this context.

    Raises:
        UserError: as `mutual_self_attention`.
    """
    states: States = {}
    with _processors(network, layers, RecordedAttention, states):
        yield states


@contextmanager
def mutual_self_attention(network: nn.Module, layers: Sequence[str], states: States) -> Iterator[None]:
    """Let the named self-attention layers look at the source; put the model back on leaving, also after an error.

    Args:
        network: the denoiser; its batch has the rows that the source's had (with guidance: negative, positive).
        layers: names of self-attention modules (diffusers `Attention`).
        states: of the source at the same timestep, from `recorded`; a layer that is not in them sees itself.

    Raises:
        UserError: the model's attention projections are fused.
    """
    with _processors(network, layers, MutualSelfAttention, states):
        yield


@contextmanager
def _processors(
    network: nn.Module, layers: Sequence[str], wrapper: type[RecordedAttention], states: States
) -> Iterator[None]:
    modules = [network.get_submodule(name) for name in layers]
    if any(getattr(module, "fused_projections", False) for module in modules):
        raise UserError("the model's attention projections are fused: call unfuse_qkv_projections() before editing")
    originals: list[Any] = [module.processor for module in modules]
    try:
        for name, module, original in zip(layers, modules, originals, strict=True):
            module.set_processor(wrapper(original, name, states))  # type: ignore[operator]
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.set_processor(original)  # type: ignore[operator]
