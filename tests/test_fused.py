"""Rotation and gated MLP: gradients by hand against autograd through the plain expressions, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minibnf import kernels as linear
from minibnf.kernels import gated, rotate


def plain_rotation(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([b, a], -1) * sin


def plain_gated(gate, up, weight, bias, gelu):
    return F.linear((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up, weight, bias)


def tensors(seed, dtype, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def cases(seed, dtype, rows, n, flag):
    """(function by hand, plain one, the leaves, what else they take) of each of the two."""
    q, angle = tensors(seed, dtype, (2, 3, rows, 2 * n), (2, 1, rows, n))
    cos, sin = (
        torch.cat([angle.cos()] * 2, -1).detach(),
        torch.cat([-angle.sin(), angle.sin()], -1).detach(),
    )
    gate, up, weight, bias = tensors(seed, dtype, (2, rows, n), (2, rows, n), (5, n), (5,))
    return [
        (rotate, plain_rotation, (q,), (cos, sin)),
        (
            gated,
            plain_gated,
            (gate, up, weight, bias) if flag else (gate, up, weight),
            (flag,) if flag else (None, flag),
        ),
    ]


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), n=st.integers(1, 6), flag=st.booleans())
def test_values_and_gradients_are_autograds(seed, rows, n, flag):
    for ours, plain, leaves, rest in cases(seed, torch.float64, rows, n, flag):
        found, expected = ours(*leaves, *rest), plain(*leaves, *rest)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        g = torch.randn(
            found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        pairs = zip(*(torch.autograd.grad(y, leaves, g) for y in (found, expected)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_are_finite_differences():
    for flag in (False, True):
        for ours, _, leaves, rest in cases(1, torch.float64, 3, 4, flag):
            assert torch.autograd.gradcheck(lambda *x, f=ours, r=rest: f(*x, *r), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype, monkeypatch):
    """The products by oneDNN too."""
    monkeypatch.setattr(linear, "LARGE", 0)
    for flag in (False, True):
        for ours, plain, leaves, rest in cases(2, torch.float64, 7, 8, flag):
            low = [x.detach().to(dtype).requires_grad_() for x in leaves]
            rest_low = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in rest]
            y = ours(*low, *rest_low)
            assert y.dtype == dtype
            exact = plain(*leaves, *rest)
            close = (
                {"rtol": 0.05, "atol": 0.15}
                if dtype == torch.bfloat16
                else {"rtol": 1e-4, "atol": 1e-5}
            )
            torch.testing.assert_close(y.double(), exact, **close)
            g = torch.ones_like(y)
            for leaf, a, b in zip(
                low,
                torch.autograd.grad(y, low, g),
                torch.autograd.grad(exact, leaves, g.double()),
                strict=True,
            ):
                assert a.dtype == leaf.dtype
                torch.testing.assert_close(a.double(), b, **close)


def test_a_frozen_weight_costs_no_gradient():
    for flag in (False, True):
        for ours, _, leaves, rest in cases(3, torch.float64, 2, 4, flag):
            only = [leaves[0], *(x.detach() for x in leaves[1:])]
            (found,) = torch.autograd.grad(ours(*only, *rest).sum(), only[:1])
            (whole, *_) = torch.autograd.grad(ours(*leaves, *rest).sum(), leaves)
            torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_only_what_backward_cannot_remake_is_kept():
    """What a gated MLP and a rotation save for backward: their inputs, and of x nothing."""
    kept = []
    x, gate, up = (torch.randn(16, 8, requires_grad=True) for _ in range(3))
    w = torch.randn(4, 8, requires_grad=True)
    cos, sin = torch.ones(16, 8), torch.zeros(16, 8)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        rotate(x, cos, sin)
        gated(gate, up, w, None, False)
    assert sorted(kept) == sorted(t.data_ptr() for t in (cos, sin, gate, up, w))
