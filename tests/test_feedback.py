"""Feedback curves against formulas written out for each loss; shifts and their Gini coefficient."""

import math
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibnf.feedback import feedback, gini, target_logits
from minibnf.lab.figures import LINES, feedback_curves, weight_map

P = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def formulas(p, r, s, n):
    """|dL/dz_y| of one token of a response of n; s = +1 if chosen, -1 if rejected; x = log(p/r),
    other tokens at r."""
    x, o = (p / r).log(), lambda q: q / (1 - q)
    w = torch.where(p < r, o(p) / o(r), torch.ones_like(p))
    a, log_r = (p.log() + (n - 1) * math.log(r)) / n, math.log(r)
    mean_logit = a - torch.log(1 - a.exp()) - (log_r - math.log(1 - r))
    odds_push = sigma(-s * mean_logit) / (1 - a.exp())
    nll = 1.0 if s > 0 else 0.0
    return {
        "bnf": w / n,
        "rbnf": torch.maximum(w, torch.full_like(p, r)) / n if s > 0 else w / n,
        "nll": torch.full_like(p, nll) / n,
        "unlikelihood": torch.ones_like(p) / n,
        "dpo": 0.1 * sigma(-0.1 * s * x),
        "rdpo": 0.1 * sigma(-0.1 * s * x),
        "ipo": (2 * (s * x / n - 5)).abs() / n,
        "slic": (s * x < 1).double() + 0.1 * nll,
        "kto": 0.1 * sigma(0.1 * x) * sigma(-0.1 * x),
        "orpo": (nll + 0.1 * odds_push) / n,
        "simpo": 2 * sigma(1 - 2 * s * x / n) / n,
        "cpo": 0.1 * sigma(-0.1 * s * x) + nll / n,
        "ratio": (p / r).clamp(max=1) / n,
        "topr": (torch.ones_like(p) if s > 0 else (p / r).clamp(max=1)) / n,
        "tnpo": (torch.ones_like(p) if s > 0 else 2 * p / (p + r)) / n,
        "power": p / n,
        "apo_zero": 0.1 * sigma(0.1 * x) * sigma(-0.1 * x),
        "lndpo": 5 * sigma(-5 * s * x / n) / n,
        "bdpo": 0.1
        * (sigma(-0.1 * x) if s > 0 else sigma(0.1 * (0.5 + 0.5 * p / r).log()) * sigma(x)),
    }


@pytest.mark.parametrize("name", sorted(formulas(P, 0.5, 1, 1)))
@pytest.mark.parametrize(
    "r, preferred, length", [(0.3, True, 1), (0.3, False, 1), (0.8, True, 3), (0.05, False, 4)]
)
def test_every_curve_is_its_formula(name, r, preferred, length):
    expected = formulas(P, r, 1 if preferred else -1, length)[name] * (1 - P)
    found = feedback(name, P, r, preferred, length=length)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------ shifts and the Gini


def test_target_logits_are_the_rows_of_the_whole_product():
    torch.manual_seed(0)
    hidden, unembed, targets = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, 3, 3, 1])
    expected = (hidden @ unembed.t())[torch.arange(5), targets]
    torch.testing.assert_close(target_logits(hidden, unembed, targets), expected)
    capped = target_logits(hidden, unembed, targets, softcap=2.0)
    torch.testing.assert_close(capped, 2 * torch.tanh(expected / 2))
    assert target_logits(hidden.bfloat16(), unembed.bfloat16(), targets).dtype == torch.float32


def test_gini_by_hand():
    """(1, 3): differences |1-3| twice of four, mean 1; over twice the mean 2: 1/4. One of n holds
    all: 1 - 1/n."""
    assert gini(torch.tensor([1.0, -3.0])) == pytest.approx(1 / 4)
    assert gini(torch.tensor([0.0, 0.0, 0.0, 7.0])) == pytest.approx(3 / 4)
    assert gini(torch.zeros(3)) == 0


@given(x=st.lists(st.floats(-5, 5), min_size=1, max_size=8), k=st.floats(0.1, 10))
def test_gini_is_half_the_mean_difference_over_the_mean_and_knows_no_scale(x, k):
    t = torch.tensor(x, dtype=torch.float64).abs()
    if t.sum() > 1e-6:
        plain = (t[:, None] - t[None]).abs().mean() / (2 * t.mean())
        assert gini(torch.tensor(x)) == pytest.approx(plain.item(), abs=1e-5)
        assert gini(k * t) == pytest.approx(gini(t), abs=1e-9)
        assert 0 <= gini(t) <= 1 - 1 / len(x) + 1e-9


def test_the_committed_figures_are_what_the_code_draws(tmp_path):
    """Where matplotlib is the version that drew them; and each loss has a colour of its own."""
    committed = Path(__file__).parent.parent / "tutorials" / "figures"
    for name, draw in {"feedback": feedback_curves, "weights": weight_map}.items():
        drawn, there = (folder / f"{name}.svg" for folder in (tmp_path, committed))
        assert draw(drawn) == drawn
        if f"Matplotlib v{matplotlib.__version__}," in there.read_text(encoding="utf-8"):
            assert drawn.read_bytes() == there.read_bytes(), "make figures draws them anew"
    assert len({colour for colour, _ in LINES.values()}) == len(LINES)
