from decimal import Decimal, localcontext

import pytest
import torch

EXTREMES = [0.0, -1e-9, -1e-6, -1e-3, -0.1, -1.0, -5.0, -30.0, -300.0]


def exact(logp: float, ref_logp: float) -> float:
    """w with fifty digits."""
    if logp >= ref_logp:
        return 1.0
    with localcontext() as context:
        context.prec = 50
        p, r = Decimal(logp).exp(), Decimal(ref_logp).exp()
        return float(p / (1 - p) * (1 - r) / r)


def test_weight_at_and_around_the_reference(exercise):
    logps = torch.tensor([0.4, 0.2, 0.7], dtype=torch.float64).log()
    at, below, above = exercise.weight(logps, torch.full_like(logps, 0.4).log()).tolist()
    assert at == pytest.approx(1), f"p = r must give w = 1, yours is {at}"
    assert above == pytest.approx(1), f"above r w is 1, yours is {above}: is the min there?"
    slip = "0.5 is the ratio p/r: it is the ratio of the odds" if below == 0.5 else "o(p)/o(r)"
    assert below == pytest.approx(0.25 / (2 / 3)), f"p = .2, r = .4: w = .375, not {below}. {slip}"


@pytest.mark.parametrize("ref_logp", [*EXTREMES, -1e4])
def test_weight_keeps_its_digits_where_p_is_nearly_0_or_1(exercise, ref_logp):
    logps = torch.tensor([*EXTREMES, -1e4, -1e4 - 1], dtype=torch.float64)
    found = exercise.weight(logps, torch.full_like(logps, ref_logp)).tolist()
    for logp, ours in zip(logps.tolist(), found, strict=True):
        wanted = exact(logp, ref_logp)
        here = f"log p = {logp:g}, log r = {ref_logp:g}: w = {wanted:.12g}, yours is {ours:.12g}"
        assert ours == ours, f"{here}; NaN is 0/0 or inf - inf in a branch that where() discards"
        slip = "1 - exp(x) loses its digits near x = 0, expm1 does not"
        assert ours == pytest.approx(wanted, rel=1e-9, abs=1e-300), f"{here}; {slip}"


def test_topr(exercise):
    r = 0.4
    p = torch.tensor([1e-6, 0.01, 0.2, 0.3999, 0.4001, 0.9], dtype=torch.float64)
    for preferred in (True, False):
        logps = p.log().requires_grad_()
        log_r, kind = torch.full_like(p, r).log(), torch.full((6,), preferred)
        phi = exercise.topr(logps, log_r, kind)
        (found,) = torch.autograd.grad(phi.sum(), logps)
        assert not found.isnan().any(), "NaN in the derivative: a branch that where() discards"
        w = torch.ones_like(p) if preferred else (p / r).clamp(max=1)
        slip = "preferred: Φ = log p" if preferred else "rejected: dΦ/dlog p = p/r below r, 1 above"
        assert torch.allclose(found, w), f"{slip}; yours {found.tolist()}"
        off = (phi[4:] - logps[4:]).abs().max().item()
        assert off < 1e-12, "above r Φ is log p: is the constant right?"
        assert abs(phi[4] - phi[3]) < 1e-3, f"Φ jumps at p = r by {(phi[4] - phi[3]).item():.3f}"
    fall = (phi[4] - phi[0]).item()
    assert fall == pytest.approx(1, abs=1e-3), f"from r to 0 it falls by one nat, not {fall:.3f}"


def test_topr_where_p_and_r_are_tiny(exercise):
    logps = torch.tensor([-2e3, -1e3], dtype=torch.float64)
    found = exercise.topr(logps, torch.full_like(logps, -1e3), torch.tensor([False, False]))
    wanted = torch.tensor([-1001.0, -1000.0], dtype=torch.float64)
    slip = "p and r underflow to 0: is p/r written exp(log p - log r)?"
    assert torch.allclose(found, wanted), f"{slip} Yours: {found.tolist()}"
