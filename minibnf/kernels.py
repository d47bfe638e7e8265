"""Faster ways to do what model.py and logprob.py say: products, rotation, the gated MLP, compiling.

Products. On a CPU PyTorch multiplies float32 matrices by MKL, which keeps AMD's processors to
narrow instructions. oneDNN, which PyTorch ships too and uses for bfloat16, does not: on an AMD EPYC
with AVX-512 it took 0.4 to 0.5 of MKL's time from 500 rows on, and 0.7 to 0.8 at 32. On an Intel
Xeon MKL is the faster one: oneDNN reaches 0.91 to 0.98 of its speed, and 0.73 to 0.88 where
weights' gradients are made. So the processor's maker decides (a timing would decide otherwise when
a run is resumed). Matrices smaller than LARGE would gain too; they are left to MKL so that
weights/tiny, which was pretrained so, can be made again bit for bit.

Rotation and MLP, each with its gradient by hand. PyTorch's autograd would keep every intermediate
result. Here each function keeps only its inputs, and makes the rest again, element by element,
when its gradient is asked for. Every step rounds as autograd's own would, so no number changes.

Compiling. A GPU does element-wise work as fast as it can read, and starts kernels no faster than a
Python program asks for them. torch.compile makes few kernels of many: of a function that is marked
`fused`, once compile_by() named a compiler. The result is the same but for rounding.
"""

import platform
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE = 100_000  # weights
_backend: str | Callable | None = None  # of torch.compile
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fastest_library() -> str:
    """What multiplies float32 matrices fastest on this CPU: "oneDNN", or PyTorch's own choice."""
    cpuinfo = Path("/proc/cpuinfo")
    maker = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    if ONEDNN and "AuthenticAMD" in maker:
        return "oneDNN"
    return "MKL" if torch.backends.mkl.is_available() else "PyTorch"  # on ARM there is no MKL


_library = fastest_library()


def multiply_by(library: str) -> None:
    """From now on this library multiplies float32 matrices of LARGE on a CPU."""
    global _library
    _library = library


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), with gradients in all three."""
    if not _by_onednn(x, weight.numel()):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without gradients; x and weight may be transposed views."""
    return _onednn(x, weight, bias) if _by_onednn(x, weight.numel()) else F.linear(x, weight, bias)


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g^T x (out, in), of g (rows, out) and x (rows, in)."""
    return _onednn(g.t(), x.t(), None) if _by_onednn(x, g.shape[1] * x.shape[1]) else g.t() @ x


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out = x W^T without gradients. out may be wider than x and W: a GPU then rounds nothing."""
    if x.is_cuda and out.dtype != x.dtype:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    elif x.is_cuda:
        torch.mm(x, weight.t(), out=out)
    else:
        out.copy_(product(x, weight))


def add_weight_gradient(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total += g^T x; total may be wider than g and x. A GPU does it without a second matrix."""
    if g.is_cuda and total.dtype != g.dtype:
        torch.addmm(total, g.t(), x, out_dtype=total.dtype, out=total)
    elif g.is_cuda:
        total.addmm_(g.t(), x)
    else:
        total += weight_gradient(g, x)


def kind(x: Tensor) -> str:
    """ "cpu" or, wherever else x is, "cuda"."""
    return "cpu" if x.device.type == "cpu" else "cuda"


def blocks(unembed: Tensor) -> list[slice]:
    """The vocabulary's rows in blocks of 8 MiB, which stay in a CPU's cache; a GPU takes it whole.

    unembed (V, D).
    """
    V, D = unembed.shape
    size = max(256, 2**21 // D) if kind(unembed) == "cpu" else V
    return [slice(v, v + size) for v in range(0, V, size)]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, weights: int) -> bool:
    """One row alone reads the weights at memory's speed, whichever library does."""
    return (
        _library == "oneDNN"
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and weights >= LARGE
        and x.numel() > x.shape[-1]
    )


class _Linear(torch.autograd.Function):
    """y = x W^T + b: dL/dx = g W, dL/dW = g^T x, dL/db = the sum of g's rows, g = dL/dy."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows, g_rows = x.flatten(0, -2), g.flatten(0, -2)
        dx = product(g, weight.t()) if for_x else None
        dweight = weight_gradient(g_rows, rows) if for_weight else None
        return dx, dweight, g_rows.sum(0) if for_bias else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) of x (B, heads, S, d) by its position's angle.

    cos, sin: (B, 1, S, d), the first half of sin negated.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The gradient is rotated back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return _rotated(g, *ctx.saved_tensors, -1), None, None


def _rotated(x, cos, sin, direction):
    (a, b), (sin_a, sin_b) = x.chunk(2, -1), sin.chunk(2, -1)
    y = x * cos
    first, second = y.chunk(2, -1)
    first.add_(b * sin_a, alpha=direction)
    second.add_(a * sin_b, alpha=direction)
    return y


def gated(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """(act(gate) * up) W^T + b, the end of a gated MLP, act GELU by tanh or SiLU.

    gate, up (..., I), W (D, I), b (D,) or None -> (..., D).
    """
    return _Gated.apply(gate, up, weight, bias, gelu)


class _Gated(torch.autograd.Function):
    """y = h W^T + b with h = act(gate) * up.

    With g = dL/dy: dL/dh = g W, dL/dW = g^T h, dL/dup = dh act(gate), dL/dgate = dh up act'(gate).
    """

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


def compile_by(backend: str | Callable | None, trial: Callable | None = None) -> str:
    """From now on a backend of torch.compile makes what is `fused`; None: it runs as written.

    If trial() then fails, it runs as written again. Returns why it failed, in a line, or "".
    """
    global _backend
    _backend = backend
    # a number such as a soft cap is a constant of the graph: flex_attention takes no other
    torch._dynamo.config.specialize_float = True
    try:
        if trial is not None:
            trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may fail in any way, and none is needed
        _backend = None
        # PyTorch's own first line says that a backend failed, and the next one why
        return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])
    return ""


def compiling() -> bool:
    """Whether what is `fused` is compiled."""
    return _backend is not None


def fused(function: Callable) -> Callable:
    """Decorates a function that is to be few kernels, once compile_by() named a compiler.

    One graph serves all sizes (dynamic), and it must be one (fullgraph): what cannot be compiled
    raises an error instead of running slowly in silence.
    """

    @cache
    def made(backend: str | Callable) -> Callable:
        return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    @wraps(function)
    def call(*args):
        return (made(_backend) if compiling() else function)(*args)

    return call
