"""x W^T + b, by the faster of PyTorch's two CPU libraries.

On a CPU PyTorch multiplies float32 matrices by MKL, which keeps AMD's processors to narrow instructions; oneDNN, which
PyTorch uses for bfloat16, ships with it too and multiplies float32 as fast as the processor can. On an AMD EPYC with AVX-512
it took 0.4 to 0.5 of MKL's time from 500 rows on, and 0.7 to 0.8 at 32. Smaller matrices than LARGE would gain too; they are
left to MKL so that weights/tiny, which was pretrained so, can be made again bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 100_000  # weights
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), with gradients in all three."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias) if _by_onednn(x, weight.numel()) else F.linear(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without gradients; x and weight may be transposed views."""
    return _onednn(x, weight, bias) if _by_onednn(x, weight.numel()) else F.linear(x, weight, bias)


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g^T x (out, in), of g (rows, out) and x (rows, in)."""
    return _onednn(g.t(), x.t(), None) if _by_onednn(x, g.shape[1] * x.shape[1]) else g.t() @ x


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, weights: int) -> bool:
    """One row alone reads the weights at memory's speed, whichever library does."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and weights >= LARGE and x.numel() > x.shape[-1]


class _Linear(torch.autograd.Function):
    """y = x W^T + b: dL/dx = g W, dL/dW = g^T x, dL/db = the sum of g's rows, g = dL/dy."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows, g_rows = x.flatten(0, -2), g.flatten(0, -2)
        dx = product(g, weight.t()) if for_x else None
        dweight = weight_gradient(g_rows, rows) if for_weight else None
        return dx, dweight, g_rows.sum(0) if for_bias else None
