"""RMSNorm, rotary turn and gated MLP, each with its gradient by hand: fewer passes over memory, and far less kept for backward.

PyTorch's autograd would keep every intermediate result: of SmolLM2-135M in float32, 1.6 MB a token. Here each function keeps
its inputs alone, and makes the rest again, element by element, when its gradient is asked for: 1.1 MB.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minibnf.linear import product


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    """x̂ * weight, x̂ = x / sqrt(mean(x²) + eps), x (..., D), weight (D,), the statistics in float32 or wider; the result in x's
    dtype. Gemma multiplies by 1 + weight, and does so before it rounds."""
    return _RMSNorm.apply(x, weight, eps, gemma)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps), x̂ = r x, w the factor and g = dL/dy:
    dr/dx_j = -r³ x_j / D, so dL/dx = r (g w - x̂ mean(g w x̂)), and dL/dw = the sum over rows of g x̂."""

    @staticmethod
    def forward(ctx, x, weight, eps, gemma):
        wide = x if x.dtype == torch.float64 else x.float()
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.gemma = gemma
        if gemma:
            return (wide * r).mul_(1 + weight.to(r.dtype)).to(x.dtype)
        return (wide * r).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        g = g.to(r.dtype)
        normed = x.to(r.dtype) * r
        dweight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        gw = g * (weight.to(r.dtype) + 1 if ctx.gemma else weight.to(r.dtype))
        mean = torch.linalg.vecdot(gw, normed)[..., None].div_(x.shape[-1])
        return gw.addcmul_(normed, mean, value=-1).mul_(r).to(x.dtype), dweight, None, None


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
        half.addcmul_(other, s, value=direction)
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
        dweight = product(g_rows.t(), (a * up).flatten(0, -2).t()) if for_weight else None
        dgate = dh * up
        if ctx.gelu:
            dgate = torch.ops.aten.gelu_backward(dgate, gate, approximate="tanh")
        else:
            dgate = torch.ops.aten.silu_backward(dgate, gate)
        return dgate, dh.mul_(a), dweight, g_rows.sum(0) if for_bias else None, None


def _act(x, gelu):
    return F.gelu(x, approximate="tanh") if gelu else F.silu(x)
