"""A linear projection with a low-rank update, in little more than the time of the projection alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable


def project(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Tensor | float
) -> Tensor:
    """Each row's product with weight + scale * up @ down of its picture, plus the bias: row r is of picture r % P.

    Args:
        inputs: (rows, ..., in).
        weight, bias: (out, in) and (out,).
        down, up: (P, rank, in) and (P, out, rank).
        scale: (P, 1, 1), or one for all.

    Returns:
        (rows, ..., out), with gradients by all but the scale; where it merges, by the inputs, `down` and `up`.
    """
    if can_merge(inputs, weight, bias, down):
        return _Merged.apply(inputs, weight.detach(), bias, down, up, scale)
    return updated(F.linear(inputs, weight, bias), inputs, down, up, scale)


def updated(output: Tensor, inputs: Tensor, down: Tensor, up: Tensor, scale: Tensor | float) -> Tensor:
    """A projection's output with the update added to it; arguments as for `project`."""
    update = (_by_picture(inputs, len(down)).to(down.dtype) @ down.mT @ up.mT) * scale
    return output + _by_row(update, inputs).to(output.dtype)


def can_merge(inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor) -> bool:
    """Whether the update is better added to the weight than to the output, and may be: for many rows the output is
    larger; all must be computed in the update's precision, which a weight in a lower one would not hold; a compiler
    fuses what is added to the output.
    """
    rows = inputs.numel() // inputs.shape[-1] // len(down)
    learns = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (weight, bias))
    return (
        rows * sum(weight.shape) >= weight.numel()  # as many operations for the one as for the other
        and inputs.dtype == weight.dtype == down.dtype
        and _full_precision()
        and not torch.is_autocast_enabled(inputs.device.type)
        and not learns
        and not torch.compiler.is_compiling()
    )


def _full_precision() -> bool:
    """Whether products of float32 are computed in float32, not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by backend, of which this can't tell
        return False


class _Merged(torch.autograd.Function):
    """`project` with the update in the weight. The gradient of the sum of both, as large as the weight, is never made:
    by down it is (up^T g^T) x, by up g^T (x down^T), for the gradient g of the output and inputs x.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Tensor | float
    ) -> Tensor:
        learns = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(inputs if learns else None, weight, down, up)
        ctx.scale = scale
        merged = _merged(weight, down, up, scale)
        if len(merged) == 1:
            output = F.linear(inputs, merged[0], bias)
        else:
            output = _by_row(_by_picture(inputs, len(merged)) @ merged.mT, inputs)
            output = output if bias is None else output.add_(bias)
        # no view, which autograd would forbid others to change in place
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, down, up = ctx.saved_tensors
        grouped = _by_picture(gradient, len(down))
        by_inputs = by_down = by_up = None
        if ctx.needs_input_grad[0]:
            by_inputs = _by_row(grouped @ _merged(weight, down, up, ctx.scale), gradient)
        if inputs is not None:
            x = _by_picture(inputs, len(down))
            by_down = (grouped @ (up * ctx.scale)).mT @ x
            by_up = (grouped.mT @ (x @ down.mT)) * ctx.scale
        return by_inputs, None, None, by_down, by_up, None


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor | float) -> Tensor:
    """(P, out, in)."""
    return torch.baddbmm(weight, up * scale, down)


def _by_picture(values: Tensor, count: int) -> Tensor:
    """(rows, ..., width) as (P, everything of its rows, width); a view of those of a single picture."""
    return rearrange(values, "(b p) ... c -> p (b ...) c", p=count)


def _by_row(values: Tensor, like: Tensor) -> Tensor:
    """The way back, to (rows, ..., width) as of another."""
    return rearrange(values, "p (b n) c -> (b p) n c", b=len(like) // len(values)).reshape(*like.shape[:-1], -1)
