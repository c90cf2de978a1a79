"""Self-attention that is recorded, or that takes keys and values from a record (MasaCtrl, arXiv 2304.08465).

For networks whose attention modules have diffusers' processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dragdiff.backbones.compilation import eager
from dragdiff.backbones.diffusion import States
from dragdiff.errors import UserError


class DelegatingAttention:
    """Delegates self-attention to the processor that it wraps; keys and values come from what `source` says.

    Attributes:
        source: told the hidden states (rows, tokens, channels) that enter; gives those in whose place, or None.
    """

    def __init__(self, processor: Any, source: Callable[[Tensor], Tensor | None]) -> None:
        self.processor, self.source = processor, source

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if encoder_hidden_states is None:
            encoder_hidden_states = self.source(hidden_states)
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kw)


@contextmanager
def recorded(network: nn.Module, layers: Sequence[str]) -> Iterator[States]:
    """What enters the named self-attention layers in the network's forward inside this context.

    Raises:
        UserError: as `mutual_self_attention`.
    """
    states: States = {}

    def note(name: str, hidden: Tensor) -> None:
        states[name] = hidden

    with _processors(network, layers, note):
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

    def source(name: str, hidden: Tensor) -> Tensor | None:
        theirs = states.get(name)
        if theirs is None or where is None or all(where):
            return theirs
        shared = torch.tensor(where, device=hidden.device).repeat(len(hidden) // len(where))
        return torch.where(shared[:, None, None], theirs, hidden)

    with _processors(network, layers, source):
        yield


@contextmanager
def _processors(
    network: nn.Module, layers: Sequence[str], source: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    modules = [network.get_submodule(name) for name in layers]
    if any(getattr(module, "fused_projections", False) for module in modules):
        raise UserError("the model's attention projections are fused: call unfuse_qkv_projections() before editing")
    originals: list[Any] = [module.processor for module in modules]
    try:
        for name, module, original in zip(layers, modules, originals, strict=True):
            module.set_processor(DelegatingAttention(original, partial(source, name)))  # type: ignore[operator]
        with eager(network):
            yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.set_processor(original)  # type: ignore[operator]
