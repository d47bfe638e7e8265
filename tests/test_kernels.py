"""The kernels against plain expressions: products by oneDNN, the rotation, the gated MLP.

Values, gradients by hand against autograd through the plain expression, and finite differences.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minibnf import kernels
from minibnf.kernels import gated, linear, rotate
from tests.strategies import FEW

# --------------------------------------------------------------------------------------- products


@pytest.fixture(autouse=True, scope="module")
def by_onednn():
    """Whatever this processor's maker: what is not by oneDNN is PyTorch's own."""
    before = kernels.fastest_library()
    kernels.multiply_by("oneDNN" if kernels.ONEDNN else "MKL")
    yield
    kernels.multiply_by(before)


@pytest.mark.parametrize(
    "maker, library", [("AuthenticAMD", "oneDNN"), ("GenuineIntel", "MKL"), ("", "MKL")]
)
def test_the_processors_maker_decides_what_multiplies(monkeypatch, tmp_path, maker, library):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {maker}\n")
    monkeypatch.setattr(kernels, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(kernels, "ONEDNN", True)
    assert kernels.fastest_library() == library


shapes, widths = st.sampled_from([(2,), (7,), (1, 5), (2, 3), (1, 1)]), st.integers(1, 40)


@FEW
@given(shape=shapes, n_in=widths, n_out=widths, bias=st.booleans(), seed=st.integers(0, 99))
def test_a_products_values_and_gradients_are_those_of_float64(shape, n_in, n_out, bias, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, b = (torch.randn(*s, generator=g) for s in ((*shape, n_in), (n_out, n_in), (n_out,)))
    push = torch.randn(*shape, n_out, generator=g)

    def results(product, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, b)][: 2 + bias]
        y = product(*leaves)
        y.backward(push.to(dtype))
        with torch.no_grad():
            torch.testing.assert_close(product(*leaves), y.detach(), rtol=0, atol=0)
        return [y.detach(), *(t.grad for t in leaves)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LARGE", 0)
        found = results(linear, torch.float32)
    for a, exact in zip(found, results(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), exact, rtol=1e-5, atol=1e-4)


def test_a_products_frozen_side_costs_no_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 0)
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 3))
    x.requires_grad_()
    linear(x, weight.detach()).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(4, 3))
    bias = torch.zeros(5, requires_grad=True)
    linear(x.detach(), weight.detach(), bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((5,), 4.0))


@pytest.mark.skipif(not kernels.ONEDNN, reason="this PyTorch has no oneDNN")
def test_small_matrices_single_rows_and_other_dtypes_are_left_to_pytorch(monkeypatch):
    called = []

    def by_onednn(x, weight, bias):
        called.append(x.shape)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(kernels, "_onednn", by_onednn)
    big = torch.randn(kernels.LARGE // 100, 100)
    linear(torch.randn(2, 9), torch.randn(9, 9))
    linear(torch.randn(1, 100), big)
    linear(torch.randn(2, 100).double(), big.double())
    assert not called
    linear(torch.randn(2, 100), big)
    assert len(called) == 1


# ------------------------------------------------------------------------ rotation and gated MLP


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


def cases(seed, dtype, rows, n):
    """(function by hand, plain one, the leaves, what else they take): the rotation, and the gated
    MLP without and with a bias."""
    q, angle = tensors(seed, dtype, (2, 3, rows, 2 * n), (2, 1, rows, n))
    cos = torch.cat([angle.cos()] * 2, -1).detach()
    sin = torch.cat([-angle.sin(), angle.sin()], -1).detach()
    leaves = tensors(seed, dtype, (2, rows, n), (2, rows, n), (5, n), (5,))
    return [
        (rotate, plain_rotation, (q,), (cos, sin)),
        (gated, plain_gated, leaves[:3], (None, False)),
        (gated, plain_gated, leaves, (True,)),
    ]


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), n=st.integers(1, 6))
def test_values_and_gradients_are_autograds(seed, rows, n):
    for ours, plain, leaves, rest in cases(seed, torch.float64, rows, n):
        found, expected = ours(*leaves, *rest), plain(*leaves, *rest)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(found.shape, dtype=torch.float64, generator=generator)
        pairs = zip(*(torch.autograd.grad(y, leaves, g) for y in (found, expected)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_are_finite_differences():
    for ours, _, leaves, rest in cases(1, torch.float64, 3, 4):
        assert torch.autograd.gradcheck(lambda *x, f=ours, r=rest: f(*x, *r), leaves)


@pytest.mark.parametrize(
    "dtype, rtol, atol", [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 0.05, 0.15)]
)
def test_lower_precision_stays_near_float64(dtype, rtol, atol, monkeypatch):
    """The products by oneDNN too."""
    monkeypatch.setattr(kernels, "LARGE", 0)
    for ours, plain, leaves, rest in cases(2, torch.float64, 7, 8):
        low = [x.detach().to(dtype).requires_grad_() for x in leaves]
        rest_low = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in rest]
        y, exact = ours(*low, *rest_low), plain(*leaves, *rest)
        found = [y, *torch.autograd.grad(y.sum(), low)]
        expected = [exact, *torch.autograd.grad(exact.sum(), leaves)]
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def test_a_frozen_weight_costs_no_gradient():
    for ours, _, leaves, rest in cases(3, torch.float64, 2, 4):
        only = [leaves[0], *(x.detach() for x in leaves[1:])]
        (found,) = torch.autograd.grad(ours(*only, *rest).sum(), only[:1])
        (whole, *_) = torch.autograd.grad(ours(*leaves, *rest).sum(), leaves)
        torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_only_what_backward_cannot_remake_is_kept():
    """What a gated MLP and a rotation save for backward: their inputs, and of x nothing."""
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    x, gate, up = (torch.randn(16, 8, requires_grad=True) for _ in range(3))
    w = torch.randn(4, 8, requires_grad=True)
    cos, sin = torch.ones(16, 8), torch.zeros(16, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rotate(x, cos, sin)
        gated(gate, up, w, None, False)
    assert sorted(kept) == sorted(t.data_ptr() for t in (cos, sin, gate, up, w))
