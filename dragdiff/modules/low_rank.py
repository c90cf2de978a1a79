"""A linear projection with a low-rank update, in the time of the projection alone."""

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

    Where it can be, the update is added to the weight and not to the output, which is larger: what is computed beside
    the product is then as small as the weight, or of the update's rank. Elsewhere the weight's precision would not
    hold the update, or a compiler fuses what is added.

    Args:
        inputs: (rows, ..., in).
        weight, bias: (out, in) and (out,).
        down, up: (P, rank, in) and (P, out, rank).
        scale: (P, 1, 1), or one for all.

    Returns:
        (rows, ..., out), with gradients by the inputs, `down` and `up`; by weight and bias if the weight wants one.
    """
    if can_merge(inputs, weight, down):
        return _Merged.apply(inputs, weight, bias, down, up, scale)
    output = F.linear(inputs, weight, bias)
    update = (_by_picture(inputs, len(down)).to(down.dtype) @ down.mT @ up.mT) * scale
    return output + _by_row(update, inputs).to(output.dtype)


def can_merge(inputs: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether the update may be added to the weight: all is computed in the precision of the update."""
    return (
        inputs.dtype == weight.dtype == down.dtype
        and not torch.is_autocast_enabled(inputs.device.type)
        and not (weight.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


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
            return F.linear(inputs, merged[0], bias)
        output = _by_row(_by_picture(inputs, len(merged)) @ merged.mT, inputs)
        return output if bias is None else output.add_(bias)

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
