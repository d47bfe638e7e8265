"""The product by oneDNN against the plain one in float64: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minibnf import kernels as module
from minibnf.kernels import linear
from tests.strategies import FEW

SHAPES = st.sampled_from([(2,), (7,), (1, 5), (2, 3), (1, 1)])


@FEW
@given(
    shape=SHAPES,
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_float64(shape, n_in, n_out, bias, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, b = (torch.randn(*s, generator=g) for s in ((*shape, n_in), (n_out, n_in), (n_out,)))
    push = torch.randn(*shape, n_out, generator=g)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGE", 0)
        for dtype, f in ((torch.float32, linear), (torch.float64, F.linear)):
            leaves = [t.clone().to(dtype).requires_grad_() for t in (x, weight, b)]
            y = f(*leaves[: 2 + bias])
            y.backward(push.to(dtype))
            with torch.no_grad():
                torch.testing.assert_close(f(*leaves[: 2 + bias]), y.detach(), rtol=0, atol=0)
            found.append([y.detach(), *(t.grad for t in leaves[: 2 + bias])])
    for a, exact in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), exact, rtol=1e-5, atol=1e-4)


def test_a_frozen_side_costs_no_gradient(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 0)
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 3))
    x.requires_grad_()
    linear(x, weight.detach()).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(4, 3))
    bias = torch.zeros(5, requires_grad=True)
    linear(x.detach(), weight.detach(), bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((5,), 4.0))


@pytest.mark.skipif(not module.ONEDNN, reason="this PyTorch has no oneDNN")
def test_small_matrices_single_rows_and_other_dtypes_are_left_to_pytorch(monkeypatch):
    called = []
    monkeypatch.setattr(
        module, "_onednn", lambda x, w, b: called.append(x.shape) or F.linear(x, w, b)
    )
    big = torch.randn(module.LARGE // 100, 100)
    for x, weight in (
        (torch.randn(2, 9), torch.randn(9, 9)),
        (torch.randn(1, 100), big),
        (torch.randn(2, 100).double(), big.double()),
    ):
        linear(x, weight)
    assert not called
    linear(torch.randn(2, 100), big)
    assert len(called) == 1
