"""Self-attention that is recorded, or that takes keys and values from a record (MasaCtrl, arXiv 2304.08465).

For networks whose attention modules have diffusers' processors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dragdiff.backbones.compilation import eager
from dragdiff.backbones.diffusion import States
from dragdiff.errors import UserError


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


class MutualSelfAttention:
    """Delegates to the processor that it wraps, with the source's hidden states as keys and values."""

    def __init__(self, processor: Any, name: str, states: States, where: Sequence[bool] | None) -> None:
        self.processor, self.name, self.states, self.where = processor, name, states, where

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if encoder_hidden_states is None and self.name in self.states:
            encoder_hidden_states = self.states[self.name]
            if self.where is not None and not all(self.where):
                shared = torch.tensor(self.where, device=hidden_states.device).repeat(
                    len(hidden_states) // len(self.where)
                )
                encoder_hidden_states = torch.where(shared[:, None, None], encoder_hidden_states, hidden_states)
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kw)


@contextmanager
def recorded(network: nn.Module, layers: Sequence[str]) -> Iterator[States]:
    """What enters the named self-attention layers in the network's forward inside this context.

    Raises:
        UserError: as `mutual_self_attention`.
    """
    states: States = {}
    with _processors(network, layers, lambda original, name: RecordedAttention(original, name, states)):
        yield states


@contextmanager
def mutual_self_attention(
    network: nn.Module, layers: Sequence[str], states: States, *, where: Sequence[bool] | None = None
) -> Iterator[None]:
    """Let the named self-attention layers look at the source; put the model back on leaving, also after an error.

    Args:
        network: the denoiser; its batch has the rows that the source's had (with guidance: negative, positive).
        layers: names of self-attention modules (diffusers `Attention`).
        states: of the source at the same timestep, from `recorded`; a layer that is not in them sees itself.
        where: as for `Diffusion.shared_attention`.

    Raises:
        UserError: the model's attention projections are fused.
    """
    with _processors(network, layers, lambda original, name: MutualSelfAttention(original, name, states, where)):
        yield


@contextmanager
def _processors(network: nn.Module, layers: Sequence[str], wrapped: Any) -> Iterator[None]:
    modules = [network.get_submodule(name) for name in layers]
    if any(getattr(module, "fused_projections", False) for module in modules):
        raise UserError("the model's attention projections are fused: call unfuse_qkv_projections() before editing")
    originals: list[Any] = [module.processor for module in modules]
    try:
        for name, module, original in zip(layers, modules, originals, strict=True):
            module.set_processor(wrapped(original, name))  # type: ignore[operator]
        with eager(network):
            yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.set_processor(original)  # type: ignore[operator]
