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
    found = exercise.weight(logps, torch.full((3,), 0.4, dtype=torch.float64).log())
    torch.testing.assert_close(found, torch.tensor([1.0, 0.25 / (2 / 3), 1.0], dtype=torch.float64))


@pytest.mark.parametrize("ref_logp", [*EXTREMES, -1e4])
def test_weight_keeps_its_digits_where_p_is_nearly_0_or_1(exercise, ref_logp):
    logps = torch.tensor([*EXTREMES, -1e4, -1e4 - 1], dtype=torch.float64)
    found = exercise.weight(logps, torch.full_like(logps, ref_logp))
    expected = torch.tensor([exact(x, ref_logp) for x in logps.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-300)


def test_rbnf_retrieves_preferred_tokens_alone(exercise):
    r = torch.full((4,), 0.6, dtype=torch.float64).log()
    logps = torch.tensor([1e-6, 1e-6, 0.58, 0.58], dtype=torch.float64).log()
    found = exercise.rbnf_weight(logps, r, torch.tensor([True, False, True, False]))
    near = (0.58 / 0.42) / (0.6 / 0.4)  # above r: retrieval changes nothing
    far = (1e-6 / (1 - 1e-6)) / (0.6 / 0.4)
    torch.testing.assert_close(found, torch.tensor([0.6, far, near, near], dtype=torch.float64))
