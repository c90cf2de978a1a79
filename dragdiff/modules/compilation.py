"""A network whose repeated blocks are compiled, each compared with itself as it stands before it is trusted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dragdiff.errors import one_line
from dragdiff.modules.attention import RecordedAttention

Call = Callable[..., Tensor]

# How far compiled and eager may be apart, |difference| / |eager|. Compiled code computes fused operations in float32
# and rounds their result alone, so that a block is apart by some roundings of its dtype: one of SD 1.5's by 4e-4 in
# float16 and 3e-3 in bfloat16 (torch 2.13, CPU). Float32's rounding is that of TF32, which products on CUDA may use.
# Where a gradient is lost the distance is of the gradient's size.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
VARIANTS = 64  # compiled for a kind of block before it stays eager: sizes, with and without gradients; torch's own is 8


class Compilation:
    """Compiles the blocks that a diffusers model names as repeated (`compile_repeated_blocks`): they share their code,
    which keeps the start short.

    A block is compiled anew for each kind of call: shapes, precision, what wants a gradient. The first call of a kind
    runs it both ways and compares output and gradients; by the chain rule equal blocks make equal networks. If they
    differ, or nothing can be compiled here, a warning says so and all blocks stay eager from then on.

    Compiled code is torch's to keep, by a block's class: it is there for the next edit, and for the next model, too.

    Attributes:
        enabled: False runs all blocks as they are.
    """

    def __init__(self, compiler: Callable[[Call], Call] | None = None) -> None:
        """
        Args:
            compiler: makes the compiled function of a block's forward; None = `torch.compile`.
        """
        self.enabled = True
        self._compiler = compiler or torch.compile
        self._compiled: dict[nn.Module, Call] = {}
        self._trusted: set[tuple[Any, ...]] = set()

    @contextmanager
    def of(self, network: Any) -> Iterator[None]:
        """The network with its blocks compiled; put back on leaving."""
        from torch._dynamo import config  # takes a second

        blocks = [module for module in network.modules() if type(module).__name__ in network._repeated_blocks]
        key = "_compiled_call_impl"  # what `nn.Module.compile` sets
        before = [{key: vars(block)[key]} if key in vars(block) else {} for block in blocks]
        try:
            for block in blocks:
                vars(block)[key] = partial(self._call, block)
            with config.patch(cache_size_limit=VARIANTS):
                yield
        finally:
            for block, values in zip(blocks, before, strict=True):
                vars(block).pop(key, None)
                vars(block).update(values)

    @contextmanager
    def off(self) -> Iterator[None]:
        """All blocks as they are, for a while."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def _call(self, block: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.enabled and is_plain(block):
            try:
                return self._compiled_call(block, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler's errors have no common base; the block's own come again below
                self._give_up(f"blocks of the network can't be compiled here ({one_line(error)})")
        return block._call_impl(*args, **kwargs)

    def _compiled_call(self, block: Any, *args: Any, **kwargs: Any) -> Tensor:
        if block not in self._compiled:
            self._compiled[block] = self._compiler(block.forward)
        compiled = self._compiled[block]
        if (kind := kind_of_call(block, args, kwargs)) not in self._trusted:
            error, allowed = difference(compiled, block.forward, list(block.parameters()), args, kwargs)
            if math.isnan(error):  # the block's own is not finite, which says nothing of later calls
                return block.forward(*args, **kwargs)
            if error > allowed:
                self._give_up(f"a compiled block's output or gradient is off by {error:.2g} of its size")
                return block.forward(*args, **kwargs)
            self._trusted.add(kind)
        return compiled(*args, **kwargs)

    def _give_up(self, reason: str) -> None:
        self.enabled = False
        warnings.warn(f"model.compile: {reason}: the network stays as it is, which is slower", stacklevel=1)


def is_plain(block: nn.Module) -> bool:
    """Whether it is what its class says: no hooks, no replaced forward (compiled code would not see them come and go),
    no attention that looks elsewhere.
    """
    return not any(
        module._forward_hooks
        or "forward" in vars(module)
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or isinstance(getattr(module, "processor", None), RecordedAttention)
        for module in block.modules()
    )


def kind_of_call(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the compiled code of a block depends on, values of tensors apart."""

    def described(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad

    return (
        block,
        tuple(described(value) for value in args),
        tuple((name, described(value)) for name, value in kwargs.items()),
        tuple((weight.dtype, weight.requires_grad) for weight in block.parameters()),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        _autocast(args),
    )


def _autocast(args: Sequence[Any]) -> torch.dtype | None:
    """The dtype of mixed precision, if it is on for the device of these."""
    devices = [value.device.type for value in args if isinstance(value, Tensor)][:1]
    return next((torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)), None)


def difference(
    compiled: Call, eager: Call, weights: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[float, float]:
    """How far the output, the gradient by an input or that by the weights are apart at most, and how far they may be.

    Returns:
        (the largest `relative_error`, NaN if one is NaN; that of `TOLERANCE` for the precision of the call).
    """
    expected = differentiated(eager, weights, args, kwargs)
    found = differentiated(compiled, weights, args, kwargs)
    allowed = TOLERANCE.get(_autocast(args) or expected[0].dtype, TOLERANCE[torch.float32])
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors), allowed


def differentiated(
    call: Call, weights: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """The output of a call, its gradient by each input that wants one, and by all weights that want one in a row.

    The gradients are of the output's product with fixed noise; zero where the output does not depend on a thing. The
    inputs' own graph, and `.grad`, are left alone.
    """

    def fresh(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    args, kwargs = [fresh(value) for value in args], {name: fresh(value) for name, value in kwargs.items()}
    output = call(*args, **kwargs)
    if not torch.is_grad_enabled():
        return [output]
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
    weights = [weight for weight in weights if weight.requires_grad]
    gradients: Sequence[Tensor] = [torch.zeros_like(value) for value in (*inputs, *weights)]
    if output.requires_grad and gradients:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        gradients = torch.autograd.grad(output, [*inputs, *weights], noise, materialize_grads=True)
    by_weights = [gradient.float().flatten() for gradient in gradients[len(inputs) :]]
    return [output.detach(), *gradients[: len(inputs)], *([torch.cat(by_weights)] if by_weights else [])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm; 0 where they are equal, NaN where what is expected is not
    finite, infinite where only the other is not."""
    if not torch.isfinite(expected).all():
        return math.nan
    if not torch.isfinite(found).all():
        return math.inf
    distance = (found.float() - expected.float()).norm()
    return float(distance / expected.float().norm()) if distance != 0 else 0.0
