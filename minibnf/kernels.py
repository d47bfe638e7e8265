"""Rotary turn and gated MLP, each with its gradient by hand: fewer passes over memory, and far less kept for backward.

PyTorch's autograd would keep every intermediate result. Here each function keeps its inputs alone, and makes the rest again,
element by element, when its gradient is asked for. Every step rounds as autograd's own would, so that no number changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minibnf.linear import product, weight_gradient


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of x (B, heads, S, d) by its position's angle; cos, sin (B, 1, S, d), the first half of
    sin negated. Its gradient is the turn back."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return _turn(g, *ctx.saved_tensors, -1), None, None


def _turn(x, cos, sin, direction):
    (a, b), (sin_a, sin_b) = x.chunk(2, -1), sin.chunk(2, -1)
    y = x * cos
    for half, other, s in zip(y.chunk(2, -1), (b, a), (sin_a, sin_b), strict=True):
        half.add_(other * s, alpha=direction)
    return y


def gated(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """(act(gate) * up) W^T + b, the end of a gated MLP: gate, up (..., I), W (D, I) -> (..., D); act GELU by tanh, or SiLU."""
    return _Gated.apply(gate, up, weight, bias, gelu)


class _Gated(torch.autograd.Function):
    """With h = act(gate) * up and g = dL/dy: dL/dh = g W, dL/dW = g^T h, dL/dup = dh act(gate), dL/dgate = dh up act'(gate)."""

    @staticmethod
    def forward(ctx, gate, up, weight, bias, gelu):
        ctx.save_for_backward(gate, up, weight)
        ctx.gelu = gelu
        return product(_act(gate, gelu).mul_(up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up, weight = ctx.saved_tensors
        _, _, for_weight, for_bias, _ = ctx.needs_input_grad
        a, dh, g_rows = _act(gate, ctx.gelu), product(g, weight.t()), g.flatten(0, -2)
        dweight = weight_gradient(g_rows, (a * up).flatten(0, -2)) if for_weight else None
        dgate = dh * up
        if ctx.gelu:
            dgate = torch.ops.aten.gelu_backward(dgate, gate, approximate="tanh")
        else:
            dgate = torch.ops.aten.silu_backward(dgate, gate)
        return dgate, dh.mul_(a), dweight, g_rows.sum(0) if for_bias else None, None


def _act(x, gelu):
    return F.gelu(x, approximate="tanh") if gelu else F.silu(x)
