"""A network whose repeated blocks are compiled, once its gradient was compared with what it was before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dragdiff.errors import one_line

COMPILED = "_compiled_call_impl"  # where torch keeps a module's compiled call
# |difference| / |eager| of the gradient: compiled code rounds fused operations once. Where a gradient is lost (inductor
# on a CPU, of the input of an up block) the distance is of its own size.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Compilation:
    """Compiled calls of a network's blocks, kept from edit to edit."""

    def __init__(self, network: Any, gradient: Callable[[], Tensor], **options: Any) -> None:
        """Args: a diffusers model; the gradient of its output by its latent; options of `torch.compile`."""
        self.network, self.gradient, self.options = network, gradient, options
        self._calls: dict[nn.Module, Any] | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """The network with its blocks compiled; as it was on leaving. Where nothing can be compiled, or the gradient
        differs, a warning says so and the network stays as it is."""
        from torch._dynamo import config  # takes a second

        with config.patch(cache_size_limit=64):  # kinds of a block's code: width, gradient, LoRA
            if self._calls is None:
                self._calls = self._trusted()
            before = {module: vars(module).get(COMPILED) for module in self._calls}
            try:
                _set(self._calls)
                yield
            finally:
                _set(before)

    def _trusted(self) -> dict[nn.Module, Any]:
        expected = self.gradient()
        before = {module: vars(module).get(COMPILED) for module in self.network.modules()}
        try:
            self.network.compile_repeated_blocks(**self.options)
            found = self.gradient()
            error = float((found - expected).float().norm() / expected.float().norm())
            if error <= TOLERANCE[self.network.dtype]:
                return {module: vars(module)[COMPILED] for module in before if vars(module).get(COMPILED)}
            reason = f"the compiled network's gradient is off by {error:.2g} of its size"
        except torch.OutOfMemoryError:  # no fault of the compiler
            raise
        except Exception as error:  # a compiler's errors have no common base
            reason = f"the network can't be compiled here ({one_line(error)})"
        finally:
            _set(before)
        warnings.warn(f"model.compile: {reason}: it stays as it is, which is slower", stacklevel=2)
        return {}


def _set(calls: dict[nn.Module, Any]) -> None:
    for module, call in calls.items():
        vars(module).pop(COMPILED, None)
        if call is not None:
            vars(module)[COMPILED] = call


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """While it lasts, nothing of the network runs compiled: its attention, or its layers, are changed for a while."""
    calls = {module: vars(module).pop(COMPILED, None) for module in network.modules()}
    try:
        yield
    finally:
        _set(calls)
